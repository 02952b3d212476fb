"""Reading a JSON object field by field: every missing, unknown or mistyped field is named at once.

What the fields mean is said where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

from redi.errors import KnowledgeBaseError


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """This, or null."""
        return Kind(f"{self.words} or null", lambda v: v is None or self.holds(v))

    def list(self) -> Kind:
        """A list of these."""
        return Kind(
            f"a list, each {self.words}", lambda v: isinstance(v, list) and all(map(self.holds, cast("list[Any]", v)))
        )

    def mapping(self) -> Kind:
        """An object whose every value is one of these."""
        return Kind(
            f"an object, each value {self.words}",
            lambda v: isinstance(v, dict) and all(map(self.holds, cast("dict[str, Any]", v).values())),
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = Kind("text", lambda v: isinstance(v, str))
NATURAL = Kind("an integer ≥ 0", lambda v: _is_int(v) and v >= 0)
POSITIVE = Kind("an integer ≥ 1", lambda v: _is_int(v) and v >= 1)
NUMBER = Kind("a number", lambda v: _is_int(v) or isinstance(v, float))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
HASH = Kind(
    "64 hexadecimal digits", lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef")
)


def take(data: Any, kinds: Mapping[str, Kind], what: str) -> dict[str, Any]:
    """The fields of a JSON object, each of the kind it must be.

    Args:
        data: a parsed JSON value.
        kinds: every field there must be, and what it must hold.
        what: begins the message.

    Raises:
        KnowledgeBaseError: it is no object, or fields are missing, unknown or of another kind; all are named.
    """
    if not isinstance(data, dict):
        raise KnowledgeBaseError(f"{what}: expected an object, given {type(data).__name__}")
    given = cast("dict[str, Any]", data)
    wrong = [f"{name} is missing" for name in kinds if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in kinds]
    wrong += [
        f"{name} must be {kind.words}, given {_short(given[name])}"
        for name, kind in kinds.items()
        if name in given and not kind.holds(given[name])
    ]
    if wrong:
        raise KnowledgeBaseError(f"{what}: {'; '.join(wrong)}")
    return dict(given)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
