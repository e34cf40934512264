"""`response_format` and forced calls: the grammar that an answer has to follow, in llguidance's form."""

import json
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..engine.grammar import Grammar
from . import tool_choice
from .fields import boolean, known, refuse, text
from .tool_choice import ToolChoice


def response_schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema of a request's response_format; None for plain text. Raises RequestError."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise refuse("response_format.type", "text, json_object or json_schema expected")
    known("response_format", value, "type", *(("json_schema",) if kind == "json_schema" else ()))
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    wrapper = value.get("json_schema")
    if isinstance(wrapper, dict):
        where = "response_format.json_schema"
        known(where, wrapper, "name", "description", "schema", "strict")
        text(f"{where}.name", wrapper.get("name") or "")
        text(f"{where}.description", wrapper.get("description") or "")
        boolean(f"{where}.strict", wrapper.get("strict") or False)
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        raise refuse("response_format.json_schema.schema", "a JSON schema expected")
    return schema


def build(
    schema: dict[str, Any] | None, choice: ToolChoice, thinking: bool, tokenizer: TokenizerWrapper
) -> Grammar | None:
    """The grammar of an answer: thoughts where it may think, then JSON of the schema or calls of tools.

    None where anything goes. Raises RequestError naming the field that cannot be followed.
    """
    if schema is None and not choice.forced:
        return None
    if choice.forced and not _writes_calls_as_mimo(tokenizer):
        raise refuse("tool_choice", "auto or none expected: this model does not write calls as MiMo does")

    def marker(tag: str) -> str:
        """llguidance wants a token that was added to the vocabulary by its number, not as the text that it is."""
        token = tokenizer.get_added_vocab().get(tag)
        return json.dumps(tag) if token is None else f"<[{token}]>"

    functions = choice.forced or tuple(tool["function"] for tool in choice.tools or ())
    bodies, lines = [], []
    if schema is not None and not choice.forced:
        bodies.append("answer")
        lines.append(f"answer: %json {_schema(schema)}\n")
    if functions:
        bodies.append("calls")
        lines.append(tool_choice.rules(functions, choice.parallel, marker))
    if thinking:
        lines.append(_thoughts(marker("<think>"), marker("</think>")))
    start = f"start: {'thoughts? ' if thinking else ''}({' | '.join(bodies)})\n"
    return _checked(start + "".join(lines), "tools" if choice.forced else "response_format")


def _writes_calls_as_mimo(tokenizer: TokenizerWrapper) -> bool:
    parser = tokenizer.tool_parser
    return parser is not None and parser.__module__.endswith(".qwen3_coder")


def _schema(schema: dict[str, Any]) -> str:
    try:
        # White space between tokens would let a model go on for ever.
        text = json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})
    except (ValueError, RecursionError) as error:
        raise refuse("response_format", f"not a schema that can be followed: {error}") from None
    if len(text) > 100_000:
        raise refuse("response_format", "a schema of at most 100,000 characters expected")
    return text


def _thoughts(begin: str, end: str) -> str:
    if end.startswith("<["):
        return f"thoughts: {begin} /(?s:.*)/ {end}\n"  # text that holds no such token
    return rf"thoughts: {begin} thought" + "\n" + r"thought[lazy]: /(?s:.*)<\/think>/" + "\n"


def _checked(text: str, name: str) -> Grammar:
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_lark(text)
        fault = LLMatcher.validate_grammar(grammar, None)
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise refuse(name, f"not a schema that can be followed: {_brief(fault)}")
    return Grammar(grammar)


def _brief(fault: str) -> str:
    """llguidance's complaint without the grammar that it prints beneath."""
    return " ".join(fault.partition("\n   1 |")[0].split())[:300]
