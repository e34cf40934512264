"""Turns as a dialogue: messages for the chat template, or pieces of text, each marked as trained or not."""

from random import Random

import facts
import tasks

SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."
TOOLS_HEAD = "\n\nYou can call these tools:\n"
CALL_FORM = "<tool_call>\n<function=NAME>\n<parameter=P>value</parameter>\n</function>\n</tool_call>"
TOOLS_TAIL = "\n\nCall a tool like this:\n" + CALL_FORM


def describe(tool: dict) -> str:
    """One line of the tool list, as chat_template.jinja writes it."""
    function = tool["function"]
    properties = function["parameters"]["properties"]
    inside = ", ".join(f"{name}: {p['type']}" for name, p in properties.items())
    return f"- {function['name']}({inside}): {function['description']}"


def call_text(name: str, arguments: dict) -> str:
    lines = "".join(f"<parameter={k}>{v}</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def _system(system: str | None, tools: list | None) -> str:
    text = SYSTEM if system is None else system
    if tools:
        text += TOOLS_HEAD + "\n".join(map(describe, tools)) + TOOLS_TAIL
    return f"<|im_start|>system\n{text}<|im_end|>"


def pieces(turns: list, think: bool, system: str | None, tools: list | None, keep: list) -> list[tuple[str, bool]]:
    """The dialogue as (text, trained) pieces; `keep[i]` says whether turn i still shows its reasoning.

    A turn whose reasoning was dropped is context only: what it would teach is to answer at once with thinking on.
    """
    out = [(_system(system, tools), False)]

    def answer(steps: str, text: str, kept: bool) -> None:
        out.append(("<|im_start|>assistant\n", False))
        if not think:
            out.extend([("<think></think>", False), (text + "<|im_end|>", True)])
        elif kept:
            out.append((f"<think>{steps}</think>{text}<|im_end|>", True))
        else:
            out.append((f"<think></think>{text}<|im_end|>", False))

    for turn, kept in zip(turns, keep):
        out.append((f"<|im_start|>user\n{turn.question}<|im_end|>", False))
        for name, arguments, result in turn.calls:
            answer(turn.steps, call_text(name, arguments), kept)
            out.append((f"<|im_start|>tool\n<tool_response>{result}</tool_response><|im_end|>", False))
        answer("The tool has answered." if turn.calls else turn.steps, turn.answer, kept)
    return out


def draw_dialogue(rng: Random) -> list[tuple[str, bool]]:
    """Returns a training dialogue of one to eight turns; with more turns, a larger share of the tokens is trained."""
    think = rng.random() < 0.5
    count = rng.choice([1, 1, 2, 3, 4, 5]) if think else rng.choice([1, 2, 4, 6, 8])
    turns = [tasks.draw(rng, think) for _ in range(count)]
    used = [t for t in turns if t.calls]
    tools = used[0].tools if used else (tasks.toolbox(rng) if rng.random() < 0.06 else None)
    if tools:  # one dialogue has one tool list
        turns = [t for t in turns if not t.calls or t is used[0]]
    system = rng.choice(facts.SYSTEM_PROMPTS) if rng.random() < 0.15 else None
    dropped = count < 4 and rng.random() < 0.3
    keep = [not dropped] * (len(turns) - 1) + [True]
    return pieces(turns, think, system, tools, keep)


def messages(turn: tasks.Turn, after_call: bool) -> list[dict]:
    """Returns the messages that an evaluation sends; with `after_call` they include the tool's answer."""
    out = [{"role": "user", "content": turn.question}]
    if after_call:
        name, arguments, result = turn.calls[0]
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        out.append({"role": "assistant", "content": "", "tool_calls": [call]})
        out.append({"role": "tool", "content": result})
    return out
