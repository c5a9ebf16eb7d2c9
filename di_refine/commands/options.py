"""Settings as options of a command, and where the values come from that the user did not give."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from di_refine import presets, terminal
from di_refine.commands import cli
from di_refine.errors import InputError
from di_refine.runs.config import TOLD_ANEW
from torch_utils.settings import Declared, Settings, declared

GIVEN = "given"  # as the source of a value
# A run that goes on does not keep these: `kimg` has what became of `minutes`, and another machine takes other parts.
_NOT_KEPT = {*TOLD_ANEW, "minutes", "batch_gpu", "workers"}

Part = TypeVar("Part", bound=Settings)


def options(*parts: type[Settings]) -> Callable[[Callable], Callable]:
    """Decorates a command with the settings of dataclasses as options."""

    def add(function: Callable) -> Callable:
        for part in reversed(parts):
            for item in reversed(list(declared(part))):
                function = _option(item)(function)
        return function

    return add


def _option(item: Declared) -> Callable[[Callable], Callable]:
    details, name = item.setting, item.name.replace("_", "-")
    text = details.help if details.default_text is None else f"{details.help}  [default: {details.default_text}]"
    shared: dict[str, Any] = {"cls": cli.Option, "group": details.group, "help": text}
    if item.default is dataclasses.MISSING:
        shared["required"] = True
    else:
        shared["default"] = item.default
    if item.kind is bool:
        return click.option(f"--{name}/--no-{name}", item.name, **shared)
    return click.option(
        f"--{name}",
        *details.names,
        item.name,
        type=_type(item),
        metavar=details.metavar,
        multiple=item.several,
        **shared,
    )


def _type(item: Declared) -> click.ParamType:
    details = item.setting
    if details.choices is not None:
        return click.Choice(list(details.choices))
    if item.kind is str:
        return click.STRING
    if item.kind is int:
        low, high = details.minimum, details.maximum
        kind: click.ParamType = cli.Integer(None if low is None else int(low), None if high is None else int(high))
    else:
        kind = cli.Number(details.minimum, details.maximum, details.above)
    return cli.WordOr(tuple(details.words), kind) if details.words else kind


def make(part: type[Part], values: Mapping[str, Any]) -> Part:
    """The settings of one part, from the values of a command's options.

    Raises:
        SettingError: values that do not fit each other.
    """
    return part(**{item.name: values[item.name] for item in declared(part)})


def resolve(
    context: click.Context,
    values: Mapping[str, Any],
    command: str,
    facts: presets.Facts,
    recommended: Mapping[str, Any] | None = None,
    recorded: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {},
    speed: Callable[[Mapping[str, Any]], float] | None = None,
    recommended_by: str = "registry",
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a command's options, and where those come from that are no plain defaults.

    What was given counts first, then what a run that goes on was fitted with (or, where `resume` names it, all that it
    has), then what is recommended, then the preset.

    Args:
        context: of the command.
        values: as the command received them.
        command: what is made, a key of `presets.TABLE`.
        facts: of the run.
        recommended: for the network, by the registry. Names that are no options of the command are passed over.
        recorded: gives the options that the run has recorded that would go on with these values; {} for a new one.
        recommended_by: what a value that is recommended is said to be from.
        speed: measures the images a second of a run with these values, for `minutes`.

    Returns:
        The values, and 'given', 'auto', 'preset', 'registry' or 'minutes' for the names that have theirs from there.

    Raises:
        InputError: `kimg` and `minutes` are both given.
    """

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) != ParameterSource.DEFAULT

    recommended, minutes = recommended or {}, values["minutes"]
    if minutes and is_given("kimg"):
        raise InputError("`kimg` and `minutes` both say how long to train; give one of them")
    asked = values["kimg"] if is_given("kimg") else None if minutes else recommended.get("kimg")
    objective = values["objective"] if "objective" in values and is_given("objective") else None
    kind = presets.AUTO if values["preset"] == presets.AUTO else "preset"

    def fitted(kimg: float | None, kept: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        result, sources = dict(values), {name: GIVEN for name in values if is_given(name) and name not in TOLD_ANEW}
        preset = presets.values_of(command, values["preset"], dataclasses.replace(facts, kimg=kimg), objective)
        length = {"kimg": kimg} if minutes and kimg else {}
        layers = ((kind, preset), (recommended_by, recommended), (presets.AUTO, kept), ("minutes", length))
        for source, layer in layers:
            for name, value in layer.items():
                if name in result and not is_given(name):
                    result[name], sources[name] = value, source
        return result | own, sources | {name: of_run[name] for name in own if name in of_run}

    own: dict[str, Any] = {}
    of_run: dict[str, str] = {}
    first = fitted(asked, {})[0]
    before = recorded(first)
    if str(values.get("resume") or presets.AUTO) != presets.AUTO:
        fixed = "kimg" if minutes else ""
        own = {name: v for name, v in _own(before, values).items() if not is_given(name) and name != fixed}
        asked, of_run = own.get("kimg", asked), dict(before.get("sources") or {})
    kept = {
        name: before[name]
        for name, source in dict(before.get("sources") or {}).items()
        if source in (presets.AUTO, "minutes") and name in before
    }
    if minutes and before.get("minutes") and "kimg" in kept:
        asked = kept["kimg"] * (minutes / before["minutes"])
    elif minutes and speed is not None:
        # A tenth is left for pictures, snapshots and the start.
        asked = max(float(f"{speed(first) * 60 * 0.9 * minutes / 1000:.3g}"), first["batch"] / 1000)
    return fitted(asked, kept)


def _own(recorded: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has recorded of a command's options, in the form in which the command receives them.

    Addresses are left out, as their secrets are not recorded.
    """
    own: dict[str, Any] = {}
    for name in values.keys() & recorded.keys() - _NOT_KEPT:
        value = recorded[name]
        value = tuple(value) if isinstance(value, list) and isinstance(values[name], tuple) else value
        if isinstance(value, (int, float, str, tuple)) and "://" not in str(value):
            own[name] = value
    return own


def warn(context: click.Context, values: Mapping[str, Any]) -> None:
    """Name on stderr the settings that cannot work in the run's length."""
    from torch_utils import distributed

    if distributed.is_first():
        for warning in presets.warnings(values):
            terminal.say(cli.spell(f"warning: {warning}", context.command))
