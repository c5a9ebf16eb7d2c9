"""Settings as options of a command, and where the values come from that the user did not give."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from di_refine.commands import cli
from di_refine.commands.presets import preset
from torch_utils.settings import Declared, Settings, declared

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
    context: click.Context, values: Mapping[str, Any], recommended: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a command's options, and where those come from that are neither given nor plain defaults.

    What was given counts first, then what is recommended, then the preset.

    Args:
        context: of the command.
        values: as the command received them.
        recommended: by the registry for the network. Names that are no options of the command are passed over.

    Returns:
        The values, and 'preset' or 'registry' for the names that have theirs from there.
    """

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) != ParameterSource.DEFAULT

    values, sources = dict(values), {}
    published = preset(values["preset"], values["objective"] if is_given("objective") else None)
    for source, layer in (("preset", published), ("registry", recommended)):
        for name, value in layer.items():
            if name in values and not is_given(name):
                values[name], sources[name] = value, source
    return values, sources
