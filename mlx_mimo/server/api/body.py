"""From a body's bytes to a JSON object that may be used anywhere. Knows nothing of models."""

import json
from typing import Any

from ..errors import RequestError


def parse(raw: bytes) -> dict:
    """Raises RequestError: no UTF-8, no JSON, no object, or text in it that is no Unicode."""
    try:
        body = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    if b"\\u" in raw:  # nothing else in UTF-8 can be half of a pair
        check_unicode(body)
    return body


def check_unicode(value: Any, where: str = "") -> None:
    """JSON can write half of a surrogate pair, which no tokenizer takes. Raises RequestError naming the place."""
    waiting = [(where, value)]
    while waiting:
        at, value = waiting.pop()
        if isinstance(value, str):
            _check_text(at, value)
        elif isinstance(value, list):
            waiting += ((f"{at}[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, dict):
            for name, item in value.items():
                _check_text(at, name)
                waiting.append((f"{at}.{name}" if at else name, item))


def _check_text(at: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        at = at or "the body"
        raise RequestError(400, f"{at}: not valid Unicode: half of a surrogate pair found", param=at) from None
