"""The APIs without a socket and without a model: bodies in, answers out, and what the engine is asked in between."""

import contextlib
import json
import threading
from collections.abc import Iterator

import pytest

from mlx_mimo.checkpoint.directory import Directory, read_config
from mlx_mimo.runtime.load import load_tokenizer
from mlx_mimo.server.api.anthropic import Messages
from mlx_mimo.server.api.openai import ChatCompletions, TextCompletions
from mlx_mimo.server.api.served_model import ServedModel
from mlx_mimo.server.api.service import Service
from mlx_mimo.server.cancellation import Cancellation
from mlx_mimo.server.engine.request import Chat, GenerationRequest, Sampling
from mlx_mimo.server.engine.results import Generation, Progress, Started, Token, TopToken
from mlx_mimo.server.errors import Disconnected, RequestError

USER = [{"role": "user", "content": "hello"}]
CALL = "<tool_call>\n<function=weather>\n<parameter=city>Graz</parameter>\n</function>\n</tool_call>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT, TEXT, MESSAGES = ChatCompletions("test"), TextCompletions("test"), Messages()


class FakeEngine:
    """Says the same to everybody, a character a token, and notes what it was asked."""

    def __init__(self, text: str = "good day", state: str = "normal", fails_after: int | None = None):
        self.text, self.state, self.fails_after = text, state, fails_after
        self.asked: list[GenerationRequest] = []
        self.is_healthy = True
        self.places = 0
        self.running = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        self.places += 1
        yield
        self.places -= 1

    @contextlib.contextmanager
    def generate(self, request: GenerationRequest, cancellation: Cancellation) -> Iterator[Generation]:
        assert self.places == 1, "a place is held"
        self.asked.append(request)
        self.running += 1
        try:
            yield Generation(Started(7, 3, self.state), self._results(cancellation))
        finally:
            self.running -= 1

    def _results(self, cancellation: Cancellation):
        yield Progress(3, 7)
        yield Progress(7, 7)
        for i, character in enumerate(self.text):
            if cancellation.cancelled:
                raise Disconnected
            if i == self.fails_after:
                raise RuntimeError("a step failed")
            top = (TopToken(ord(character), -0.5), TopToken(32, -float("inf")))
            yield Token(character, ord(character), -0.5, None, top)
        yield Token("", 0, -0.1, "stop")

    def count_tokens(self, prompt: Chat) -> int:
        return len(prompt.messages)


@pytest.fixture(scope="module")
def served(model_directory) -> ServedModel:
    tokenizer = load_tokenizer(Directory(model_directory, read_config(model_directory)))
    return ServedModel("tiny", tokenizer, 320, Sampling(temperature=0.7), {"enable_thinking": False})


@pytest.fixture
def answer(served):
    """Asks a new service, and gives the engine too."""

    def ask(api, body, **engine):
        fake = FakeEngine(**engine)
        return Service(fake, lambda: served).answer(api, body, Cancellation()), fake

    return ask


def data_of(pieces) -> list:
    """The events' JSON; the last of OpenAI's is none."""
    lines = [line for piece in pieces for line in piece.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def test_a_chat_completion_in_one_piece(answer):
    whole, engine = answer(CHAT, {"messages": USER, "max_tokens": 20})
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": "good day"}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert (whole["object"], whole["model"], whole["system_fingerprint"]) == ("chat.completion", "tiny", "test")
    assert whole["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 9,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    (asked,) = engine.asked
    assert asked.prompt == Chat(USER)
    assert (asked.max_tokens, asked.sampling) == (20, Sampling(temperature=0.7)), "what is absent is the server's own"
    assert (engine.places, engine.running) == (0, 0)


def test_a_streamed_chat_completion_says_the_same(answer):
    stream, engine = answer(CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}})
    assert next(stream) == b"", "headers may go as soon as the engine has begun"
    assert next(stream) == b": working\n\n", "a comment while the prompt is computed"
    pieces = list(stream)
    *chunks, last, usage = data_of(pieces)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "good day"
    assert last["choices"] == [{"index": 0, "finish_reason": "stop", "delta": {"role": "assistant"}}]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
    assert {chunk["id"] for chunk in (*chunks, last, usage)} == {usage["id"]}
    assert pieces[-1] == b"data: [DONE]\n\n"
    assert (engine.places, engine.running) == (0, 0)


def test_several_choices_have_seeds_of_their_own_and_one_place(answer):
    whole, engine = answer(CHAT, {"messages": USER, "n": 3, "seed": 2**63 - 1})
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [asked.seed for asked in engine.asked] == [2**63 - 1, 0, 1]
    assert whole["usage"]["completion_tokens"] == 27


def test_a_message_in_one_piece_and_as_events(answer):
    body = {"messages": USER, "max_tokens": 20, "system": "be polite", "stop_sequences": ["day"]}
    whole, engine = answer(MESSAGES, body)
    assert whole["content"] == [{"type": "text", "text": "good "}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "day")
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 7
    assert [message["role"] for message in engine.asked[0].prompt.messages] == ["system", "user"]
    stream, _ = answer(MESSAGES, body | {"stream": True})
    events = data_of(stream)
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[1]) == ("message_start", "content_block_start")
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == "good "


def test_a_text_completion_with_log_probabilities(answer):
    whole, engine = answer(TEXT, {"prompt": [1, 2, 3], "logprobs": 2})
    (choice,) = whole["choices"]
    assert choice["text"] == "good day"
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    assert choice["logprobs"]["token_logprobs"][0] == -0.5
    assert min(choice["logprobs"]["top_logprobs"][0].values()) == -9999.0, "JSON has no infinity"
    assert engine.asked[0].prompt == [1, 2, 3]


def test_thoughts_and_calls_in_both_apis(answer):
    text = f"let me see</think>I look.{CALL}"
    tool = {"name": "weather", "parameters": PARAMETERS}
    body = {"messages": USER, "tools": [{"type": "function", "function": tool}], "reasoning_effort": "low"}
    whole, engine = answer(CHAT, body, text=text, state="reasoning")
    (choice,) = whole["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("let me see", "I look.")
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Graz"}
    assert choice["finish_reason"] == "tool_calls"
    assert engine.asked[0].prompt.variables == {"enable_thinking": True}
    body = {
        "messages": USER,
        "max_tokens": 300,
        "tools": [{"name": "weather", "input_schema": PARAMETERS}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    whole, engine = answer(MESSAGES, body, text=text, state="reasoning")
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert (whole["content"][2]["name"], whole["content"][2]["input"]) == ("weather", {"city": "Graz"})
    assert whole["stop_reason"] == "tool_use"
    assert engine.asked[0].prompt.variables == {"enable_thinking": True}


def test_a_forced_call_gives_the_engine_a_grammar(answer):
    tool = {"name": "weather", "parameters": PARAMETERS}
    body = {"messages": USER, "tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    _, engine = answer(CHAT, body, text=CALL)
    body = {"messages": USER, "max_tokens": 300, "tools": [{"name": "weather", "input_schema": PARAMETERS}]}
    _, same = answer(MESSAGES, body | {"tool_choice": {"type": "any"}}, text=CALL)
    assert engine.asked[0].grammar is not None
    assert engine.asked[0].grammar == same.asked[0].grammar


@pytest.mark.parametrize(
    ("api", "body", "param"),
    [
        (CHAT, {"messages": USER, "made_up": 1}, "made_up"),
        (CHAT, {"messages": USER, "model": "other"}, "model"),
        (TEXT, {"prompt": ""}, "prompt"),
        (MESSAGES, {"messages": USER}, "max_tokens"),
    ],
)
def test_a_request_that_cannot_be_honoured_never_reaches_the_engine(served, api, body, param):
    engine = FakeEngine()
    with pytest.raises(RequestError) as refused:
        Service(engine, lambda: served).answer(api, body, Cancellation())
    assert refused.value.param == param
    assert engine.asked == []
    assert param in json.loads(api.error_body(refused.value))["error"]["message"]


def test_nothing_is_answered_without_a_model(served):
    engine = FakeEngine()
    engine.is_healthy = False
    with pytest.raises(RequestError) as refused:
        Service(engine, lambda: served).answer(CHAT, {"messages": USER}, Cancellation())
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})


@pytest.mark.parametrize("api", [CHAT, MESSAGES])
def test_a_failed_step_ends_a_stream_and_leaves_nothing_running(answer, api):
    stream, engine = answer(api, {"messages": USER, "max_tokens": 20, "stream": True}, fails_after=3)
    with pytest.raises(RuntimeError, match="a step failed"):
        list(stream)
    assert engine.running == 0


def test_an_abandoned_stream_cancels_its_generation(answer):
    stream, engine = answer(CHAT, {"messages": USER, "stream": True})
    next(stream)
    assert engine.running == 1
    stream.close()
    assert engine.running == 0


def test_tokens_are_counted_as_the_prompt_that_would_be_asked(served):
    service = Service(FakeEngine(), lambda: served)
    assert service.count_tokens(MESSAGES, {"messages": USER, "system": "be brief"}) == {"input_tokens": 2}


def test_a_cancellation_calls_each_registered_callback_once():
    cancellation, heard = Cancellation(), []
    with cancellation.calling(lambda: heard.append("early")):
        pass
    with cancellation.calling(lambda: heard.append("first")):
        threads = [threading.Thread(target=cancellation.cancel) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with cancellation.calling(lambda: heard.append("late")):
        assert cancellation.cancelled
    assert heard == ["first", "late"]
