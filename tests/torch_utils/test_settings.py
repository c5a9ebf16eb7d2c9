"""Settings: what a dataclass declares, and which values it refuses."""

import dataclasses
import math
from dataclasses import dataclass

import pytest

from torch_utils.settings import GROUPS, SettingError, Settings, UpdateConfig, declared, may_change, setting


@dataclass(kw_only=True)
class Example(Settings):
    needed: str = setting(..., "Be there.")
    rate: float = setting(0.5, "Be fast.", above=0, maximum=1, may_change=True)
    share: int | str | None = setting(None, "Take a share.", minimum=1, words=("auto",))
    kind: str | None = setting(None, "Be one of these.", choices=("a", "b"))
    flag: bool = setting(False, "Be on.")
    several: tuple[int, ...] = setting((), "Be many.", minimum=2)
    internal: float = 3.0


@dataclass(kw_only=True)
class Other(Example):
    rate: float = 0.25


def test_what_is_declared():
    found = {item.name: item for item in declared(Example)}
    assert list(found) == ["needed", "rate", "share", "kind", "flag", "several"], "other fields are no settings"
    assert found["needed"].default is dataclasses.MISSING and found["rate"].default == 0.5
    assert [found[name].kind for name in found] == [str, float, int, str, bool, int]
    assert [name for name in found if found[name].optional] == ["share", "kind"]
    assert [name for name in found if found[name].several] == ["several"]
    assert all(item.setting.group in GROUPS for item in found.values())
    assert may_change(Example) == {"rate"} and may_change(Example, UpdateConfig) == {"rate", "batch_gpu"}


def test_a_subclass_may_have_another_default():
    found = {item.name: item for item in declared(Other)}
    assert found["rate"].default == 0.25 and found["rate"].setting.help == "Be fast."
    assert Other(needed="x").rate == 0.25
    with pytest.raises(SettingError, match="rate=2 "):
        Other(needed="x", rate=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 0}, r"rate=0 is not possible; it must be a number \(greater than 0 and at most 1\)"),
        ({"rate": math.nan}, "rate=nan"),
        ({"rate": "fast"}, "rate=fast"),
        ({"rate": True}, "rate=True"),
        ({"share": 0}, r"share=0 .* 'auto' or a whole number \(at least 1\)"),
        ({"share": "all"}, "share=all"),
        ({"share": 1.5}, "share=1.5"),
        ({"kind": "c"}, "kind=c is not possible; it must be one of a, b"),
        ({"flag": 1}, "flag=1 is not possible; it must be true or false"),
        ({"several": (3, 1)}, "several=1"),
        ({"needed": 3}, "needed=3 is not possible; it must be text"),
    ],
)
def test_impossible_values_are_refused(values, words):
    with pytest.raises(SettingError, match=words):
        Example(**{"needed": "x", **values})


def test_possible_values():
    made = Example(needed="x", rate=1, share="auto", kind="b", flag=True, several=(2, 3))
    assert (made.rate, made.share, made.kind) == (1, "auto", "b")
    assert Example(needed="x", share=4).share == 4
    with pytest.raises(SettingError, match="batch=6 is not a multiple of batch_gpu=4"):
        UpdateConfig(batch=6, batch_gpu=4)
