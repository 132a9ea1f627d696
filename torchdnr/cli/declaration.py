"""Settings: fields of a dataclass that are options of the command line and JSON values too."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

from torchdnr.files import plain_json


def in_words(value: object) -> str:
    """Write a value, or each of a list, as it is typed, with all digits of a number."""
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def number(low: float, kind: type[float] | type[int] = int) -> Callable[[str], float]:
    """Make a reader of finite numbers >= ``low`` for the command line, by default of whole ones."""
    name = "whole number" if kind is int else "number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a {name} >= {low}, got {text}")
        return value

    return parse


def option(
    text: str,
    *,
    heading: str | None = None,
    default: Any = None,  # noqa: ANN401 - of the field's type
    default_text: str | None = None,
    optional: bool = False,
    flag: str | None = None,
    **parsing: Any,  # noqa: ANN401 - as argparse has them
) -> Any:  # noqa: ANN401 - as dataclasses.field
    """Declare a field of settings that is an option of the command line too.

    Args:
        text: Help.
        heading: Heading of the help under which it and the next ones stand.
        default: Its value where it is not given; None: it depends on the other settings.
        default_text: The default in words.
        optional: Whether JSON files may lack it, as those of earlier versions; it then has its
            default.
        flag: Name of the option; default: that of the field.
        **parsing: Further arguments of ``add_argument``.
    """
    if default_text is None and default is not None:
        default_text = in_words(default)
    shown = f"{text} (default: {default_text})" if default_text else text
    metadata = {
        "heading": heading,
        "default": default,
        "flag": flag,
        "parsing": {"help": shown.replace("%", "%%"), **parsing},
    }
    return field(default=default, metadata=metadata) if optional else field(metadata=metadata)


def count(text: str, low: int = 1, **more: Any) -> Any:  # noqa: ANN401 - as option
    """Declare an option that is a whole number >= ``low``."""
    return option(text, type=number(low), metavar="N", **more)


def option_fields(kind: type) -> list[Field[Any]]:
    """List the fields of a class of settings that are options of the command line."""
    return [entry for entry in fields(kind) if "parsing" in entry.metadata]


def flag_of(entry: Field[Any]) -> str:
    """Return the name of the option that sets a field."""
    return entry.metadata["flag"] or f"--{entry.name.replace('_', '-')}"


def dest_of(entry: Field[Any]) -> str:
    """Return the name that a field has in the parsed options."""
    return entry.metadata["parsing"].get("dest", entry.name)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings as a file holds them; ``added`` names those that earlier versions did not have."""

    added: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without added settings that are not given.

        What a version without them made then stays valid.
        """
        values = vars(self)
        unused = [name for name in self.added if values[name] is None or values[name] is False]
        return {k: v for k, v in plain_json(values).items() if k not in unused}

    @classmethod
    def from_json(cls, content: object) -> Self:
        """Read what ``to_json`` made, also of an earlier version; check the types.

        What the class does not know is left out.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"expected the settings as a JSON object, got {content!r}")
        values = {}
        for entry in fields(cls):
            if entry.name in content:
                value = content[entry.name]
                value = math.inf if value == "inf" and _is_of(math.inf, entry.type) else value
                if not _is_of(value, entry.type):
                    raise ValueError(f"setting {entry.name} must be {entry.type}, got {value!r}")
                values[entry.name] = value
            elif entry.default is MISSING and entry.default_factory is MISSING:
                raise ValueError(f"setting {entry.name} is missing")
        return cls(**values)


def _is_of(value: object, kind: Any) -> bool:  # noqa: ANN401 - a type, a union, a list[...]
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    return isinstance(value, (float, int) if kind is float else kind)
