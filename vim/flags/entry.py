"""One entry of the table of flags: its type, its bounds, and how a value from outside becomes one of the flag."""

import ast
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vim.errors import UserError

_QUOTES = "'"


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers, which prints itself in words."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = f"{self.high:,}" if isinstance(self.high, int) else f"{self.high:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {high}{')' if self.open_high else ']'}"


@dataclass(frozen=True)
class Flag:
    """One entry of the table.

    Attributes:
        help: what it does; complete in itself.
        kind: type of its value, or of each of its values: int, float, str, bool or dict.
        names: on the command line; with `-` or `_` between words.
        off: names that turn a switch off.
        bounds: of a number.
        choices: the allowed values, if they are few.
        counts: least and largest number of values it takes, None for a flag of one value.
        single: whether a single value may replace the list.
        check: returns what is wrong with a value, or "".
        may_be_empty: whether text may be empty.
    """

    help: str
    kind: type
    names: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    bounds: Bounds | None = None
    choices: tuple[Any, ...] | None = None
    counts: tuple[int, int] | None = None
    single: bool = False
    metavar: str | None = None
    check: Callable[[Any], str] | None = None
    may_be_empty: bool = True

    def convert(self, value: Any, name: str) -> Any:
        """A value of the command line, of a YAML file or of a checkpoint as the flag's type.

        Args:
            value: text or a list of text, or what YAML makes of it.
            name: what to call the flag in errors.

        Raises:
            UserError: a value of the wrong type, or out of bounds.
        """
        if self.kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{name} is {reprlib.repr(value)}, expected true or false")
            return value
        if self.kind is dict:
            return _mapping(value, name)
        if self.counts is None:
            if isinstance(value, list | tuple | dict):
                raise UserError(f"{name} is {reprlib.repr(value)}, expected one value")
            result = self._one(value, name)
        else:
            if self.single and isinstance(value, int | float | str):
                value = [value]
            if not isinstance(value, list | tuple):
                raise UserError(f"{name} is {reprlib.repr(value)}, expected a list")
            least, most = self.counts
            if not least <= len(value) <= most:
                wanted = str(least) if least == most else f"{least} to {most}"
                raise UserError(f"{name} is {reprlib.repr(value)}: it takes {wanted} values")
            result = [self._one(v, name) for v in value]
            if self.single and len(set(result)) == 1:
                result = result[0]
        if self.check is not None and (wrong := self.check(result)):
            raise UserError(f"{name} is {reprlib.repr(value)}: {wrong}")
        return result

    def _one(self, value: Any, name: str) -> Any:
        shown = reprlib.repr(value)
        if not isinstance(value, str | int | float):
            raise UserError(f"{name} is {shown}, expected {self.expected}")
        text = str(value)
        try:
            # Text such as 5e-4, which YAML does not take for a number, is converted; 2.5 epochs are not cut to 2.
            result = self.kind(text)
        except ValueError as error:
            raise UserError(f"{name} is {shown}, expected {self.expected}") from error
        if self.bounds is not None and result not in self.bounds:
            raise UserError(f"{name} is {shown.strip(_QUOTES)}, expected {self.expected}")
        if self.choices is not None and result not in self.choices:
            raise UserError(f"{name} is {shown}, expected {self.expected}")
        if "\0" in text:
            raise UserError(f"{name} holds a NUL character, which no name or path can")
        if self.kind is str and not text and not self.may_be_empty:
            raise UserError(f"{name} is empty, expected {self.expected}")
        return result

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        word = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
        return f"{word[self.kind]} {self.bounds}" if self.bounds is not None else word[self.kind]


def pairs(items: list[str], name: str) -> dict[str, Any]:
    """KEY=VALUE pairs of the command line as a mapping; values are Python literals, or text.

    Raises:
        UserError: an item has no key or no value.
    """
    mapping: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"{name} has {item!r}, expected KEY=VALUE")
        try:
            mapping[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            mapping[key] = text
    return mapping


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value) or not _is_plain(value):
        raise UserError(f"{name} is {reprlib.repr(value)}, expected a mapping of argument names to values")
    return value


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a value is text, a number or None, or a short nest of lists and mappings of these.

    A file of a few lines can nest references so that a walk over them, or their text, never ends.
    """
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 1000 and all(_is_plain(v, depth - 1) for v in value)
    return value is None or isinstance(value, str | int | float)
