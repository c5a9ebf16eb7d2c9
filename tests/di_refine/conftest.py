"""Fixtures for what downloads: a server that misbehaves on request, a cache folder, and a small registry."""

import hashlib
from types import SimpleNamespace

import pytest

# What downloads is imported inside the fixtures: a machine that is lent for its GPU may lack it, and runs other tests.


@pytest.fixture(scope="session")
def running_server():
    from di_refine_http import running

    with running() as server:
        yield server


@pytest.fixture
def server(running_server, monkeypatch):
    from di_refine_http import reset

    from di_refine.files import download

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "DI_REFINE_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))  # before further attempts
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    reset(running_server)
    return running_server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DI_REFINE_CACHE", str(folder))
    return folder


@pytest.fixture
def small_registry(tmp_path, monkeypatch, server):
    """A registry of a shipped file, a missing one, and downloads from the test's server."""
    from di_refine_http import CONTENT

    from di_refine.files import registry

    shipped = tmp_path / "pretrained"
    shipped.mkdir()
    (shipped / "gan.pkl").write_bytes(b"gan")
    records = {
        "gan.pkl": {"file": "gan.pkl", "kind": "stylegan2", "teacher": "teacher.pkl", "classes": 10},
        "lost.pkl": {"file": "lost.pkl", "kind": "edm"},
        "teacher.pkl": {
            "url": f"{server.base}/ok/original.pkl",
            "kind": "edm",
            "sha256": hashlib.sha256(CONTENT).hexdigest()[:8],
        },
        "wrong.pkl": {"url": f"{server.base}/ok/wrong.pkl", "kind": "edm", "sha256": "00000000"},
    }
    monkeypatch.setattr(registry, "registry", lambda: records)
    monkeypatch.setattr(registry, "pretrained_folder", lambda: shipped)
    return records
