"""Who may ask: hosts, pages and keys; everybody else gets JSON in OpenAI's form."""

import dataclasses

import pytest
import requests
from support.patience import DEADLINE
from support.refusing import CHAT, GOOD, post, refused

from mlx_mimo.errors import UsageError
from mlx_mimo.server.__main__ import build_parser, complete
from mlx_mimo.server.errors import RequestError
from mlx_mimo.server.http.access import Access

pytestmark = pytest.mark.usefixtures("worker_lives")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8080", "192.168.0.7", "[::1"])
def test_another_name_for_this_machine_is_refused(server, host):
    response = requests.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=DEADLINE)
    assert response.status_code in (400, 403)
    assert response.json()["error"]["message"].startswith("Host")


def test_pages_of_other_sites_are_refused_and_get_no_cors_header(server):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://[", "x", ""):
        response = post(server, GOOD, Origin=origin)
        refused(response, 403)
        assert "Access-Control-Allow-Origin" not in response.headers
        assert requests.options(server.url + CHAT, headers={"Origin": origin}, timeout=DEADLINE).status_code == 403
    assert "Access-Control-Allow-Origin" not in post(server, GOOD).headers


def allow(server, monkeypatch, **changes) -> None:
    monkeypatch.setattr(server.app, "access", dataclasses.replace(server.app.access, **changes))


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
    answer = requests.options(server.url + CHAT, headers=flight, timeout=DEADLINE)
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
        answer = requests.options(server.url + CHAT, headers=flight | {"Origin": other}, timeout=DEADLINE)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    odd = requests.options(
        server.url + CHAT, headers=flight | {"Access-Control-Request-Headers": "a: b"}, timeout=DEADLINE
    )
    assert odd.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type, x-api-key"


@pytest.mark.parametrize("written", ["mine.example", "MINE.example:8080"])
def test_an_allowed_host_is_one_of_the_servers_names(server, monkeypatch, written):
    def ask(host: str) -> int:
        return requests.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=DEADLINE).status_code

    assert ask("mine.example") == 403
    args = build_parser().parse_args(["--allowed-hosts", f"other.example, {written}"])
    allow(server, monkeypatch, allowed_hosts=frozenset(args.allowed_hosts))
    assert [ask(host) for host in ("mine.example", "Mine.Example:8080", "other.example")] == [200, 200, 200]
    assert ask("mine.example.evil.example") == 403


@pytest.mark.parametrize(
    "flag", ["--allowed-origins=mine.example", "--allowed-origins=ftp://a", "--allowed-hosts=http://mine.example"]
)
def test_an_invalid_origin_or_host_flag_is_refused_at_the_start(capsys, flag):
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
    refused(requests.get(f"{server.url}/metrics", timeout=DEADLINE), 401)
    refused(requests.get(f"{server.url}/v1/models", timeout=DEADLINE), 401)
    assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200
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
