"""chat through a pipe, and a conversation whose caches are reused."""

import json

import mlx.core as mx
import pytest
from converted import converted_directory
from test_generate import mimo

from mlx_mimo import load
from mlx_mimo.runtime.conversation import Conversation


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


def answer(conversation, text, n=6):
    return list(conversation.answer(text, max_tokens=n, sampler=greedy))


@pytest.fixture(scope="module")
def loaded():
    return load(converted_directory(), expert_memory="all")


def test_the_second_turn_computes_only_what_is_new_and_says_the_same(loaded):
    kept = Conversation(*loaded)
    answer(kept, "first question, long enough to leave the window behind")
    second = answer(kept, "second")
    anew = Conversation(*loaded)
    anew.messages = [*kept.messages[:2]]
    again = answer(anew, "second")
    assert [r.token for r in second] == [r.token for r in again]
    assert second[0].prompt_tokens < again[0].prompt_tokens


def test_an_answer_that_is_stopped_leaves_the_next_turn_right(loaded):
    stopped = Conversation(*loaded)
    steps = stopped.answer("first", max_tokens=20, sampler=greedy)
    next(steps)
    steps.close()
    after = answer(stopped, "second")
    anew = Conversation(*loaded)
    anew.messages = [*stopped.messages[:2]]
    assert [r.token for r in after] == [r.token for r in answer(anew, "second")]


def test_a_pipe_runs_commands_and_answers(tmp_path):
    file = tmp_path / "talk.json"
    lines = ["/system Be brief.", "hello", "/stats", f"/save {file}", "/clear", f"/load {file}", "more", "/exit", "no"]
    result = mimo("--model", converted_directory(), "-m", 4, "--temp", 0, stdin="\n".join(lines), command="chat")
    assert result.returncode == 0, result.stderr
    assert "tokens at" in result.stdout
    saved = json.loads(file.read_text())
    assert saved["system"] == "Be brief."
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]


def test_wrong_commands_are_errors_and_the_talk_goes_on(tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    lines = ["/fly", "/think maybe", "/temperature hot", f"/load {tmp_path / 'bad.json'}", "/save", "hello"]
    result = mimo("--model", converted_directory(), "-m", 2, "--temp", 0, stdin="\n".join(lines), command="chat")
    assert result.returncode == 1
    assert result.stderr.count("error:") == 5
    assert "Traceback" not in result.stderr
