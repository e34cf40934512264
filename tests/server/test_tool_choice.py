"""Calls that must come, must not, or come alone; asked for with both clients."""

import json

import anthropic
import openai
import pytest
from llguidance import LLMatcher
from support.patience import DEADLINE

from mlx_mimo.checkpoint.directory import Directory, read_config
from mlx_mimo.runtime.load import load_tokenizer
from mlx_mimo.server.api import grammar, tool_choice
from mlx_mimo.server.engine.grammar import Grammar, lexer
from mlx_mimo.server.errors import RequestError

USER = [{"role": "user", "content": "hello"}]
LAMP = {
    "type": "object",
    "properties": {
        "room": {"type": "string", "enum": ["hall", "kitchen"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
        "warm": {"type": "boolean"},
    },
    "required": ["room", "level"],
}
DOOR = {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"]}
TOOLS = [
    {"type": "function", "function": {"name": "lamp", "description": "sets a lamp", "parameters": LAMP}},
    {"type": "function", "function": {"name": "door", "parameters": DOOR}},
]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def call(name: str, **arguments: str) -> str:
    parameters = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def chat(client, **options):
    options = {"max_tokens": 400, "temperature": 1, "tools": TOOLS} | options
    return client.chat.completions.create(model="tiny", messages=USER, **options)


def check_lamp(arguments: dict) -> None:
    assert arguments["room"] in ("hall", "kitchen")
    assert 0 <= arguments["level"] <= 9
    assert arguments.keys() <= {"room", "level", "warm"}
    assert isinstance(arguments.get("warm", True), bool)


# The grammar alone


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return load_tokenizer(Directory(model_directory, read_config(model_directory)))


def fits(tokenizer, made: Grammar, text: str) -> bool:
    """Whether the whole text, and then the end, may be said."""
    matcher = LLMatcher(lexer(tokenizer, 320), made.text)
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return matcher.validate_tokens(tokens) == len(tokens)


GOOD_LAMP = call("lamp", room="hall", level="3")


def test_a_call_that_must_come_is_one_that_fits_its_schema(tokenizer):
    made = grammar.build(None, tool_choice.read(TOOLS, "required"), False, tokenizer)
    door = call("door", open="true")
    for good in (GOOD_LAMP, call("lamp", room="kitchen", level="0", warm="false"), door, f"{GOOD_LAMP}\n{door}"):
        assert fits(tokenizer, made, good)
    for bad in (
        "hello",
        "",
        f"well: {door}",
        f"{door} done",
        call("lamp", room="hall"),
        call("lamp", room="cellar", level="3"),
        call("lamp", room="hall", level="30"),
        call("lamp", room="hall", level="3", colour="red"),
        call("window", open="true"),
        f"<think>hm</think>{door}",
    ):
        assert not fits(tokenizer, made, bad), bad


def test_a_named_function_is_called_once(tokenizer):
    choice = tool_choice.read(TOOLS, {"type": "function", "function": {"name": "lamp"}})
    made = grammar.build(None, choice, False, tokenizer)
    assert choice.tools == TOOLS, "the model is told of all"
    assert fits(tokenizer, made, GOOD_LAMP)
    assert not fits(tokenizer, made, call("door", open="true"))
    assert not fits(tokenizer, made, f"{GOOD_LAMP}\n{GOOD_LAMP}")


def test_it_may_think_before(tokenizer):
    made = grammar.build(None, tool_choice.read(TOOLS, "required"), True, tokenizer)
    assert fits(tokenizer, made, f"<think>a lamp\n\nor a door?</think>{GOOD_LAMP}")
    assert fits(tokenizer, made, GOOD_LAMP)
    assert not fits(tokenizer, made, "<think>a lamp</think>no")


def test_text_goes_up_to_its_closing_tag_and_values_that_are_not_text_are_json(tokenizer):
    parameters = {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "any": {},
            "at": {"type": "array", "items": {"$ref": "#/$defs/place"}},
        },
        "required": ["text", "any", "at"],
        "$defs": {"place": {"type": "integer"}},
    }
    tools = [{"type": "function", "function": {"name": "note", "parameters": parameters}}, *TOOLS]
    made = grammar.build(None, tool_choice.read(tools, "required"), False, tokenizer)
    assert fits(tokenizer, made, call("note", text="a <b> \n\n</p> é {", any="", at="[1,2]"))
    assert not fits(tokenizer, made, call("note", text="a", any="b", at='["x"]'))


def test_an_answer_in_json_may_still_call_a_tool_or_think(tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    made = grammar.build(schema, tool_choice.read(TOOLS, "auto"), True, tokenizer)
    for good in ('{"a":1}', f"<think>x</think>{GOOD_LAMP}", '<think>x</think>{"a":1}'):
        assert fits(tokenizer, made, good)
    for bad in ("text", '{"a":"b"}', '{"a":1}' + GOOD_LAMP):
        assert not fits(tokenizer, made, bad)


def test_what_cannot_be_forced_is_named(tokenizer):
    def tools(name: str, parameters: dict) -> list[dict]:
        return [{"type": "function", "function": {"name": name, "parameters": parameters}}]

    for broken in (
        tools("two words", {}),
        tools("f", {"properties": {"a b": {"type": "string"}}}),
        tools("f", {"properties": {"a": {"type": "array", "items": {"type": "frog"}}}}),
        tools("f", {"properties": {"a": {"type": "object", "$ref": "#/nowhere"}}}),
        tools("f", {"required": 5}),
        tools("f", {"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    ):
        with pytest.raises(RequestError) as refused:
            grammar.build(None, tool_choice.read(broken, "required"), False, tokenizer)
        assert (refused.value.status, refused.value.param) == (400, "tools")


# Through OpenAI's client


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_something_even_with_random_weights(client, stream):
    answer = chat(client, tool_choice="required", parallel_tool_calls=False, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [one for chunk in chunks for one in chunk.delta.tool_calls or []]
        content = "".join(chunk.delta.content or "" for chunk in chunks)
        reason = chunks[-1].finish_reason
    else:
        calls, content = answer.choices[0].message.tool_calls, answer.choices[0].message.content
        reason = answer.choices[0].finish_reason
    assert (reason, content or "") == ("tool_calls", "")
    (one,) = calls
    arguments = json.loads(one.function.arguments)
    if one.function.name == "lamp":
        check_lamp(arguments)
    else:
        assert one.function.name == "door"
        assert isinstance(arguments["open"], bool)


def test_a_function_that_is_named_is_called(client):
    for seed in range(3):
        choice = {"type": "function", "function": {"name": "lamp"}}
        (one,) = chat(client, tool_choice=choice, seed=seed).choices[0].message.tool_calls
        assert one.function.name == "lamp"
        check_lamp(json.loads(one.function.arguments))


def test_none_neither_shows_tools_nor_reads_calls(client, script):
    bare = client.chat.completions.create(model="tiny", messages=USER, max_tokens=1).usage.prompt_tokens
    assert chat(client, max_tokens=1).usage.prompt_tokens > bare
    script.say(GOOD_LAMP)
    answer = chat(client, tool_choice="none")
    assert answer.usage.prompt_tokens == bare
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == GOOD_LAMP


def test_thoughts_come_before_a_call_that_must_come(client, script):
    script.say(f"<think>a lamp</think>{GOOD_LAMP}\n{GOOD_LAMP}")
    answer = chat(client, tool_choice="required", extra_body=THINK).choices[0]
    assert answer.message.reasoning_content == "a lamp"
    assert len(answer.message.tool_calls) == 2
    assert answer.message.content is None, "line breaks between calls are nobody's content"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_may_not_be_parallel_end_with_the_first(client, script, stream):
    script.say(f"I do. {GOOD_LAMP}\n{call('door', open='true')} and more", end=False)
    answer = chat(client, parallel_tool_calls=False, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        names = [one.function.name for chunk in chunks for one in chunk.delta.tool_calls or []]
        content, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        choice = answer.choices[0]
        names = [one.function.name for one in choice.message.tool_calls]
        content, reason = choice.message.content, choice.finish_reason
    assert (names, content, reason) == (["lamp"], "I do. ", "tool_calls")


def test_a_call_that_was_cut_short_is_shown_as_it_is(client, script):
    script.say(GOOD_LAMP)
    answer = chat(client, tool_choice="required", max_tokens=30).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls is None
    assert answer.message.content.startswith("<tool_call>\n<function=lamp>")
    assert "</tool_call>" not in answer.message.content


def test_words_after_a_call_keep_their_spaces(client, script):
    script.say(f"{GOOD_LAMP}\n\nas  you wish")
    answer = chat(client).choices[0]
    assert (answer.message.content, len(answer.message.tool_calls)) == ("as  you wish", 1)


# Through Anthropic's


@pytest.fixture(scope="module")
def claude(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=DEADLINE)


LAMP_TOOL = {"name": "lamp", "description": "sets a lamp", "input_schema": LAMP}


def ask(claude, **options):
    options = {"max_tokens": 400, "tools": [LAMP_TOOL, {"name": "door", "input_schema": DOOR}]} | options
    return claude.messages.create(model="tiny", messages=USER, extra_body={"temperature": 1}, **options)


def test_tool_choice_any_and_tool_force_a_call(claude):
    message = ask(claude, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["tool_use"]
    message = ask(claude, tool_choice={"type": "tool", "name": "lamp"})
    (block,) = message.content
    assert (block.type, block.name) == ("tool_use", "lamp")
    check_lamp(block.input)


def test_a_streamed_tool_that_must_be_called(claude):
    choice = {"type": "tool", "name": "lamp"}
    with claude.messages.stream(
        model="tiny", messages=USER, max_tokens=400, tools=[LAMP_TOOL], tool_choice=choice
    ) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    check_lamp(block.input)


def test_tool_choice_none_reads_no_calls_in_anthropics_api(claude, script):
    script.say(GOOD_LAMP)
    message = ask(claude, tool_choice={"type": "none"})
    assert [(block.type, block.text) for block in message.content] == [("text", GOOD_LAMP)]


def test_choices_that_make_no_sense_are_refused(claude, client):
    for choice in ({"type": "tool", "name": "window"}, {"type": "tool"}, {"type": "sometimes"}):
        with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
            ask(claude, tool_choice=choice)
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        ask(claude, tools=[], tool_choice={"type": "any"})
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, tool_choice={"type": "function", "function": {"name": "window"}})
    assert refused.value.param == "tool_choice"


def test_the_tokens_of_a_message_are_counted_without_generating(claude, server, script):
    before = server.site.metrics.tokens._value.get()
    options = {"model": "tiny", "messages": USER, "system": "be brief", "tools": [LAMP_TOOL]}
    count = claude.messages.count_tokens(**options).input_tokens
    assert server.site.metrics.tokens._value.get() == before
    script.say("yes")
    used = claude.messages.create(max_tokens=5, **options).usage
    assert count == used.input_tokens + used.cache_read_input_tokens
    thinking = claude.messages.count_tokens(**options, thinking={"type": "enabled", "budget_tokens": 1024})
    assert thinking.input_tokens == count - 2  # <think></think>
    long = [{"role": "user", "content": "x" * 9000}]
    assert claude.messages.count_tokens(model="tiny", messages=long).input_tokens > 9000
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        claude.messages.count_tokens(model="tiny", messages=[{"role": "robot", "content": "x"}])
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.count_tokens(model="other", messages=USER)
