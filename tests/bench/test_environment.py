"""What a result says of its circumstances."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from slm.bench import environment


@pytest.fixture(autouse=True)
def asked_anew():
    environment.commit.cache_clear()
    yield
    environment.commit.cache_clear()


def test_the_commit_is_that_of_the_code_and_of_no_repository_around_it(tmp_path, monkeypatch):
    if environment.commit():
        assert re.fullmatch("[0-9a-f]{40}( with changes)?", environment.commit())
    environment.commit.cache_clear()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(environment.__file__, tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() == ""


def test_without_git_the_commit_is_unknown_and_nothing_fails(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == ""
