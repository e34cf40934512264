"""Messages in the chat template's form, which is that of OpenAI's API: what both protocols do with them."""

from itertools import groupby
from typing import Any

from .fields import refuse

MOST_MESSAGES = 2000
MOST_TOOLS = 256


def in_order_of_calls(named: list[tuple[str, dict[str, Any]]], id_field: str = "tool_call_id") -> list[dict[str, Any]]:
    """The messages, given with their places in the request, results of tools in the order of their calls: the order
    alone tells the model which result is whose. Raises RequestError where results do not match the calls.
    """
    ordered: list[dict[str, Any]] = []
    for are_results, group in groupby(named, key=lambda item: item[1]["role"] == "tool"):
        if are_results:
            calls = ordered[-1].get("tool_calls", []) if ordered else []
            ordered += _results(calls, list(group), id_field)
        else:
            ordered += [message for _, message in group]
    return ordered


def _results(
    calls: list[dict[str, Any]], results: list[tuple[str, dict[str, Any]]], id_field: str
) -> list[dict[str, Any]]:
    waiting: list[str | None] = [call["id"] for call in calls]
    placed: dict[int, dict[str, Any]] = {}
    for where, message in results:
        one = message["tool_call_id"]
        if one not in waiting:
            raise refuse(f"{where}.{id_field}", f"{one[:100]!r}: the message before has no call of this id to answer")
        place = waiting.index(one)
        waiting[place] = None
        function = calls[place]["function"]["name"]
        if message.get("name", function) != function:
            raise refuse(f"{where}.name", f"{function[:100]!r} expected, which is what the call with this id calls")
        placed[place] = message
    if len(placed) < len(calls):
        missing = next(one for one in waiting if one is not None)
        raise refuse(f"{results[-1][0]}.{id_field}", f"the result of call {missing[:100]!r} is missing")
    return [placed[place] for place in sorted(placed)]


def check_schema(where: str, parameters: Any) -> None:
    """Raises RequestError where a tool's parameters are no JSON schema of an object; None is a tool without any."""
    if parameters is None:
        return
    properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or not all(isinstance(item, dict) for item in properties.values()):
        raise refuse(where, "a JSON schema of type object expected")
