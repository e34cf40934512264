"""The page and the stream that feeds it."""

import base64
import itertools
import json
import re
import socket
from urllib.parse import urlsplit

import pytest
import requests
from support.patience import DEADLINE

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def states(server, count: int) -> list[dict]:
    with requests.get(f"{server.url}/residency/events", stream=True, timeout=DEADLINE) as events:
        lines = (line for line in events.iter_lines() if line.startswith(b"data: "))
        return [json.loads(line[6:]) for line in itertools.islice(lines, count)]


def test_the_page_needs_nothing_from_elsewhere(server):
    page = requests.get(f"{server.url}/residency", timeout=DEADLINE)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=|https?://|@import", page.text)
    assert "prefers-color-scheme: dark" in page.text
    assert 'name="viewport"' in page.text


def test_every_field_that_the_page_shows_is_sent(server):
    page = requests.get(f"{server.url}/residency", timeout=DEADLINE).text
    requests.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=DEADLINE)
    (state,) = states(server, 1)
    assert set(re.findall(r"\bs\.(\w+)", page)) <= set(state)


def test_the_map_shows_what_is_resident(server):
    before, after = states(server, 1)[0], None
    requests.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=DEADLINE)
    after = states(server, 1)[0]
    assert after["tokens"] == before["tokens"] + 4
    assert after["hits"] + after["misses"] > before["hits"] + before["misses"]
    resident = [base64.b64decode(row["resident"]) for row in after["layers"]]
    assert [row["layer"] for row in after["layers"]] == [1, 2, 3]
    assert [len(row) for row in resident] == [8, 8, 8]
    assert sum(map(sum, resident)) == after["slots"], "after some requests every slot is taken"
    assert all(max(base64.b64decode(row["uses"])) == 255 for row in after["layers"])


def test_a_head_of_the_stream_ends(server):
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=DEADLINE) as connection:
        connection.sendall(b"HEAD /residency/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n"), "a head has no body"
        assert connection.recv(65536) == b"", "and nothing comes after it"


def test_a_browser_is_asked_for_the_key(server, monkeypatch):
    import dataclasses

    monkeypatch.setattr(server.app, "access", dataclasses.replace(server.app.access, api_key="key"))
    assert requests.get(f"{server.url}/residency", timeout=DEADLINE).headers["WWW-Authenticate"].startswith("Basic")
    assert requests.get(f"{server.url}/residency", auth=("me", "key"), timeout=DEADLINE).status_code == 200
    assert requests.get(f"{server.url}/residency", auth=("me", "wrong"), timeout=DEADLINE).status_code == 401


@pytest.mark.parametrize("path", ["/residency/x", "/residency.html"])
def test_nothing_else_lies_there(server, path):
    assert requests.get(server.url + path, timeout=DEADLINE).status_code == 404
