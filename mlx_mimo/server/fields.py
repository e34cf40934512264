"""The fields of a request: each is honoured, or refused by its name. None is silently dropped."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import RequestError

Check = Callable[[str, Any], Any]
MOST_CHOICES = 16
_TEMPLATE_PARAMETERS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


def refuse(name: str, message: str, status: int = 400, code: str | None = None) -> RequestError:
    return RequestError(status, f"{name}: {message}", param=name, code=code)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, f"true or false expected, {_found(value)} found")
    return value


def integer(least: int, most: int) -> Check:
    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise refuse(name, f"a whole number of {least} to {most} expected, {_found(value)} found")
        return value

    return check


def number(least: float, most: float) -> Check:
    def check(name: str, value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not least <= value <= most:  # nor is NaN between them
            raise refuse(name, f"a number of {least:g} to {most:g} expected, {_found(value)} found")
        return float(value)

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refuse(name, f"text expected, {_found(value)} found")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(name, "not valid Unicode: half of a surrogate pair found") from None
    return value


def only(*values: Any) -> Check:
    """A field of which some values ask for nothing beyond what happens anyway."""

    def check(name: str, value: Any) -> Any:
        if not any(value == good and type(value) is type(good) for good in values):
            raise refuse(name, f"{_found(value)} is not supported")
        return value

    return check


def label(name: str, value: Any) -> Any:
    """A field that asks nothing of the answer: names of users, tags."""
    if not isinstance(value, (str, dict)):
        raise refuse(name, f"text or an object expected, {_found(value)} found")
    return value


def known(where: str, value: dict, *names: str) -> None:
    """Refuses what nobody would look at. Null counts as absent, as everywhere."""
    for name in value:
        if name not in names and value[name] is not None:
            raise refuse(f"{where}.{name[:64]}", "this server has no such field", code="unsupported_parameter")


def stop(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > 16:
        raise refuse(name, "text, or a list of at most 16 texts, expected")
    for word in values:
        if not text(name, word) or len(word) > 1000:
            raise refuse(name, "texts of 1 to 1000 characters expected")
    return values


def logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise refuse(name, "an object of at most 1024 token ids expected")
    bias = {}
    for token, amount in value.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise refuse(name, f"a token id expected, {token[:40]!r} found")
        bias[int(token)] = number(-100, 100)(name, amount)
    return bias


def stream_options(name: str, value: Any) -> dict:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise refuse(name, "an object with include_usage expected")
    only(False)(f"{name}.include_obfuscation", value.get("include_obfuscation", False))
    return {"include_usage": boolean(f"{name}.include_usage", value.get("include_usage", False))}


def chat_template_kwargs(name: str, value: Any) -> dict:
    """Variables for the template. What would change how it is applied, or replace it, is not among them."""
    if not isinstance(value, dict) or len(value) > 32:
        raise refuse(name, f"an object expected, {_found(value)} found")
    for key, item in value.items():
        if key in _TEMPLATE_PARAMETERS or not key.isidentifier() or key.startswith("_"):
            raise refuse(f"{name}.{key[:40]}", "may not be set by a request")
        if not isinstance(item, (bool, int, float, str)):
            raise refuse(f"{name}.{key}", "text, a number, true or false expected")
    if "enable_thinking" in value:
        boolean(f"{name}.enable_thinking", value["enable_thinking"])
    return value


_SAMPLING: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(0, 1_000_000),
    "min_p": number(0, 1),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 0.5),
    "repetition_penalty": number(0, 10),
    "repetition_context_size": integer(1, 100_000),
    "presence_penalty": number(-2, 2),
    "presence_context_size": integer(1, 100_000),
    "frequency_penalty": number(-2, 2),
    "frequency_context_size": integer(1, 100_000),
    "logit_bias": logit_bias,
    "seed": integer(0, 2**63 - 1),
    "stop": stop,
    "max_tokens": integer(1, 10_000_000),
    "n": integer(1, MOST_CHOICES),
    "stream": boolean,
    "stream_options": stream_options,
    "user": label,
    "model": text,
}


def table(chat: bool) -> dict[str, Check]:
    """The fields of a chat or text completion; messages, prompt, tools, their choice and formats have checks of their
    own.
    """
    if not chat:
        return _SAMPLING | {
            "prompt": _anything,
            "logprobs": integer(0, 20),
            "echo": only(False),
            "best_of": integer(1, MOST_CHOICES),
            "suffix": only(""),
        }
    return _SAMPLING | {
        "messages": _anything,
        "tools": _anything,
        "tool_choice": _anything,
        "parallel_tool_calls": boolean,
        "response_format": _anything,
        "max_completion_tokens": integer(1, 10_000_000),
        "logprobs": boolean,
        "top_logprobs": integer(0, 20),
        "chat_template_kwargs": chat_template_kwargs,
        "reasoning_effort": only("none", "minimal", "low", "medium", "high"),
        "metadata": label,
        "safety_identifier": label,
        "prompt_cache_key": label,
        "prompt_cache_retention": label,
        "store": only(False),
        "service_tier": only("auto", "default"),
        "modalities": only(["text"]),
        "verbosity": only("medium"),
    }


def _anything(name: str, value: Any) -> Any:
    return value


def read(body: dict, chat: bool) -> dict:
    """The checked values of a request's body; null counts as absent. Raises RequestError naming the field."""
    checks = table(chat)
    values = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in checks:
            raise refuse(name[:64], "this server has no such field", code="unsupported_parameter")
        values[name] = checks[name](name, value)
    if "stream_options" in values and not values.get("stream"):
        raise refuse("stream_options", "only with stream: true")
    if values.get("top_logprobs") is not None and not values.get("logprobs") and chat:
        raise refuse("top_logprobs", "only with logprobs: true")
    if values.get("best_of", 1) not in (1, values.get("n", 1)):
        raise refuse("best_of", "as many as n expected: nothing is thrown away here")
    return values


def _found(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}..."
