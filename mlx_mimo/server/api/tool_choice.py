"""`tool_choice`: which tools the model sees, and a grammar of calls where it must call one."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .fields import known, refuse

_NAME = re.compile(r"[^\s<>]+")
_JSON_TYPES = ("integer", "number", "boolean", "object", "array", "null")
MOST_RULES_CHARACTERS = 200_000


@dataclass(frozen=True)
class ToolChoice:
    tools: list[dict] | None  # what the model is told of
    forced: tuple[dict, ...] = ()  # one of these it must call; none: it answers or calls, as it likes
    parallel: bool = True  # may it call several at once?


NO_TOOLS = ToolChoice(None)


def read(tools: list[dict] | None, choice: Any, parallel: bool = True) -> ToolChoice:
    """From the checked tools and a chat request's tool_choice. Raises RequestError naming it."""
    if choice is None or choice == "auto":
        return ToolChoice(tools, parallel=parallel)
    if choice == "none":
        return NO_TOOLS
    if choice == "required":
        if not tools:
            raise refuse("tool_choice", "required, but there are no tools")
        return ToolChoice(tools, tuple(tool["function"] for tool in tools), parallel)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise refuse("tool_choice", "auto, none, required, or an object of type function with its name, expected")
    assert isinstance(function, dict)  # it has a name
    known("tool_choice", choice, "type", "function")
    known("tool_choice.function", function, "name")
    named = tuple(tool["function"] for tool in tools or () if tool["function"]["name"] == name)
    if not named:
        raise refuse("tool_choice", f"none of the tools is called {name[:100]!r}")
    return ToolChoice(tools, named[:1], parallel=False)


def rules(functions: tuple[dict, ...], parallel: bool, marker: Callable[[str], str]) -> str:
    """llguidance's rules for `calls`: of these functions, as MiMo writes them and mlx-lm's parser reads them.

    Parameters come in the order of the schema; those that it does not require may be left out. `marker` gives a
    tag's token, or its text where it has none. Raises RequestError.
    """
    opened, closed = marker("<tool_call>"), marker("</tool_call>")
    lines = [
        'calls: call ("\\n" call)*' if parallel else "calls: call",
        "call: " + " | ".join(f"call{i}" for i in range(len(functions))),
    ]
    for i, function in enumerate(functions):
        where = f"tools: function {function['name'][:64]!r}"
        schema = function.get("parameters") or {}
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise refuse("tools", f"{where}: required: a list expected")
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        parts = []
        for j, (name, parameter) in enumerate(schema.get("properties", {}).items()):
            rule = f"p{i}x{j}"
            parts.append(rule if name in required else f"{rule}?")
            lines += _parameter(rule, _checked(where, name), parameter, shared)
        head = _quoted(f"\n<function={_checked(where, function['name'])}>\n")
        lines.append(f"call{i}: {opened} {head} {' '.join(parts)} {_quoted('</function>' + chr(10))} {closed}")
    text = "\n".join(lines) + "\n"
    if len(text) > MOST_RULES_CHARACTERS:
        raise refuse("tools", f"too many and too long to force a call: {len(text):,} characters of grammar")
    return text


def _checked(where: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise refuse("tools", f"{where}: {name[:64]!r} cannot be forced: a name without spaces, < and > expected")
    return name


def _parameter(rule: str, name: str, schema: dict, shared: dict) -> list[str]:
    """The rules of one parameter with its tags; its value is written as its type says."""
    head, end = _quoted(f"<parameter={name}>"), _quoted("</parameter>\n")
    kind, choices = schema.get("type"), schema.get("enum", [schema["const"]] if "const" in schema else None)
    if kind in _JSON_TYPES:
        value = json.dumps(schema | shared | {"x-guidance": {"whitespace_flexible": False}}, ensure_ascii=False)
        return [f"{rule}: {head} {rule}v {end}", f"{rule}v: %json {value}"]
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return [f"{rule}: {head} ({' | '.join(map(_quoted, choices))}) {end}"]
    # Text as it is, up to the tag that ends it.
    return [f'{rule}: {head} {rule}v "\\n"', rf"{rule}v[lazy]: /(?s:.*)<\/parameter>/"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
