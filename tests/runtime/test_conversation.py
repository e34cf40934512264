"""Conversation: what each turn computes anew, and what it keeps after interrupts, errors and refusals."""

import dataclasses

import mlx.core as mx
import pytest
from support.converted import converted_directory

from mlx_mimo import load
from mlx_mimo.errors import MimoError, UsageError
from mlx_mimo.models.cache import common_length
from mlx_mimo.runtime import conversation as conversation_module
from mlx_mimo.runtime.conversation import Conversation, Stopped

LONG = "a first question of some length, longer than the window of sixteen keys"


@pytest.fixture(scope="module")
def loaded():
    return load(converted_directory(), expert_memory="all")


@pytest.fixture
def conversation(loaded) -> Conversation:
    return Conversation(*loaded)


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


def answer(conversation, text, n=4, **options) -> list:
    return list(conversation.answer(text, max_tokens=n, sampler=greedy, **options))


def tokens_of(responses) -> list[int]:
    return [response.token for response in responses]


def anew(conversation, text) -> list:
    """The answer of a conversation with the same messages and empty caches; `conversation` stays as it is."""
    other = Conversation(conversation.model, conversation.tokenizer, conversation.system, conversation.thinking)
    other.messages = [*conversation.messages]
    return answer(other, text)


def roles(conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


# What is computed anew


def test_a_turn_computes_only_what_differs_from_the_tokens_computed_before(conversation):
    conversation.messages = [{"role": "user", "content": LONG}]
    prompt = conversation.prompt()
    conversation.messages = []
    first = answer(conversation, LONG)
    assert first[0].prompt_tokens == len(prompt)
    held = [*prompt, *tokens_of(first)][: common_length(conversation._cache)]
    assert len(held) == len(prompt) + 3, "all that was said but the last token"
    wanted = anew(conversation, "second")
    found = answer(conversation, "second")
    assert tokens_of(found) == tokens_of(wanted)
    # The answer is text by now, which the tokenizer may cut otherwise than the model said it.
    conversation.messages = conversation.messages[:3]
    shared = next(i for i, pair in enumerate(zip(held, conversation.prompt())) if len(set(pair)) == 2)
    assert shared > len(LONG) / 2
    assert found[0].prompt_tokens == wanted[0].prompt_tokens - shared


def test_a_changed_message_is_computed_from_where_it_differs(conversation):
    answer(conversation, "short", n=3)
    conversation.messages = []
    wanted = anew(conversation, "short, but not the same")
    found = answer(conversation, "short, but not the same")
    assert tokens_of(found) == tokens_of(wanted)
    assert found[0].prompt_tokens < wanted[0].prompt_tokens, "the common beginning was computed again"


def test_caches_that_cannot_be_taken_back_start_anew(conversation, monkeypatch):
    answer(conversation, LONG, n=8)
    conversation.messages = []
    wanted = anew(conversation, "other")
    monkeypatch.setattr(conversation_module, "rollback", lambda caches, n: False)
    found = answer(conversation, "other")
    assert tokens_of(found) == tokens_of(wanted)
    assert found[0].prompt_tokens == wanted[0].prompt_tokens


def test_the_same_prompt_again_computes_its_last_token_alone(conversation):
    first = answer(conversation, LONG)
    conversation.messages = []
    second = answer(conversation, LONG)
    assert tokens_of(first) == tokens_of(second)
    assert second[0].prompt_tokens == 1


def test_clear_drops_turns_and_caches_and_keeps_the_system_message(loaded):
    conversation = Conversation(*loaded, system="Be brief.")
    first = answer(conversation, LONG)
    conversation.clear()
    assert conversation.messages == []
    assert conversation.system == "Be brief."
    again = answer(conversation, LONG)
    assert tokens_of(again) == tokens_of(first)
    assert again[0].prompt_tokens == first[0].prompt_tokens


def test_the_system_message_comes_first_in_the_prompt(loaded):
    _, tokenizer = loaded
    conversation = Conversation(*loaded, system="Be brief.")
    conversation.messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.decode(conversation.prompt())
    assert text.index("Be brief.") < text.index("hello")


# What is kept


def test_a_turn_that_ends_is_the_users_message_and_the_answer(conversation):
    said = "".join(response.text for response in answer(conversation, "hello"))
    assert conversation.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": said},
    ]


def test_a_turn_that_is_closed_keeps_what_was_said(conversation):
    steps = conversation.answer(LONG, max_tokens=20, sampler=greedy)
    said = next(steps).text + next(steps).text
    steps.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    wanted = anew(conversation, "go on")
    found = answer(conversation, "go on")
    assert tokens_of(found) == tokens_of(wanted)
    assert found[0].prompt_tokens < wanted[0].prompt_tokens


def test_a_turn_that_is_never_begun_changes_nothing(conversation):
    conversation.answer("hello", max_tokens=4, sampler=greedy).close()
    assert conversation.messages == []


def test_stopped_while_the_prompt_is_read_takes_the_message_back_and_keeps_its_chunks(conversation):
    def stop(done, total):
        if done >= 16:
            raise Stopped

    assert answer(conversation, LONG, prefill_step_size=8, prompt_progress_callback=stop) == []
    assert conversation.messages == []
    wanted = anew(conversation, LONG)
    found = answer(conversation, LONG)
    assert tokens_of(found) == tokens_of(wanted)
    assert found[0].prompt_tokens == wanted[0].prompt_tokens - 16


class Broken(Exception):
    pass


def failing_layer(monkeypatch, conversation, calls: int) -> None:
    """Makes a layer in the middle raise in its `calls`-th call: the layers before it then hold more tokens."""
    failing = conversation.model.layers[2]
    call, made = type(failing).__call__, []

    def fail(layer, *args, **options):
        if layer is failing:
            made.append(1)
            if len(made) == calls:
                raise Broken
        return call(layer, *args, **options)

    monkeypatch.setattr(type(failing), "__call__", fail)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_exception_in_a_forward_pass_reaches_the_caller_and_the_next_turn_starts_anew(
    conversation, monkeypatch, calls
):
    answer(conversation, "first")
    before = [*conversation.messages]
    wanted = anew(conversation, "second")
    with monkeypatch.context() as patch:
        failing_layer(patch, conversation, calls)
        with pytest.raises(Broken):
            answer(conversation, "second", n=50)
    tokens = max(0, calls - 2)  # the first two calls are the prompt's
    assert roles(conversation)[len(before) :] == (["user", "assistant"] if tokens else [])
    conversation.messages = before
    found = answer(conversation, "second")
    assert tokens_of(found) == tokens_of(wanted)
    assert found[0].prompt_tokens == wanted[0].prompt_tokens, "caches of an interrupted pass were used"


def test_an_exception_of_the_consumer_is_like_closing(conversation):
    with pytest.raises(Broken):  # noqa: PT012
        for _ in conversation.answer(LONG, max_tokens=20, sampler=greedy):
            raise Broken
    wanted = anew(conversation, "second")
    assert tokens_of(answer(conversation, "second")) == tokens_of(wanted)


# What is refused


def test_a_template_that_refuses_the_message_takes_it_back(conversation, monkeypatch):
    answer(conversation, "first")
    before, held = [*conversation.messages], common_length(conversation._cache)

    def refuse(*args, **options):
        raise ValueError("not that")

    with monkeypatch.context() as patch:
        patch.setattr(conversation.tokenizer._tokenizer, "apply_chat_template", refuse)
        with pytest.raises(MimoError, match="the chat template refuses this conversation: not that"):
            answer(conversation, "second")
    assert conversation.messages == before
    assert common_length(conversation._cache) == held
    assert roles(conversation) == ["user", "assistant"]


def test_a_prompt_longer_than_the_context_takes_the_message_back(conversation, monkeypatch):
    answer(conversation, "first")
    before = [*conversation.messages]
    short = dataclasses.replace(conversation.model.args, max_position_embeddings=50)
    monkeypatch.setattr(conversation.model, "args", short)
    with pytest.raises(UsageError, match="fewer than max_position_embeddings = 50 expected"):
        answer(conversation, "a message " * 20)
    assert conversation.messages == before


# Thoughts


def remembered(conversation, text: str) -> dict:
    conversation._remember(text)
    return conversation.messages[-1]


def test_thoughts_are_kept_apart_from_the_answer(conversation):
    assert remembered(conversation, "<think>\nlet me see\n</think>\n\nYes.") == {
        "role": "assistant",
        "reasoning_content": "let me see",
        "content": "Yes.",
    }


def test_a_thought_that_never_ends_is_all_there_is(conversation):
    assert remembered(conversation, "<think>still") == {"role": "assistant", "content": "<think>still"}
