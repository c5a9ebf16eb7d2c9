"""Settings of the tests of commands."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def small_pictures():
    """Pictures in the course of a training have one row, as those of slow networks: drawing is most of a tiny training."""
    from di_refine.commands import ending

    patch = pytest.MonkeyPatch()
    patch.setattr(ending, "DRAWING_SECONDS", 0.0)
    yield
    patch.undo()
