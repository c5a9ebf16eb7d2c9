"""Measurements that are kept."""

import pytest

from di_refine.files import registry
from di_refine.metrics import kept
from di_refine.metrics.feature_net import Identity
from di_refine.metrics.results import MetricResult


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    identity = Identity("toy", "0" * 16, 16, "antialiased-bilinear", 8, None)
    return [MetricResult("fd1k_full@toy", {"fd1k_full@toy": 0.1 + 0.2}, 9, 3, 8, 1, identity, {"count": 4}, 1.5)]


def test_what_is_kept_comes_back_as_it_was(results):
    assert kept.load("a") is None
    kept.store("a", results)
    assert kept.load("a") == results and kept.load("b") is None


@pytest.mark.parametrize("content", [b"", b"[", b"{}1", b'[{"name": 1}]', b"3", b'[{"detector": {}}]'])
def test_a_damaged_file_is_passed_over(results, content):
    kept.store("a", results)
    (path,) = (registry.cache_folder() / "measured").iterdir()
    path.write_bytes(content)
    assert kept.load("a") is None


def test_a_folder_that_cannot_be_made_is_said(results, capsys):
    registry.cache_folder().write_text("a file")
    kept.store("a", results)
    assert "note: cannot keep measurements" in capsys.readouterr().err
