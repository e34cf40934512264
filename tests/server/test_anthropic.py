"""Anthropic's messages through its own client."""

import anthropic
import pytest
import requests
from support.patience import DEADLINE

USER = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "weather",
    "description": "tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>Graz</parameter>\n<parameter=days>3</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def claude(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=DEADLINE)


def create(claude, messages=USER, **options):
    return claude.messages.create(model="tiny", messages=messages, **({"max_tokens": 100} | options))


def test_a_message_and_its_usage(claude, script):
    script.say("good day")
    message = create(claude, system="be polite")
    assert [(block.type, block.text) for block in message.content] == [("text", "good day")]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len("good day") + 1
    script.say("good day")
    again = create(claude, system=[{"type": "text", "text": "be polite"}])
    assert again.usage.cache_read_input_tokens > 0
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == (
        message.usage.input_tokens + message.usage.cache_read_input_tokens
    )


def test_the_stop_reason_says_why_the_message_ended(claude, script):
    script.say("one two three")
    message = create(claude, stop_sequences=["x", "two"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("one ", "stop_sequence", "two")
    script.say("one two three")
    assert create(claude, max_tokens=3).stop_reason == "max_tokens"


def test_a_stream_of_thinking_text_and_a_tool(claude, script):
    script.say(f"<think>let me see</think>I look.{CALL}")
    with claude.messages.stream(
        model="tiny",
        messages=USER,
        max_tokens=300,
        tools=[TOOL],
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "I look."
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[0].thinking == "let me see"
    assert (message.content[2].name, message.content[2].input) == ("weather", {"city": "Graz", "days": 3})
    assert message.stop_reason == "tool_use"


def test_results_of_tools_reach_the_prompt(claude, script):
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Graz"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
    conversation = [*USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    script.say("fine")
    assert create(claude, conversation, tools=[TOOL]).content[0].text == "fine"


USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Graz"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}


@pytest.fixture
def prompts(server, monkeypatch) -> list[str]:
    """What the model is given to read."""
    seen = []
    encoder = server.worker._encoder
    encode = encoder.encode

    def look(prompt):
        encoded = encode(prompt)
        seen.append(encoder.tokenizer.decode(encoded.tokens))
        return encoded

    monkeypatch.setattr(encoder, "encode", look)
    return seen


def test_results_are_in_the_order_of_their_calls_and_failures_are_told(claude, script, prompts):
    uses = [USE, USE | {"id": "t2"}]
    results = [RESULT | {"tool_use_id": "t2", "is_error": True, "content": "no such city"}, RESULT]
    script.say("fine")
    create(claude, [*USER, {"role": "assistant", "content": uses}, {"role": "user", "content": results}])
    assert prompts[0].index("sunny") < prompts[0].index("error: no such city")


def test_an_answer_goes_on_from_what_it_begins_with(server, claude, script, prompts):
    conversation = [*USER, {"role": "assistant", "content": "Once upon"}]
    script.say(" a time")
    message = create(claude, conversation)
    assert message.content[0].text == " a time"
    assert prompts[0].endswith("<|im_start|>assistant\n<think></think>Once upon")
    counted = claude.messages.count_tokens(model="tiny", messages=conversation)
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_what_clients_send_along_without_effect_is_taken(claude, script):
    cached = {"cache_control": {"type": "ephemeral"}}
    said = [{"type": "text", "text": "I look", "citations": None} | cached, USE | cached]
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "hello"} | cached]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": [RESULT | {"is_error": False} | cached]},
    ]
    script.say("fine")
    options = {"metadata": {"user_id": "me"}, "service_tier": "auto", "tools": [TOOL | cached]}
    system = [{"type": "text", "text": "be polite"} | cached]
    assert create(claude, conversation, system=system, **options).content[0].text == "fine"
    script.say("fine")
    message = create(claude)
    back = [*USER, {"role": "assistant", "content": message.content}, *USER]
    script.say("again")
    assert create(claude, back).content[0].text == "again"


ASSISTANT = {"role": "assistant", "content": [USE]}


def results(**block) -> dict:
    return {"role": "user", "content": [RESULT | block]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [USER[0] | {"name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, ".content[0].x"),
        ({"messages": [ASSISTANT, results(x=1)]}, "messages[1].content[0].x"),
        ({"messages": [ASSISTANT, results(is_error="no")]}, "messages[1].content[0].is_error"),
        ({"messages": [ASSISTANT, results(tool_use_id="t9")]}, "messages[1].content[0].tool_use_id"),
        ({"messages": [results()]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [USE | {"x": 1}]}, results()]}, "messages[0].content[0].x"),
        ({"messages": [{"role": "assistant", "content": [USE | {"input": 5}]}, results()]}, "[0].content[0].input"),
        ({"messages": [{"role": "assistant", "content": [USE | {"name": 5}]}, results()]}, "[0].content[0].name"),
        ({"messages": [*USER, ASSISTANT]}, "messages[1].content"),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}], "thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": "all"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "x": 1}}, "thinking.x"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"tools": [TOOL | {"x": 1}]}, "tools[0].x"),
        ({"tools": [TOOL | {"strict": True}]}, "tools[0].strict"),
        ({"tools": [TOOL | {"name": ""}]}, "tools[0].name"),
        ({"tools": [TOOL | {"input_schema": {"properties": 5}}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "x": 1}}, "tool_choice.x"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 10**400}, "top_p"),
        ({"messages": [USER[0] | {"content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": [USE | {"input": {"a": "\ud800"}}]}, results()]}, ".input.a"),
    ],
)
def test_what_cannot_be_honoured_is_named_as_the_client_calls_it(server, fields, named):
    body = {"max_tokens": 5, "messages": USER, "system": "be polite"} | fields
    answer = requests.post(f"{server.url}/v1/messages", json=body, timeout=DEADLINE)
    assert answer.status_code == 400, answer.text
    assert f"{named}: " in answer.json()["error"]["message"]


def test_errors_have_anthropics_form(server, claude):
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", messages=USER, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        create(claude, extra_body={"mcp_servers": []})
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
        create(claude, [{"role": "user", "content": [image]}])
    for body in (b"{", b"[]", b'{"messages": []}', b'{"max_tokens": 5, "messages": [5]}'):
        answer = requests.post(f"{server.url}/v1/messages", data=body, timeout=DEADLINE)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
