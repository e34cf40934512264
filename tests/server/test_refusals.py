"""What the server turns away, and that every refusal is JSON in OpenAI's form and leaves the worker alive."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import resource
import socket
import threading
from urllib.parse import urlsplit

import pytest
import requests

from mlx_mimo.errors import UsageError
from mlx_mimo.server import connection as connection_module
from mlx_mimo.server.__main__ import build_parser, complete
from mlx_mimo.server.access import Access
from mlx_mimo.server.errors import RequestError
from mlx_mimo.server.worker import wait_until

GOOD = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
CHAT = "/v1/chat/completions"


def raw(server, data: bytes, close_write: bool = True, timeout: float = 20) -> tuple[int, dict]:
    """Sends bytes as they are; the status and the JSON body that come back."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout) as connection:
        connection.sendall(data)
        if close_write:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError as error:  # answered, and no longer waited for: what it said is still to be read
                if error.errno != errno.ENOTCONN:
                    raise
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def post(server, body, path: str = CHAT, **headers) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(server.url + path, data=data, headers=headers, timeout=60)


@pytest.fixture(autouse=True)
def worker_lives(server):
    yield
    assert server.worker.is_healthy
    assert requests.get(f"{server.url}/health", timeout=20).json() == {"status": "ok"}


def refused(response: requests.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


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
def test_what_nobody_would_look_at_is_named(server, fields, param):
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
    tokenizer = server.worker.model_provider.tokenizer._tokenizer
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
    monkeypatch.setattr("mlx_mimo.server.provider.load", lambda *_, **__: pytest.fail("loads"))
    error = refused(post(server, GOOD | {"model": name}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_template_variable_cannot_replace_the_template(server):
    error = refused(post(server, GOOD | {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}), 400)
    assert error["param"] == "chat_template_kwargs.chat_template"


def test_the_models_own_template_runs_in_a_sandbox(server, monkeypatch):
    tokenizer = server.worker.model_provider.tokenizer._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    error = refused(post(server, GOOD), 400)
    assert "unsafe" in error["message"]


def test_a_prompt_longer_than_the_context_is_refused(server):
    long = [{"role": "user", "content": "x" * 5000}]
    assert refused(post(server, {"messages": long}), 400)["code"] == "context_length_exceeded"
    for name in ("max_tokens", "max_completion_tokens"):
        assert refused(post(server, {"messages": GOOD["messages"], name: 4096}), 400)["param"] == name
    assert refused(post(server, {"prompt": "x" * 5000}, "/v1/completions"), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"messages": NaN}', b"\xff\xfe", b'{"a":' * 100_000, b'"\xed\xa0\x80"']
)
def test_a_body_that_is_no_json_object(server, body):
    refused(post(server, body), 400)


def test_bodies_are_limited(server, monkeypatch):
    monkeypatch.setattr(server.handler, "most_body_bytes", 1000)
    refused(post(server, GOOD | {"user": "x" * 2000}), 413)


@pytest.mark.parametrize("length", [b"-1", b"x", b"1e3", b"99999999999999999999999", "²".encode()])
def test_a_length_that_is_none(server, length):
    status, body = raw(
        server, b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\n" % (CHAT.encode(), length)
    )
    assert status in (400, 413)
    assert body["error"]["message"]


def test_the_length_must_be_given_and_true(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    assert raw(server, head + b"\r\n")[0] == 411
    assert raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")[0] == 411
    assert raw(server, head + b"Content-Length: 50\r\n\r\n{}")[0] == 400


def test_a_slow_sender_is_given_up(server, monkeypatch):
    monkeypatch.setattr(server.handler, "body_seconds", 0.3)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n".encode()
    status, body = raw(server, head + b'{"mess', close_write=False)
    assert (status, body["error"]["type"]) == (408, "invalid_request_error")


@pytest.mark.parametrize("sent", [b"", b"GET /he", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come_is_told_so(server, monkeypatch, sent):
    monkeypatch.setattr(connection_module, "HEAD_SECONDS", 0.3)
    status, body = raw(server, sent, close_write=False)
    assert status == 408
    assert "head" in body["error"]["message"]


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_path_that_is_none(server, method):
    status, body = raw(server, method + b" http://[ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
    assert status == 400
    assert "not a path" in body["error"]["message"]


def test_broken_and_endless_heads(server):
    assert raw(server, b"nonsense\r\n\r\n")[0] == 400
    assert raw(server, b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 501
    assert raw(server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")[0] == 431
    many = b"".join(b"X-%d: y\r\n" % i for i in range(200))
    assert raw(server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")[0] == 431


def test_an_answer_reaches_a_client_that_is_still_sending(server):
    """The head is refused when its first 64 KiB have come; closing upon the rest would reset the connection."""
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: "
    for size in (70_000, 300_000, 3_000_000, 3_000_000, 12_000_000):
        assert raw(server, head + b"x" * size + b"\r\n\r\n")[0] == 431
    body = b"x" * 3_000_000
    announced = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert raw(server, announced + body)[0] == 404, "the body is not even looked at"


def wait_for_an_empty_house(server) -> None:
    """Until the connections of earlier tests are closed."""
    assert wait_until(lambda: server.httpd._room._value == server.httpd.most_connections, 60)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_client_that_never_hangs_up_is_let_go(server, monkeypatch, goes_on):
    monkeypatch.setattr(connection_module, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(connection_module, "MOST_LINGER_SECONDS", 0.6)
    wait_for_an_empty_house(server)
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):  # the server has nothing more to say, and waits for our end
            answer += piece
        assert answer.startswith(b"HTTP/1.0 200"), answer

        def let_go() -> bool:
            if goes_on:
                try:
                    connection.sendall(b"x")
                except OSError:
                    return True  # closed there
            return server.httpd._room._value == server.httpd.most_connections

        assert wait_until(let_go, 60)


def test_unknown_paths(server):
    assert refused(requests.get(f"{server.url}/etc/passwd", timeout=20), 404)
    assert refused(post(server, GOOD, "/v1/embeddings"), 404)
    assert refused(requests.get(f"{server.url}{CHAT}", timeout=20), 404)


# Who may ask


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8080", "192.168.0.7", "[::1"])
def test_another_name_for_this_machine_is_refused(server, host):
    response = requests.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=20)
    assert response.status_code in (400, 403)
    assert response.json()["error"]["message"].startswith("Host")


def test_pages_of_other_sites_are_refused_and_get_no_cors_header(server):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://[", "x", ""):
        response = post(server, GOOD, Origin=origin)
        refused(response, 403)
        assert "Access-Control-Allow-Origin" not in response.headers
        assert requests.options(server.url + CHAT, headers={"Origin": origin}, timeout=20).status_code == 403
    assert "Access-Control-Allow-Origin" not in post(server, GOOD).headers


def allow(server, monkeypatch, **changes) -> None:
    access = dataclasses.replace(server.site.access, **changes)
    monkeypatch.setattr(server, "site", dataclasses.replace(server.site, access=access))


def test_an_allowed_page_is_named_back():
    access = Access("127.0.0.1", allowed_origins=frozenset({"https://mine.example"}))
    access.check_origin("https://mine.example", "localhost:8080")
    access.check_origin("http://localhost:8080", "localhost:8080")
    with pytest.raises(RequestError):
        access.check_origin("http://localhost:9090", "localhost:8080")


@pytest.mark.parametrize("written", ["https://mine.example", "HTTPS://Mine.Example:443/", "https://mine.example/"])
def test_an_allowed_page_may_ask_over_http(server, monkeypatch, written):
    args = build_parser().parse_args(["--allowed-origins", written])
    allow(server, monkeypatch, allowed_origins=frozenset(args.allowed_origins))
    mine = "https://mine.example"
    asked = "authorization,anthropic-version,content-type,x-stainless-os"
    flight = {"Origin": mine, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    answer = requests.options(server.url + CHAT, headers=flight, timeout=20)
    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == mine
    assert answer.headers["Access-Control-Allow-Headers"] == asked
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    answer = post(server, GOOD, Origin=mine)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, mine)
    assert post(server, GOOD | {"n": 0}, Origin=mine).headers["Access-Control-Allow-Origin"] == mine, "errors, too"
    for other in (
        "http://mine.example",
        "https://mine.example:8443",
        "https://me@mine.example",
        "https://mine.example/x",
    ):
        answer = requests.options(server.url + CHAT, headers=flight | {"Origin": other}, timeout=20)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    odd = requests.options(server.url + CHAT, headers=flight | {"Access-Control-Request-Headers": "a: b"}, timeout=20)
    assert odd.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type, x-api-key"


@pytest.mark.parametrize("written", ["mine.example", "MINE.example:8080"])
def test_an_allowed_host_is_one_of_the_servers_names(server, monkeypatch, written):
    def ask(host: str) -> int:
        return requests.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=20).status_code

    assert ask("mine.example") == 403
    args = build_parser().parse_args(["--allowed-hosts", f"other.example, {written}"])
    allow(server, monkeypatch, allowed_hosts=frozenset(args.allowed_hosts))
    assert [ask(host) for host in ("mine.example", "Mine.Example:8080", "other.example")] == [200, 200, 200]
    assert ask("mine.example.evil.example") == 403


@pytest.mark.parametrize(
    "flag", ["--allowed-origins=mine.example", "--allowed-origins=ftp://a", "--allowed-hosts=http://mine.example"]
)
def test_what_is_no_origin_or_host_is_refused_at_the_start(capsys, flag):
    with pytest.raises(SystemExit):
        build_parser().parse_args([flag])
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sésame", " k", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_at_the_start(key):
    with pytest.raises(UsageError, match="--api-key"):
        complete(build_parser().parse_args(["--api-key", key]))


def test_a_wildcard_origin_cannot_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--allowed-origins", "*"])
    assert "name them" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_hosts_want_a_key(host, monkeypatch):
    monkeypatch.delenv("MLX_MIMO_API_KEY", raising=False)
    with pytest.raises(UsageError, match="--api-key"):
        complete(build_parser().parse_args(["--host", host]))
    complete(build_parser().parse_args(["--host", host, "--api-key", "k"]))


def test_the_key_is_asked_for_everywhere_but_on_health(server, monkeypatch):
    allow(server, monkeypatch, api_key="sésame")
    refused(post(server, GOOD), 401)
    refused(post(server, GOOD, Authorization="Bearer wrong"), 401)
    refused(requests.get(f"{server.url}/metrics", timeout=20), 401)
    refused(requests.get(f"{server.url}/v1/models", timeout=20), 401)
    assert requests.get(f"{server.url}/health", timeout=20).status_code == 200
    key = "sésame".encode()
    assert post(server, GOOD, Authorization=b"Bearer " + key).status_code == 401  # read as Latin-1: keys are ASCII
    allow(server, monkeypatch, api_key="sesame")
    assert post(server, GOOD, Authorization="Bearer sesame").status_code == 200
    assert post(server, GOOD, **{"x-api-key": "sesame"}).status_code == 200


def test_the_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    Access("0.0.0.0", "key").check_key({"x-api-key": "key"})
    assert compared == [(b"key", b"key")]


def test_two_hundred_connections(server):
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        bad = GOOD | {"temperature": -1}
        codes = list(pool.map(lambda _: post(server, bad).status_code, range(200)))
    assert codes == [400] * 200


def test_one_connection_too_many_is_told_so(server, monkeypatch):
    wait_for_an_empty_house(server)
    full = threading.BoundedSemaphore(1)
    full.acquire()
    monkeypatch.setattr(server.httpd, "_room", full)
    response = requests.get(f"{server.url}/health", timeout=20)
    refused(response, 503)
    assert response.headers["Retry-After"] == "5"


def test_a_thread_that_cannot_start_takes_no_room(server, monkeypatch):
    wait_for_an_empty_house(server)

    def none_left(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(requests.RequestException):
            requests.get(f"{server.url}/health", timeout=20)
    wait_for_an_empty_house(server)
    assert requests.get(f"{server.url}/health", timeout=20).status_code == 200


def test_more_files_than_select_can_watch(server):
    """Connections get numbers beyond 1,023 then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this system lets a process have fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with contextlib.ExitStack() as stack:
            while (last := stack.enter_context(open(os.devnull))).fileno() < 1100:
                pass
            assert post(server, GOOD).status_code == 200
            assert last.fileno() == 1100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_queue_that_is_full_says_when_to_come_back(server, monkeypatch):
    """One runs, one waits, and every further one is turned away until there is room again."""
    go_on = threading.Event()
    answer = server.worker._answer

    def held(*args) -> None:
        assert go_on.wait(60)
        answer(*args)

    monkeypatch.setattr(server.worker, "max_queue", 1)
    monkeypatch.setattr(server.worker, "_answer", held)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            accepted = []
            for count in (1, 2):
                accepted.append(pool.submit(post, server, GOOD))
                assert wait_until(lambda count=count: server.worker.outstanding == count, 60)
            for _ in range(5):
                full = post(server, GOOD)
                refused(full, 503)
                assert full.headers["Retry-After"] == "5"
        finally:
            go_on.set()
        assert [one.result().status_code for one in accepted] == [200, 200]
    assert post(server, GOOD).status_code == 200
