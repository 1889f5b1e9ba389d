"""A tiny backbone, a store of it, and a server that runs in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from slm.model import ScalableLM
from slm.serving.app import create_app
from slm.serving.running import server_of
from slm.serving.settings import ServingSettings
from tests.backbone.families import load, save
from tests.serving.stores import make_store


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save("LLaMA", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return load(tiny_folder)


@pytest.fixture(scope="session")
def store(tmp_path_factory, tiny):
    """The folder of a store that no test changes."""
    return make_store(tmp_path_factory.mktemp("serving") / "store", tiny).store.path


def fresh_model(store, tiny_folder) -> ScalableLM:
    """A model with a backbone of its own, which a server may keep to itself."""
    return ScalableLM.open(store, load(tiny_folder))


@contextmanager
def serving(model: ScalableLM, **settings: object) -> Iterator[str]:
    """Serve a model over real HTTP; gives the address."""
    chosen = replace(ServingSettings(poll_s=0.1, grace_s=10.0), port=0, **settings)
    server = server_of(create_app(model, chosen), chosen)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 60
    while not server.started and time.monotonic() < ends and thread.is_alive():
        time.sleep(0.01)
    try:
        scheme = "http" if chosen.certificate is None else "https"
        yield f"{scheme}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def address(store, tiny_folder):
    """A server that no test changes."""
    with serving(fresh_model(store, tiny_folder)) as found:
        yield found
