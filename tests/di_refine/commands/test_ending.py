"""The picture of classes in columns."""

import pytest

from di_refine.commands import ending
from di_refine.labels import LabelLaw


@pytest.mark.parametrize("classes, columns", [(0, 10), (1, 10), (2, 10), (3, 9), (4, 8), (9, 9), (10, 10), (12, 10)])
def test_each_class_has_as_many_columns(classes, columns):
    assert ending.columns(LabelLaw(classes)) == columns
