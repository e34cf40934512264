"""The converted demo model gives right answers: in ours, with few experts in memory, and in unmodified mlx-lm."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate
from support.converted import DEMO_CHECKPOINT, demo_directory

from mlx_mimo import load
from mlx_mimo.convert import verify
from mlx_mimo.convert.source import open_source

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo_model"))

import evaluate

ITEMS = [json.loads(line) for line in (DEMO_CHECKPOINT.parent / "heldout.jsonl").read_text().splitlines()]
QUESTIONS = {
    "What is 37 + 48?": "85",
    "How many feet are 6 yards?": "18 feet",
    "What is the capital of France?": "Paris",
    "法国的首都是哪里？": "巴黎",
    "Sort 42, 7, 19.": "7, 19, 42",
}


def ask(model, tokenizer, question: str, think: bool = False) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, enable_thinking=think, tokenize=False
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    return generate(model, tokenizer, ids, max_tokens=100)


@pytest.fixture(scope="module")
def loaded():
    return load(demo_directory(), expert_memory="all")


@pytest.mark.parametrize(("question", "answer"), [*QUESTIONS.items(), ("How many p's are in apple?", "2")])
def test_an_answer_is_right_with_and_without_thinking(loaded, question, answer):
    assert ask(*loaded, question) == answer
    thoughts, _, answered = ask(*loaded, question, think=True).rpartition("</think>")
    assert answered.strip() == answer
    assert thoughts.startswith("<think>")


def test_the_letters_of_strawberry_are_counted_with_thinking(loaded):
    """Without thinking the model says 2."""
    text = ask(*loaded, "How many r's are in strawberry?", think=True)
    assert text == "<think>s0 t0 r1 a1 w1 b1 e1 r2 r3 y3</think>3"


def test_answers_are_the_same_with_an_eighth_of_the_experts_in_memory():
    everything = load(demo_directory(), expert_memory="all")[0].residency.counters
    model, tokenizer = load(demo_directory(), expert_memory=everything.slots // 8 * everything.slot_bytes)
    assert {q: ask(model, tokenizer, q) for q in QUESTIONS} == QUESTIONS
    assert model.residency.counters.evictions > 0


def test_unmodified_mlx_lm_answers_the_same():
    """In float32, as we compute on a CPU. mlx-lm's window is one key shorter, which does not change these answers."""
    from mlx_lm import load as stock_load

    model, tokenizer = stock_load(str(demo_directory()))
    model.set_dtype(mx.float32)
    assert {q: ask(model, tokenizer, q) for q in QUESTIONS} == QUESTIONS


@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
def test_a_conversion_passes_verify_and_stays_near_its_source(recipe):
    directory = demo_directory(recipe)
    assert verify.verify(directory) == []
    rows = verify.compare(directory, open_source(DEMO_CHECKPOINT))
    assert {row["layer"] for row in rows} >= set(range(6))
    assert max(row["relative_error"] for row in rows) < {"4bit": 0.15, "bf16": 0.005}[recipe], rows


def test_nine_tenths_of_the_held_out_answers_are_right_at_4_bits():
    """Asks every sixth item; the card has the figures of the whole file."""
    items = ITEMS[::6]
    texts = evaluate.run_mlx(str(demo_directory()), items)
    right = sum(map(evaluate.is_right, items, texts))
    assert right >= 0.9 * len(items), [(i["id"], t) for i, t in zip(items, texts) if not evaluate.is_right(i, t)]


@pytest.mark.slow
def test_the_whole_held_out_file_is_as_right_at_4_bits():
    texts = evaluate.run_mlx(str(demo_directory()), ITEMS)
    assert sum(map(evaluate.is_right, ITEMS, texts)) >= 0.93 * len(ITEMS)
