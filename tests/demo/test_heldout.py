"""The held-out file covers every domain, and training never sees its questions."""

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mlx_mimo" / "demo"
sys.path.insert(0, str(ROOT / "examples" / "demo_model"))

import dialogue  # noqa: E402
import evaluate  # noqa: E402
import tasks  # noqa: E402

ITEMS = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO / "checkpoint" / "tokenizer.json"))


def test_every_domain_is_asked_in_both_modes():
    cells = Counter((item["domain"], item["mode"]) for item in ITEMS)
    assert len(ITEMS) >= 300
    assert set(cells) == {(domain, mode) for domain in tasks.DOMAINS for mode in ("on", "off")}
    assert min(cells.values()) >= 20


def test_no_held_out_question_is_drawn_for_training():
    questions = {m["content"] for item in ITEMS for m in item["messages"] if m["role"] == "user"}
    assert "What is 37 + 48?" in questions
    rng = Random(5)
    drawn = {tasks.draw(rng, think=rng.random() < 0.5).question for _ in range(12_000)}
    assert len(drawn) > 6_000
    assert not drawn & questions


def test_training_writes_dialogues_as_the_template_does():
    """The pieces that training joins equal the template's text for the same messages."""
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    rng = Random(11)
    for number in range(60):
        think = number % 2 == 0
        turn = tasks.draw(rng, think, "tools" if number % 3 == 0 else None)
        messages = dialogue.messages(turn, after_call=bool(turn.calls))
        if think and turn.calls:
            messages[1]["reasoning"] = turn.steps
        messages.append({"role": "assistant", "content": turn.answer})
        if think:
            messages[-1]["reasoning"] = "The tool has answered." if turn.calls else turn.steps
        joined = "".join(text for text, _ in dialogue.pieces([turn], think, None, turn.tools, [True]))
        assert joined == template.apply_chat_template(messages, tools=turn.tools, tokenize=False)


def test_tokens_give_back_the_text(tokenizer):
    for item in ITEMS:
        text = json.dumps(item["messages"], ensure_ascii=False)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    for text in ("naïve 🙂 tabs\tand\n\nlines  ", "<|im_start|>user\n1<|im_end|><think></think>"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_and_tags_are_single_tokens(tokenizer):
    assert tokenizer.encode("3748").tokens == ["3", "7", "4", "8"]
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer.encode(tag).tokens == [tag]


def test_a_tool_call_survives_writing_and_parsing():
    name, arguments = "get_weather", {"city": "New Delhi", "unit": "K"}
    text = dialogue.call_text(name, arguments)
    assert evaluate.parse_call(text) == {"name": name, "arguments": arguments}
    assert evaluate.parse_call(text + text) is None
    assert evaluate.parse_call(text.replace("</function>", "")) is None


def test_only_the_exact_answer_counts():
    item = {"mode": "off", "call": None, "answer": "85"}
    assert evaluate.is_right(item, "85<|im_end|>")
    assert not evaluate.is_right(item, "185")
    thinking = {**item, "mode": "on"}
    assert evaluate.is_right(thinking, "<think>30 + 40</think>85")
    assert not evaluate.is_right(thinking, "85"), "a model told to think must think"
