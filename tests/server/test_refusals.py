"""Bodies, heads and paths that are none: every refusal is JSON in OpenAI's form and leaves the worker alive."""

import socket
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import requests
from support.patience import DEADLINE, wait_until
from support.refusing import CHAT, GOOD, post, raw, refused

from mlx_mimo.server.http import protocol

pytestmark = pytest.mark.usefixtures("worker_lives")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"messages": NaN}', b"\xff\xfe", b'{"a":' * 100_000, b'"\xed\xa0\x80"']
)
def test_a_body_that_is_no_json_object_is_refused(server, body):
    refused(post(server, body), 400)


def test_bodies_are_limited(server, monkeypatch):
    monkeypatch.setattr(server.app, "limits", replace(server.app.limits, bytes=1000))
    refused(post(server, GOOD | {"user": "x" * 2000}), 413)


@pytest.mark.parametrize("length", [b"-1", b"x", b"1e3", b"99999999999999999999999", "²".encode()])
def test_an_invalid_content_length_is_refused(server, length):
    status, body = raw(
        server, b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\n" % (CHAT.encode(), length)
    )
    assert status in (400, 413)
    assert body["error"]["message"]


def test_the_length_must_be_given_and_true(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    assert raw(server, head + b"\r\n")[0] == 411
    assert raw(server, head + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")[0] == 501
    assert raw(server, head + b"Content-Length: 50\r\n\r\n{}")[0] == 400


def test_a_body_that_comes_too_slowly_is_refused_with_408(server, monkeypatch):
    monkeypatch.setattr(server.app, "limits", replace(server.app.limits, seconds=0.3))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n".encode()
    status, body = raw(server, head + b'{"mess', close_write=False)
    assert (status, body["error"]["type"]) == (408, "invalid_request_error")


@pytest.mark.parametrize("sent", [b"", b"GET /he", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come_is_refused_with_408(server, monkeypatch, sent):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    status, body = raw(server, sent, close_write=False)
    assert status == 408
    assert "head" in body["error"]["message"]


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_target_that_is_no_url_is_refused(server, method):
    status, body = raw(server, method + b" http://[ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
    assert status == 400
    assert "not a path" in body["error"]["message"]


def test_malformed_and_oversized_heads_are_refused(server):
    assert raw(server, b"nonsense\r\n\r\n")[0] == 400
    assert raw(server, b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 501
    assert raw(server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")[0] == 431
    many = b"".join(b"X-%d: y\r\n" % i for i in range(200))
    assert raw(server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")[0] == 431


def test_an_answer_reaches_a_client_that_is_still_sending(server, monkeypatch):
    """The head is refused when its first 64 KiB have come; closing upon the rest would reset the connection."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", DEADLINE)
    monkeypatch.setattr(protocol, "MOST_LINGER_SECONDS", DEADLINE)
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: "
    for size in (70_000, 300_000, 3_000_000, 3_000_000, 12_000_000):
        assert raw(server, head + b"x" * size + b"\r\n\r\n")[0] == 431
    body = b"x" * 3_000_000
    announced = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert raw(server, announced + body)[0] == 404, "the body is not even looked at"


def clients(server) -> set:
    """(address, port) of each open connection."""
    return {connection.client for connection in server.listener.connections}


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_connection_of_a_client_that_never_hangs_up_is_closed(server, monkeypatch, goes_on):
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "MOST_LINGER_SECONDS", 0.6)
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=DEADLINE) as connection:
        assert wait_until(lambda: connection.getsockname() in clients(server))
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):  # the server has nothing more to say, and waits for our end
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200"), answer

        def let_go() -> bool:
            if goes_on:
                try:
                    connection.sendall(b"x")
                except OSError:
                    return True  # closed there
            return connection.getsockname() not in clients(server)

        assert wait_until(let_go)


def test_unknown_paths_are_refused_with_404(server):
    assert refused(requests.get(f"{server.url}/etc/passwd", timeout=DEADLINE), 404)
    assert refused(post(server, GOOD, "/v1/embeddings"), 404)
    assert refused(requests.get(f"{server.url}/v1/models/other", timeout=DEADLINE), 404)


def test_a_method_that_an_endpoint_does_not_have_is_refused_with_those_it_has(server):
    response = requests.get(f"{server.url}{CHAT}", timeout=DEADLINE)
    refused(response, 405)
    assert response.headers["Allow"] == "POST"
    response = requests.post(f"{server.url}/health", timeout=DEADLINE)
    refused(response, 405)
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD"}
