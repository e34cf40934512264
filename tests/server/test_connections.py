"""Connections that are kept alive, many of them, and a queue that is full: each request is answered."""

import concurrent.futures
import contextlib
import json
import os
import resource
import socket
import threading
from dataclasses import replace
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import requests
from support.patience import DEADLINE, wait_until
from support.refusing import CHAT, GOOD, post, raw, refused

from mlx_mimo.server.http import protocol

pytestmark = pytest.mark.usefixtures("worker_lives")


def connected(server) -> HTTPConnection:
    parts = urlsplit(server.url)
    return HTTPConnection(parts.hostname, parts.port, timeout=DEADLINE)


def test_a_connection_serves_one_request_after_another(server):
    with contextlib.closing(connected(server)) as connection:
        connection.connect()
        place = connection.sock.getsockname()
        for body, status in ((json.dumps(GOOD), 200), ("{", 400), (json.dumps(GOOD | {"stream": True}), 200)):
            connection.request("POST", CHAT, body)
            answer = connection.getresponse()
            assert (answer.status, answer.version) == (status, 11)
            answer.read()
            assert connection.sock.getsockname() == place, "it is the same connection"


def test_small_pieces_are_sent_without_delay(server):
    """Else a client that keeps its connection waits 40 ms for each answer's body."""
    with contextlib.closing(connected(server)) as connection:
        connection.request("GET", "/health")
        connection.getresponse().read()
        (own,) = [one for one in server.listener.connections if one.client == connection.sock.getsockname()]
        accepted = own.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_body_that_was_not_read_closes_the_connection(server):
    """What is left of it would be taken for the next request."""
    with contextlib.closing(connected(server)) as connection:
        connection.request("POST", "/nowhere", json.dumps(GOOD))
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Connection"]) == (404, "close")


def test_requests_that_are_sent_at_once_are_answered_in_turn(server):
    head = "GET {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"
    with contextlib.closing(connected(server)) as connection:
        connection.connect()
        both = head.format("/health", "") + head.format("/v1/models", "Connection: close\r\n")
        connection.sock.sendall(both.encode())
        answer = b""
        while piece := connection.sock.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b'"status"') < answer.index(b'"object"')


def test_a_chunked_body_is_read_within_the_same_limits(server, monkeypatch):
    def pieces():
        data = json.dumps(GOOD | {"user": "x" * 5000}).encode()
        yield from (data[start : start + 1000] for start in range(0, len(data), 1000))

    assert requests.post(server.url + CHAT, data=pieces(), timeout=DEADLINE).status_code == 200
    monkeypatch.setattr(server.app, "limits", replace(server.app.limits, bytes=3000))
    refused(requests.post(server.url + CHAT, data=pieces(), timeout=DEADLINE), 413)


def test_a_client_that_ends_its_side_and_reads_gets_its_answer(server):
    body = json.dumps(GOOD | {"temperature": -1}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    assert raw(server, head.encode() + body)[0] == 400


def test_waiting_requests_do_not_delay_other_endpoints(server, monkeypatch):
    """Each has a thread of its own: were they taken from a pool, those that wait would use it up."""
    go_on = threading.Event()
    answer = server.worker._answer

    def held(*args) -> None:
        assert go_on.wait(60)
        answer(*args)

    monkeypatch.setattr(server.worker, "limits", replace(server.worker.limits, max_queue=100))
    monkeypatch.setattr(server.worker, "_answer", held)
    with concurrent.futures.ThreadPoolExecutor(80) as pool:
        try:
            waiting = [pool.submit(post, server, GOOD) for _ in range(80)]
            assert wait_until(lambda: server.worker.outstanding == 80)
            for path in ("/health", "/metrics", "/v1/models", "/residency"):
                assert requests.get(server.url + path, timeout=DEADLINE).status_code == 200
            refused(post(server, GOOD | {"temperature": -1}), 400)
        finally:
            go_on.set()
        assert {one.result().status_code for one in waiting} == {200}


def test_two_hundred_connections_at_once_are_answered(server):
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        bad = GOOD | {"temperature": -1}
        codes = list(pool.map(lambda _: post(server, bad).status_code, range(200)))
    assert codes == [400] * 200


def test_one_connection_too_many_is_refused_with_503(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "MOST_CONNECTIONS", 0)
        response = requests.get(f"{server.url}/health", timeout=DEADLINE)
    refused(response, 503)
    assert response.headers["Retry-After"] == "5"
    assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200


def test_a_request_for_which_no_thread_can_start_is_refused_with_503(server, monkeypatch):
    def none_left(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        refused(post(server, GOOD), 503)
        assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200
    assert server.worker.outstanding == 0
    assert post(server, GOOD).status_code == 200


def test_file_descriptors_beyond_1023_work(server):
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


def test_a_full_queue_is_refused_with_503_and_retry_after(server, monkeypatch):
    """One runs, one waits, and every further one is turned away until there is room again."""
    go_on = threading.Event()
    answer = server.worker._answer

    def held(*args) -> None:
        assert go_on.wait(DEADLINE)
        answer(*args)

    monkeypatch.setattr(server.worker, "limits", replace(server.worker.limits, max_queue=1))
    monkeypatch.setattr(server.worker, "_answer", held)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            accepted = []
            for count in (1, 2):
                accepted.append(pool.submit(post, server, GOOD))
                assert wait_until(lambda count=count: server.worker.outstanding == count)
            for _ in range(5):
                full = post(server, GOOD)
                refused(full, 503)
                assert full.headers["Retry-After"] == "5"
        finally:
            go_on.set()
        assert [one.result().status_code for one in accepted] == [200, 200]
    assert post(server, GOOD).status_code == 200
