"""Requests sent as they are, and what a refusal looks like."""

import errno
import json
import socket
from http.client import HTTPResponse
from urllib.parse import urlsplit

import requests

from support.patience import DEADLINE

GOOD = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
CHAT = "/v1/chat/completions"


def raw(server, data: bytes, close_write: bool = True, timeout: float = DEADLINE) -> tuple[int, dict]:
    """Sends bytes as they are; the status and the JSON body that come back, read to their length: a connection that is
    kept alive has no end.
    """
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout) as connection:
        connection.sendall(data)
        if close_write:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError as error:  # answered, and no longer waited for: what it said is still to be read
                if error.errno != errno.ENOTCONN:
                    raise
        answer = HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())


def post(server, body, path: str = CHAT, **headers) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(server.url + path, data=data, headers=headers, timeout=DEADLINE)


def refused(response: requests.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
