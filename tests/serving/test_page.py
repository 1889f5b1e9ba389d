"""The page's files: the ones that were built, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from slm.errors import ConfigError, TaskError
from slm.serving.page import FOLDER, MANIFEST, load_page, page_router
from slm.serving.uploads import SUFFIXES
from slm.tasks.task import _NAME, check_name

SOURCES = Path(__file__).parents[2] / "page"
SINGLE = ("index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router(load_page()))
    return TestClient(app)


def test_the_committed_bundle_is_the_one_that_the_sources_build():
    names = [
        *SINGLE,
        *(p.relative_to(SOURCES).as_posix() for p in (SOURCES / "src").rglob("*") if p.is_file()),
    ]
    hashes = ((name, hashlib.sha256((SOURCES / name).read_bytes()).hexdigest()) for name in sorted(names))
    text = "".join(f"{name}\0{digest}\n" for name, digest in hashes)
    built = json.loads((FOLDER / MANIFEST).read_text())
    assert built["sources"] == hashlib.sha256(text.encode()).hexdigest(), (
        "run `make page` and commit the bundle"
    )
    assert {p.name for p in FOLDER.iterdir()} == {MANIFEST, *built["files"]}


def test_the_page_lets_a_task_be_called_what_the_server_does():
    source = (SOURCES / "src/teach/taskName.ts").read_text()
    assert re.findall(r"NAME = /\^(.*)\$/;", source) == [_NAME.pattern]
    with pytest.raises(TaskError) as caught:
        check_name("")
    rule = str(caught.value).partition(": use ")[2]
    assert f'"Use {rule}."' in source
    (most,) = re.findall(r"MOST_CHARACTERS = (\d+);", source)
    check_name(int(most) * "a")
    with pytest.raises(TaskError):
        check_name((int(most) + 1) * "a")


def test_the_page_takes_no_file_that_the_server_refuses():
    teach = SOURCES / "src/teach"
    (offered,) = re.findall(r'accept="([^"]+)"', (teach / "TeachPanel.tsx").read_text())
    (read,) = re.findall(r"!/\\\.(\w+)\$/i\.test\(file\.name\)", (teach / "readRows.ts").read_text())
    assert offered == f".{read}"
    assert offered in SUFFIXES


def test_packages_of_the_bundle_are_pinned_exactly():
    wanted = json.loads((SOURCES / "package.json").read_text())
    pins = wanted["dependencies"] | wanted["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in pins.values())
    locked = json.loads((SOURCES / "package-lock.json").read_text())["packages"]
    assert all(locked[f"node_modules/{name}"]["version"] == version for name, version in pins.items())


def test_the_bundle_asks_nobody_but_its_own_server():
    for file in load_page().values():
        found = set(re.findall(r"https?://[^\s\"'`)<>]+", file.content.decode()))
        # Names of XML's vocabularies, which are never fetched.
        assert {url for url in found if "www.w3.org/" not in url} == set()


def test_without_javascript_the_page_names_what_there_is(client):
    (hint,) = re.findall(r"<noscript>.*</noscript>", client.get("/").text)
    assert re.findall(r"see (\S+)\.<", hint) == ["/openapi.json"]  # where create_app puts it


def test_the_entry_is_asked_for_again_and_names_files_kept_for_ever(client):
    entry = client.get("/")
    assert entry.status_code == 200
    assert entry.headers["content-type"] == "text/html; charset=utf-8"
    assert entry.headers["cache-control"] == "no-cache"
    names = re.findall(r"/page/([\w.-]+)", entry.text)
    assert len(names) == 3
    for name in names:
        file = client.get(f"/page/{name}")
        assert file.status_code == 200
        assert "immutable" in file.headers["cache-control"]
    assert client.get("/", headers={"If-None-Match": entry.headers["etag"]}).status_code == 304
    assert client.head("/").headers["content-length"] == str(len(entry.content))


def test_the_policy_lets_only_the_page_s_own_files_run(client):
    for path in ("/", "/page/none.js"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert client.get(path).headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name",
    [
        "build.json",
        "page.py",
        "../page.py",
        "..%2fpage.py",
        "%2e%2e/page.py",
        "....//page.py",
        "/etc/passwd",
        "",
        ".",
    ],
)
def test_no_other_file_is_served(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert "BuiltFile" not in answer.text


def test_a_changed_file_is_refused_at_the_start(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "page")
    entry = folder / "index.html"
    entry.write_text(entry.read_text().replace("slm", "other"))
    with pytest.raises(ConfigError, match=r"index\.html is not the file that was built .*npm run build"):
        load_page(folder)


def test_a_page_that_was_never_built_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read .*install slm again"):
        load_page(tmp_path)
