"""Anthropic's messages through its own client."""

import anthropic
import pytest
import requests

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
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


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


def test_why_it_ended(claude, script):
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


def test_errors_have_anthropics_form(server, claude):
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", messages=USER, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        create(claude, extra_body={"mcp_servers": []})
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
        create(claude, [{"role": "user", "content": [image]}])
    for body in (b"{", b"[]", b'{"messages": []}', b'{"max_tokens": 5, "messages": [5]}'):
        answer = requests.post(f"{server.url}/v1/messages", data=body, timeout=20)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
