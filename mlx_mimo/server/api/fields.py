"""The fields of a request and their checks: each is honoured or refused by its name, never silently dropped."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RequestError

Check = Callable[[str, Any], Any]
MOST_CHOICES = 16
MOST_TOKENS = 10_000_000


def refuse(name: str, message: str, status: int = 400, code: str | None = None) -> RequestError:
    return RequestError(status, f"{name}: {message}", param=name, code=code)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, f"true or false expected, {found(value)} found")
    return value


def integer(least: int, most: int) -> Check:
    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise refuse(name, f"a whole number of {least} to {most} expected, {found(value)} found")
        return value

    return check


def number(least: float, most: float) -> Check:
    def check(name: str, value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not least <= value <= most:  # nor is NaN between them
            raise refuse(name, f"a number of {least:g} to {most:g} expected, {found(value)} found")
        return float(value)

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refuse(name, f"text expected, {found(value)} found")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(name, "not valid Unicode: half of a surrogate pair found") from None
    return value


def only(*values: Any) -> Check:
    """A field of which some values ask for nothing beyond what happens anyway."""

    def check(name: str, value: Any) -> Any:
        if not any(value == good and type(value) is type(good) for good in values):
            raise refuse(name, f"{found(value)} is not supported")
        return value

    return check


def label(name: str, value: Any) -> Any:
    """A field that asks nothing of the answer: names of users, tags."""
    if not isinstance(value, (str, dict)):
        raise refuse(name, f"text or an object expected, {found(value)} found")
    return value


def known(where: str, value: dict[str, Any], *names: str) -> None:
    """Rejects unknown keys of an object that stands at `where`. Null counts as absent, as everywhere."""
    for name in value:
        if name not in names and value[name] is not None:
            raise refuse(f"{where}.{name[:64]}", "this server has no such field", code="unsupported_parameter")


def stop(name: str, value: Any) -> list[str]:
    """Words that end an answer: one, or a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > 16:
        raise refuse(name, "text, or a list of at most 16 texts, expected")
    for word in values:
        if not text(name, word) or len(word) > 1000:
            raise refuse(name, "texts of 1 to 1000 characters expected")
    return values


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """{token id: what is added to its logit}"""
    if not isinstance(value, dict) or len(value) > 1024:
        raise refuse(name, "an object of at most 1024 token ids expected")
    bias = {}
    for token, amount in value.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise refuse(name, f"a token id expected, {token[:40]!r} found")
        bias[int(token)] = number(-100, 100)(name, amount)
    return bias


def unchecked(name: str, value: Any) -> Any:
    """A field with a reader of its own."""
    return value


def read(body: dict[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """The checked values of a request's body; null counts as absent. Raises RequestError naming the field."""
    values = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in checks:
            raise refuse(name[:64], "this server has no such field", code="unsupported_parameter")
        values[name] = checks[name](name, value)
    return values


def found(value: Any) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
