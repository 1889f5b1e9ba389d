"""The container files hold together: what one names, another has."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_the_image_runs_pinned_packages_as_a_user_without_rights():
    last = DOCKERFILE.split("FROM ${BASE}")[-1]
    assert re.search(r"^USER (?!root)\w+$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    assert "/health" in last
    assert re.search(r"^ARG BASE=python:3\.\d+-slim", DOCKERFILE, re.MULTILINE)
    installs = re.findall(r"pip install[^\n]*", DOCKERFILE)
    assert all("--no-deps" in line or "--constraint requirements.lock" in line for line in installs)


def test_packages_left_out_of_the_image_are_in_the_lock_and_of_developers_only():
    pattern = re.search(r"grep -vE '(.*)'", DOCKERFILE)
    assert pattern is not None
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    left_out = {line.split("==")[0] for line in locked if re.match(pattern[1], line)}
    assert {"mypy", "playwright", "pytest", "ruff"} <= left_out
    wanted = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    assert wanted is not None
    needed = set(re.findall(r'"([\w-]+)', wanted[1])) | {"fastapi", "uvicorn", "starlette", "scipy"}
    assert needed & left_out == {"torch"}  # which is installed first, apart


def test_what_the_image_copies_is_sent_to_its_build():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == sent
    assert all((ROOT / name).exists() for name in names)


def test_prometheus_asks_the_server_with_a_key_of_its_own():
    scrape = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())["scrape_configs"][0]
    services, secrets = COMPOSE["services"], COMPOSE["secrets"]
    assert scrape["static_configs"][0]["targets"] == ["slm:8000"]
    assert "slm" in services
    key = scrape["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert services["prometheus"]["secrets"] == [key]
    assert services["slm"]["secrets"] == ["slm-keys"]
    assert set(secrets) == {key, "slm-keys"}
    assert "/run/secrets/slm-keys" in DOCKERFILE


def test_no_service_can_be_reached_from_other_machines_or_gain_rights():
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
