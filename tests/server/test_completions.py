"""OpenAI's API through its own client."""

import json
from dataclasses import replace

import openai
import pytest
from mlx_lm.tool_parsers.qwen3_coder import parse_tool_call

from mlx_mimo.server.api.deltas import Delta, end_call

USER = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>Graz</parameter>\n<parameter=days>3</parameter>\n"
    "</function>\n</tool_call>"
)


def chat(client, messages=USER, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **({"max_tokens": 8} | options))


def test_the_served_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = chat(client, temperature=0)
    assert whole.usage.completion_tokens == 8
    assert whole.choices[0].finish_reason == "length"
    chunks = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-2].choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 8)


def test_the_next_turn_reads_only_what_is_new(client):
    messages = [{"role": "user", "content": "a question that fills more than one window of sixteen tokens"}]
    first = chat(client, messages, temperature=0, max_tokens=20)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and another"},
    ]
    second = chat(client, messages, temperature=0)
    # Random weights write what no tokenizer would; the prompt itself is reused in any case.
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    again = chat(client, messages, temperature=0)
    assert again.choices[0].message.content == second.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_a_seed_repeats_an_answer_and_another_seed_does_not(client):
    texts = [chat(client, seed=seed, temperature=1).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_of_nothing_takes_the_likeliest(client):
    greedy = chat(client, temperature=0).choices[0].message.content
    assert [chat(client, temperature=1, top_p=0, seed=s).choices[0].message.content for s in (1, 2)] == [greedy] * 2


def test_the_smaller_limit_holds(client):
    for limits in ({"max_tokens": 3, "max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 3}):
        assert chat(client, logit_bias={"256": -100, "258": -100}, **limits).usage.completion_tokens == 3


def test_a_stop_word_ends_the_answer_where_it_begins(client, script):
    script.say("one two three")
    answer = chat(client, stop=["o th", "zzz"], max_tokens=50).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("one tw", "stop")
    script.say("one two three")
    chunks = list(chat(client, stop="o th", max_tokens=50, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one tw"
    script.say("one two th")
    assert chat(client, stop=["three"], max_tokens=50).choices[0].message.content == "one two th"


def test_log_probabilities_are_sorted_and_named(client):
    content = chat(client, temperature=0, max_tokens=3, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    assert len(content) == 3
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 4
        assert entry.logprob == values[0], "greedy takes the most likely"
    chunks = list(chat(client, temperature=0, max_tokens=3, logprobs=True, top_logprobs=4, stream=True))
    streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_reasoning_comes_apart_from_the_answer(client, script):
    script.say("<think>let me see</think>yes")
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    message = chat(client, max_tokens=50, extra_body=kwargs).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("yes", "let me see", "let me see")
    script.say("<think>let me see</think>yes")
    deltas = [chunk.choices[0].delta for chunk in chat(client, max_tokens=50, extra_body=kwargs, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "let me see"
    assert "".join(delta.content or "" for delta in deltas) == "yes"


def test_thinking_changes_the_prompt(client):
    off = chat(client, max_tokens=1).usage.prompt_tokens
    on = chat(client, max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": True}}).usage.prompt_tokens
    assert off == on + 2  # <think></think>


def test_tool_calls_are_parsed_by_the_types_of_their_schema(client, script):
    script.say(f"I look.{CALL}")
    answer = chat(client, tools=[WEATHER], max_tokens=200).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "I look."
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Graz", "days": 3}


def test_streamed_tool_calls_have_their_index(client, script):
    script.say(CALL + CALL)
    chunks = list(chat(client, tools=[WEATHER], max_tokens=300, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_text_between_call_markers_that_is_no_call_stays_in_the_content(client, script):
    script.say("<tool_call>nonsense</tool_call>")
    answer = chat(client, tools=[WEATHER], max_tokens=100).choices[0]
    assert answer.message.content == "<tool_call>nonsense</tool_call>"
    assert answer.finish_reason == "stop"


ODD = {
    "set": ("object", "{1, 2}"),
    "infinite": ("integer", "inf"),
    "not a number": ("object", '{"a": NaN}'),
    "deep": ("object", "[" * 3000),
    "bytes": ("object", "b'x'"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_call_whose_arguments_json_cannot_hold_stays_visible(name):
    kind, value = ODD[name]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": kind}}}}}]
    delta = Delta()
    text = f"<function=f><parameter=a>{value}</parameter></function>"
    end_call(delta, parse_tool_call, text, tools, "</tool_call>")
    assert delta.tool_calls == []
    assert delta.content == f"<tool_call>{text}</tool_call>"


def test_results_of_tools_are_in_the_prompt(client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Graz"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert (
        chat(client, messages, tools=[WEATHER]).usage.prompt_tokens > chat(client, tools=[WEATHER]).usage.prompt_tokens
    )


def test_results_of_tools_come_in_the_order_of_their_calls(server, client, monkeypatch):
    """Whatever order they are sent in: the model is told nothing of ids."""
    prompts = []
    encoder = server.worker._encoder
    encode = encoder.encode

    def seen(prompt):
        encoded = encode(prompt)
        prompts.append(encoder.tokenizer.decode(encoded.tokens))
        return encoded

    monkeypatch.setattr(encoder, "encode", seen)
    calls = [{"id": one, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for one in "ab"]
    results = [{"role": "tool", "tool_call_id": one, "content": f"of {one}"} for one in "ab"]
    for sent in (results, results[::-1]):
        chat(client, [*USER, {"role": "assistant", "tool_calls": calls}, *sent], max_tokens=1)
    assert prompts[0] == prompts[1]
    assert prompts[0].index("of a") < prompts[0].index("of b")


def test_text_completions_take_text_or_token_ids(client):
    options = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    by_text = client.completions.create(prompt="abc", logprobs=2, **options)
    tokens = by_text.choices[0].logprobs
    assert len(tokens.tokens) == len(tokens.token_logprobs) == len(tokens.top_logprobs) == 5
    by_ids = client.completions.create(prompt=[64, 65, 66], **options)
    assert by_ids.usage.prompt_tokens == by_text.usage.prompt_tokens == 3
    chunks = list(client.completions.create(prompt="abc", stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == by_text.choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_followed_even_by_random_weights(client, stream):
    answer_format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    answer = chat(client, response_format=answer_format, max_tokens=60, temperature=1, stream=stream)
    if stream:
        content = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        assert answer.choices[0].finish_reason == "stop"
        content = answer.choices[0].message.content
    pet = json.loads(content)
    assert pet["kind"] in ("cat", "dog")
    assert 0 <= pet["age"] <= 30


def test_json_object_is_an_object(client):
    answer = chat(client, response_format={"type": "json_object"}, logit_bias={"92": 100}, max_tokens=60, temperature=0)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_several_choices_are_several_answers(client):
    answer = chat(client, n=3, seed=5, temperature=1)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    again = chat(client, n=2, seed=5, temperature=1)
    assert [choice.message.content for choice in again.choices] == texts[:2]
    assert chat(client, seed=6, temperature=1).choices[0].message.content == texts[1]


def test_streamed_choices_have_their_index(client):
    whole = chat(client, n=2, seed=5, temperature=1, logprobs=True)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(client, n=2, seed=5, temperature=1, logprobs=True, **options))
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == ["length"]
        streamed = [entry.logprob for part in own for entry in part.logprobs.content]
        assert streamed == pytest.approx([entry.logprob for entry in choice.logprobs.content], abs=1e-3)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_text_completions_have_several_choices_too(client):
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=5, n=2, best_of=2, seed=1, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="abc", max_tokens=5, n=2, best_of=4)


def test_several_choices_take_one_place(server, client, monkeypatch):
    """Else the second could be turned away when the first is done."""
    taken = []
    answer = server.worker._answer

    def seen(*args) -> None:
        taken.append(server.worker.outstanding)
        answer(*args)

    monkeypatch.setattr(server.worker, "limits", replace(server.worker.limits, max_queue=0))
    monkeypatch.setattr(server.worker, "_answer", seen)
    assert len(chat(client, n=3).choices) == 3
    assert taken == [1, 1, 1]


def test_an_answer_in_json_may_follow_thoughts(client, script):
    script.say('<think>a pet</think>{"kind":"cat","age":3}')
    answer_format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    message = chat(client, response_format=answer_format, max_tokens=100, extra_body=kwargs).choices[0].message
    assert (message.reasoning_content, json.loads(message.content)) == ("a pet", {"kind": "cat", "age": 3})
