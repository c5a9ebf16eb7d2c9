"""Settings of the tests of commands."""

import functools

import pytest


@pytest.fixture(autouse=True, scope="session")
def small_pictures():
    """Pictures of a training have one row instead of eight: drawing them is most of what a tiny training does."""
    from di_refine.commands import ending

    patch = pytest.MonkeyPatch()
    patch.setattr(ending, "class_grid", functools.partial(ending.class_grid, rows=1))
    yield
    patch.undo()
