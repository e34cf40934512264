"""Draws the evaluation file: questions that training cannot draw, the same number for every domain and mode."""

import json
from pathlib import Path
from random import Random

import dialogue
import facts
import tasks

PER_CELL = 30  # items for each domain and mode


def _fixed(rng: Random, think: bool, domain: str) -> list[tasks.Turn]:
    """Two questions that people try first."""
    if domain == "arithmetic" and not think:
        return [tasks.Turn("arithmetic", "sum 37 48", "What is 37 + 48?", "85", "")]
    if domain == "counting":
        return [tasks.Turn("counting", "count strawberry", "How many r's are in strawberry?", "3", "")]
    return []


def draw_items() -> list[dict]:
    rng, items = Random("held out"), []
    for domain in tasks.DOMAINS:
        for think in (False, True):
            turns, seen = [], set()
            fixed = _fixed(rng, think, domain)
            while len(turns) < PER_CELL:
                turn = fixed.pop() if fixed else tasks.draw(rng, think, domain, held_out=True)
                if turn.question not in seen:
                    seen.add(turn.question)
                    turns.append(turn)
            drawn = [(turn, _item(rng, turn, think, n)) for n, turn in enumerate(turns)]
            items += [item for turn, item in drawn if not _could_be_trained(turn)]
    return items


def _could_be_trained(turn: tasks.Turn) -> bool:
    """The first two wordings of sums are the same, so a small product asked with them has two keys."""
    product, _, number = turn.key.rpartition(" ")
    if not product.startswith("product ") or number not in ("0", "1") or not turn.question.startswith("What is"):
        return False
    return not all(tasks.is_held_out(tasks.Turn("arithmetic", f"{product} {n}", "", "", "")) for n in (0, 1))


def _item(rng: Random, turn: tasks.Turn, think: bool, number: int) -> dict:
    """Every tenth item has its own system message, every tenth an earlier turn; tools alternate call and answer."""
    after_call = bool(turn.calls) and number % 2 == 1
    messages = dialogue.messages(turn, after_call)
    if number % 10 == 3:
        messages.insert(0, {"role": "system", "content": rng.choice(facts.SYSTEM_PROMPTS)})
    elif number % 10 == 6 and not turn.calls:
        before = tasks.draw(rng, think, turn.domain, held_out=True)
        messages[:0] = [{"role": "user", "content": before.question}, {"role": "assistant", "content": before.answer}]
    item = {
        "id": f"{turn.domain}-{'on' if think else 'off'}-{number}",
        "domain": turn.domain,
        "mode": "on" if think else "off",
        "messages": messages,
        "tools": turn.tools,
        "answer": None,
        "call": None,
    }
    if turn.calls and not after_call:
        name, arguments, _ = turn.calls[0]
        item["call"] = {"name": name, "arguments": arguments}
    else:
        item["answer"] = turn.answer
    return item


def write(path: Path) -> None:
    lines = [json.dumps(item, ensure_ascii=False) for item in draw_items()]
    path.write_text("\n".join(lines) + "\n")
