"""Models of the Hugging Face hub, from its library's cache; the network is never asked."""

import shutil

import pytest
from golden_io import GOLDEN

from di_refine.errors import InputError
from di_refine.files import networks, registry
from di_refine.files.hub import short_name

pytest.importorskip("diffusers", reason="needs the optional package diffusers")
COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with one model, in the library's layout."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("DI_REFINE_OFFLINE", "1")
    model = tmp_path / "models--some--digits"
    shutil.copytree(GOLDEN / "diffusers/ddpm-eps-linear", model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    return model


def test_a_model_of_the_cache(hub):
    for name in ("hf:some/digits", "hf:some/digits@main", f"hf:some/digits@{COMMIT}"):
        path = registry.resolve(name, "teacher")
        assert path == hub / "snapshots" / COMMIT and short_name(path) == "digits"
    assert networks.load(path).kind == networks.EDM


def test_what_cannot_be_had(hub):
    for name, words in [
        ("hf:some/other", "teacher=hf:some/other is not in its cache and downloading is off"),
        ("hf:some/digits@v2", "is not in its cache and downloading is off"),
        ("hf:digits", "is no model of the Hugging Face hub"),
        ("hf:../../etc/passwd", "is no model of the Hugging Face hub"),
    ]:
        with pytest.raises(InputError, match=words):
            registry.resolve(name, "teacher")
