"""How a setting is declared: once, as a field of the dataclass of the part that it belongs to.

    @dataclass(kw_only=True)
    class LoopConfig(Settings):
        kimg: float = setting(5000, "Train on this many thousand images.", above=0, group=HOW_LONG, may_change=True)

The field holds the default, the help text, the allowed values, and whether a run that is resumed may have another one.
The dataclass checks its values when it is made. Commands turn the fields into options (`di_refine.commands.options`),
so that a new setting is written down here and nowhere else. Nothing in this module imports PyTorch: `--help` is quick.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

WHAT, HOW_LONG, LEARNING, OBJECTIVE = "What", "How long", "Learning", "Objective"
NETWORK, MEASURING, FILES, MACHINE = "Network", "Measuring", "Files", "Machine"
GROUPS = (WHAT, HOW_LONG, NETWORK, LEARNING, OBJECTIVE, MEASURING, FILES, MACHINE)
"""The groups of settings in the order in which `--help` shows them."""


class SettingError(ValueError):
    """A value that a setting cannot have; the message writes settings as `name=value`."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a setting besides its name, type and default.

    Attributes:
        help: a sentence for `--help`.
        group: one of `GROUPS`.
        minimum, maximum: the value lies between them, ends included.
        above: the value is larger than this.
        choices: the only allowed values, besides None where the type has it.
        words: texts that are allowed besides the numbers, such as 'auto'.
        default_text: what `--help` says of the default where that is None: 'as the batch'.
        metavar: what stands for the value in `--help`.
        names: further spellings of the option, with their dashes.
        may_change: a resumed run may have another value.
    """

    help: str
    group: str = WHAT
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: Sequence[str] | None = None
    words: Sequence[str] = ()
    default_text: str | None = None
    metavar: str | None = None
    names: Sequence[str] = ()
    may_change: bool = False


def setting(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: its value where none is given; `...` makes it required.
        help: a sentence for `--help`.
        details: the other attributes of `Setting`.
    """
    metadata = {"setting": Setting(help, **details)}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Declared:
    """A setting as a dataclass declares it.

    Attributes:
        name: of the field.
        default: `dataclasses.MISSING` where the setting is required.
        kind: int, float, str or bool.
        optional: None is allowed.
        several: the value is a tuple of `kind`.
        setting: the rest.
    """

    name: str
    default: Any
    kind: type
    optional: bool
    several: bool
    setting: Setting


def declared(settings: type) -> Iterator[Declared]:
    """The settings of a dataclass, in the order of its fields; fields that are no settings are passed over.

    A subclass may give a setting another default by a plain `batch: int = 512`; the rest stays as it was declared.
    """
    hints = typing.get_type_hints(settings)
    bases = [base for base in settings.__mro__ if dataclasses.is_dataclass(base)]
    for field in dataclasses.fields(settings):
        known = (base.__dataclass_fields__.get(field.name) for base in bases)
        details: Setting | None = next(
            (each.metadata["setting"] for each in known if each is not None and "setting" in each.metadata), None
        )
        if details is None:
            continue
        hint, optional, several = hints[field.name], False, False
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            members = typing.get_args(hint)
            optional = type(None) in members
            rest = [member for member in members if member is not type(None)]
            hint = next((member for member in rest if member in (int, float)), rest[0]) if details.words else rest[0]
        if typing.get_origin(hint) is tuple:
            several, hint = True, typing.get_args(hint)[0]
        yield Declared(field.name, field.default, hint, optional, several, details)


def bounds(details: Setting) -> str:
    """The range in words: ' (at least 1)', or nothing."""
    words = [f"greater than {details.above:g}"] if details.above is not None else []
    words += [f"at least {details.minimum:g}"] if details.minimum is not None else []
    words += [f"at most {details.maximum:g}"] if details.maximum is not None else []
    return f" ({' and '.join(words)})" if words else ""


def problem(value: Any, kind: type, details: Setting) -> str | None:
    """What a single value must be and is not, such as 'a whole number (at least 1)'; None where it is right."""
    if isinstance(value, str) and value in details.words:
        return None
    if details.choices is not None:
        return None if value in details.choices else f"one of {', '.join(details.choices)}"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is str:
        return None if isinstance(value, str) else "text"
    what = {int: "a whole number", float: "a number"}[kind] + bounds(details)
    what = f"{' or '.join(map(repr, details.words))} or {what}" if details.words else what
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or (kind is int and value != int(value)):
        return what
    low = details.minimum is not None and value < details.minimum
    high = details.maximum is not None and value > details.maximum
    return what if low or high or (details.above is not None and value <= details.above) else None


class Settings:
    """A dataclass of settings, which refuses values that they cannot have.

    Raises:
        SettingError: naming the setting and what it must be.
    """

    def __post_init__(self) -> None:
        for item in declared(type(self)):
            value = getattr(self, item.name)
            if value is None and item.optional:
                continue
            for part in value if item.several else [value]:
                wanted = problem(part, item.kind, item.setting)
                if wanted is not None:
                    raise SettingError(f"{item.name}={part} is not possible; it must be {wanted}")


@dataclasses.dataclass(kw_only=True)
class UpdateConfig(Settings):
    """The settings that all trainers have."""

    batch: int = setting(64, "Update on this many images.", minimum=1, group=LEARNING)
    batch_gpu: int | None = setting(
        None,
        "Pass this many images through the networks at once; it must divide the batch.",
        minimum=1,
        group=MACHINE,
        may_change=True,
        default_text="`batch`",
    )
    seed: int = setting(0, "Seed everything random.", minimum=0, group=LEARNING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.batch_gpu, int) and self.batch % self.batch_gpu:
            raise SettingError(f"batch={self.batch} is not a multiple of batch_gpu={self.batch_gpu}")


def may_change(*settings: type) -> frozenset[str]:
    """Names of the settings that a resumed run may have other values of."""
    return frozenset(item.name for part in settings for item in declared(part) if item.setting.may_change)
