"""Fields that cannot be honoured are named, and every refusal is JSON in OpenAI's form and leaves the worker alive."""

import json

import pytest
from support.refusing import GOOD, post, refused

pytestmark = pytest.mark.usefixtures("worker_lives")


FIELDS = {
    "temperature": [-1, 3, "hot", True, 1e400, float("nan"), 10**400, -(10**400)],
    "top_p": [-0.1, 1.1, [], {}, 10**400],
    "top_k": [-1, 1.5, 10**30],
    "min_p": [2],
    "max_tokens": [0, -1, 10**12, 1.5, "5"],
    "max_completion_tokens": [0],
    "n": [0, 17, 10**9, 1.5, "2"],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, 3],  # without stream
    "stop": [5, [5], [""], ["x"] * 17],
    "seed": [-1, 1.5, 10**40],
    "logprobs": [3],
    "top_logprobs": [21, 5],  # 5: without logprobs
    "logit_bias": [{"a": 1}, {"5": 1000}, {"5": 10**400}, {"100000": 1}, [1]],
    "presence_penalty": [9],
    "frequency_penalty": ["x"],
    "repetition_penalty": [-1],
    "tool_choice": [
        "required",
        "maybe",
        {"type": "function", "function": {"name": "f"}},
        {"type": "allowed_tools"},
        {"x": 1},
    ],
    "parallel_tool_calls": ["no", 1],
    "tools": ["x", [5], [{"type": "web_search"}]],
    "response_format": ["json", {"type": "json_schema"}, {"type": "xml"}],
    "chat_template_kwargs": [[], {"enable_thinking": "yes"}, {"tokenize": False}, {"x": {}}, {"thinking": True}],
    "repetition_context_size": [0],
    "presence_context_size": [0],
    "frequency_context_size": [0],
    "store": [True],
    "modalities": [["audio"]],
    "messages": [[], "hi", [5], [{"role": "robot", "content": "x"}], [{"role": "user"}]],
    "functions": [[]],
    "prediction": [{}],
    "draft_model": ["x"],
    "adapters": ["/etc"],
    "role_mapping": [{}],
    "chat_template": ["{{ 1 }}"],
    "made_up": [1],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_honoured_is_named(server, name):
    for value in FIELDS[name]:
        error = refused(post(server, GOOD | {name: value}), 400)
        assert error["param"].startswith(name)
        assert name in error["message"]


HALF = "\ud800"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}


def called(arguments) -> dict:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "1"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "hi", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "x": 1}]}]}, "[0].content[0].x"),
        ({"tools": [{"type": "function", "function": {"name": "f"}, "x": 1}]}, "tools[0].x"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools[0].function.x"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]}, "function.description"),
        ({"messages": [CALL | {"tool_calls": [CALL["tool_calls"][0] | {"x": 1}]}, RESULT]}, "tool_calls[0].x"),
        (
            {"messages": [CALL | {"tool_calls": [{"id": "c", "function": {"name": "f", "x": 1}}]}, RESULT]},
            "messages[0].tool_calls[0].function.x",
        ),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": SCHEMA | {"x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA["json_schema"] | {"x": 1}}}, "schema.x"),
        ({"messages": [CALL, RESULT | {"tool_call_id": "d"}]}, "messages[1].tool_call_id"),
        ({"messages": [CALL, {"role": "tool", "content": "1"}]}, "messages[1].tool_call_id"),
        ({"messages": [CALL, RESULT, RESULT]}, "messages[2].tool_call_id"),
        ({"messages": [RESULT]}, "messages[0].tool_call_id"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}, "x": 1}}, "tool_choice.x"),
        ({"messages": [CALL, *GOOD["messages"], RESULT]}, "messages[2].tool_call_id"),
        ({"messages": [CALL, RESULT | {"name": "g"}]}, "messages[1].name"),
        ({"messages": [CALL | {"tool_calls": [called("{}"), called("{}") | {"id": "d"}]}, RESULT]}, "[1].tool_call_id"),
    ],
)
def test_unknown_keys_are_refused_by_name(server, fields, param):
    assert refused(post(server, GOOD | fields), 400)["param"].endswith(param)


def test_what_clients_send_along_without_effect_is_taken(server):
    message = {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}
    call = CALL["tool_calls"][0] | {"index": 0}
    answer = CALL | {"content": None, "refusal": None, "annotations": [], "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "f", "strict": False}, "cache_control": None}]
    labels = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"}
    body = GOOD | {"messages": [message, answer, RESULT | {"name": "f"}], "tools": tools} | labels
    assert post(server, body).status_code == 200


def test_messages_must_be_text(server):
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    error = refused(post(server, {"messages": [{"role": "user", "content": image}]}), 400)
    assert error["param"] == "messages[0].content[0]"
    half = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert refused(post(server, half), 400)["param"] == "messages[0].content"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL | {"function": {"name": "f", "description": HALF}}]}, "tools[0].function.description"),
        (
            {"tools": [TOOL | {"function": {"name": "f", "parameters": {"properties": {HALF: {}}}}}]},
            "tools[0].function.parameters.properties",
        ),
        ({"chat_template_kwargs": {"enable_thinking": HALF}}, "chat_template_kwargs.enable_thinking"),
        (
            {"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [called({"a": HALF})]}]},
            "messages[1].tool_calls[0].function.arguments.a",
        ),
        (
            {"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [called(json.dumps({"a": HALF}))]}]},
            "messages[1].tool_calls[0].function.arguments.a",
        ),
        ({"stop": [HALF]}, "stop[0]"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_is(server, fields, param):
    error = refused(post(server, GOOD | fields), 400)
    assert error["param"] == param
    assert "surrogate" in error["message"]
    assert post(server, GOOD | {"user": "\ud83d\ude00"}).status_code == 200, "a whole pair is a character"


def test_what_a_template_cannot_compute_with_is_the_requests_fault(server, monkeypatch):
    tokenizer = server.worker.loaded.tokenizer._tokenizer
    for template in ("{{ 1 + 'x' }}", "{{ range(1, 5, 0) }}", "{{ 1 // 0 }}", "{{ messages[9].content.x }}"):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        assert refused(post(server, GOOD), 400)["param"] == "messages"


def nested(depth: int) -> dict:
    value = {"type": "object"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize("depth", [200, 300, 400])
def test_deep_nesting_is_no_server_error(server, depth):
    """Deep enough for some step after the body was read, whichever that is on this Python."""
    schema = {"type": "object", "properties": {"a": nested(depth)}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    answer = [*GOOD["messages"], {"role": "assistant", "tool_calls": [called({"a": nested(depth)})]}]
    schema_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": nested(depth)}}
    for fields in (
        {"tools": tools, "tool_choice": "required"},
        {"messages": answer},
        {"response_format": schema_format},
    ):
        assert post(server, GOOD | fields).status_code in (200, 400)


@pytest.mark.parametrize("name", ["/etc/passwd", "mlx-community/other", "../tiny", "default_model", ""])
def test_no_other_model_is_loaded(server, name, monkeypatch):
    monkeypatch.setattr("mlx_mimo.server.engine.engine_model.load", lambda *_, **__: pytest.fail("loads"))
    error = refused(post(server, GOOD | {"model": name}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_template_variable_cannot_replace_the_template(server):
    error = refused(post(server, GOOD | {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}), 400)
    assert error["param"] == "chat_template_kwargs.chat_template"


def test_the_models_own_template_runs_in_a_sandbox(server, monkeypatch):
    tokenizer = server.worker.loaded.tokenizer._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    error = refused(post(server, GOOD), 400)
    assert "unsafe" in error["message"]


def test_a_prompt_longer_than_the_context_is_refused(server):
    long = [{"role": "user", "content": "x" * 5000}]
    assert refused(post(server, {"messages": long}), 400)["code"] == "context_length_exceeded"
    for name in ("max_tokens", "max_completion_tokens"):
        assert refused(post(server, {"messages": GOOD["messages"], name: 4096}), 400)["param"] == name
    assert refused(post(server, {"prompt": "x" * 5000}, "/v1/completions"), 400)["param"] == "prompt"
