"""The generation thread: failures, clients that leave, the queue, batches."""

import concurrent.futures
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import pytest
import requests
from support.patience import DEADLINE, wait_until
from support.serving import running_server

from mlx_mimo.models.mimo_v2_flash import Model
from mlx_mimo.server.errors import Disconnected
from mlx_mimo.server.http.answer import EventStream

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
CHAT = "/v1/chat/completions"


class Gate:
    """The model's calls pass it, and wait while it is closed."""

    def __init__(self):
        self.passed = 0
        self._open = threading.Event()
        self.open, self.close = self._open.set, self._open.clear
        self.open()

    def wait(self) -> None:
        assert self._open.wait(DEADLINE)
        self.passed += 1


def post(server, **options) -> requests.Response:
    return requests.post(server.url + CHAT, json=BODY | options, timeout=DEADLINE)


def begin(server, padding: str = "", **options) -> socket.socket:
    """A request that was sent and not answered."""
    parts = urlsplit(server.url)
    body = json.dumps(BODY | options | {"user": padding}).encode()
    connection = socket.create_connection((parts.hostname, parts.port), timeout=DEADLINE)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def leave(server, gate: Gate, **options) -> None:
    """Begins a request and hangs up amid a step, which ends no sooner than that is known."""
    before = server.site.metrics.tokens._value.get()
    with begin(server, **options):
        assert wait_until(lambda: server.site.metrics.tokens._value.get() > before)
        gate.close()
    assert wait_until(lambda: server.worker.outstanding == 0)


def figures(server) -> dict[str, float]:
    """What /metrics says."""
    text = requests.get(f"{server.url}/metrics", timeout=DEADLINE).text
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate, call = Gate(), Model.__call__

    def held(*args, **options):
        gate.wait()
        return call(*args, **options)

    monkeypatch.setattr(Model, "__call__", held)
    yield gate
    gate.open()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_a_client_that_leaves_stops_its_generation_within_a_step(request, gate, stream, batched):
    server = request.getfixturevalue("resident" if batched else "server")
    leave(server, gate, max_tokens=3000, stream=stream, logit_bias={"258": -100, "256": -100})
    before = gate.passed
    gate.open()
    server.worker.ask(lambda: None).result(DEADLINE)  # it has come to the end of what it did
    # The step that runs, the one that was begun ahead, and the one whose token finds nobody.
    assert gate.passed - before <= 3, "it went on for nobody"
    assert server.worker.running_kv_bytes == 0
    assert post(server).json()["usage"]["completion_tokens"] == 4


def test_requests_whose_clients_leave_while_they_wait_are_forgotten(server, monkeypatch):
    go_on = threading.Event()
    answer = server.worker._answer

    def held(*args) -> None:
        assert go_on.wait(DEADLINE)
        answer(*args)

    monkeypatch.setattr(server.worker, "_answer", held)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(post, server)
            assert wait_until(lambda: server.worker.outstanding == 1 and server.worker.queued == 0)
            leavers = [begin(server, padding="x" * 1000) for _ in range(5)]
            assert wait_until(lambda: server.worker.queued == 5)
            shown = figures(server)
            assert (shown["mlx_mimo_running"], shown["mlx_mimo_queue"]) == (1, 5)
            for leaver in leavers:
                leaver.close()
            assert wait_until(lambda: server.worker.outstanding == 1)
            shown = figures(server)
            assert (shown["mlx_mimo_running"], shown["mlx_mimo_queue"]) == (1, 0)
            assert len(server.worker._results) == 1
        finally:
            go_on.set()
        assert first.result().status_code == 200
    assert wait_until(lambda: figures(server)["mlx_mimo_running"] == 0)


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_after_its_request(server, more):
    """The client is gone before anything was answered, whatever it left behind unread."""
    before = server.site.metrics.disconnects._value.get()
    connection = begin(server, max_tokens=3000, stream=False, logit_bias={"258": -100, "256": -100})
    assert wait_until(lambda: server.worker.outstanding == 1)
    connection.sendall(more)
    connection.close()
    assert wait_until(lambda: server.site.metrics.disconnects._value.get() == before + 1)


def test_a_stream_that_cannot_begin_leaves_nothing_behind(server, monkeypatch):
    async def gone(*_):
        raise Disconnected

    monkeypatch.setattr(EventStream, "__call__", gone)
    with pytest.raises(requests.RequestException):
        post(server, stream=True, max_tokens=3000)
    assert wait_until(lambda: server.worker.outstanding == 0)
    assert server.worker._results == set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_fails_its_request_alone(server, monkeypatch, stream):
    model = server.worker.loaded.model
    layer = model.layers[-1].mlp
    experts = layer.switch_mlp

    def broken(*_):
        raise RuntimeError("a read failed")

    good = post(server).json()["choices"][0]["message"]["content"]
    layer.switch_mlp = broken
    try:
        answer = post(server, stream=stream)
    finally:
        layer.switch_mlp = experts
    if stream:
        assert "a read failed" in answer.text
    else:
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
    assert post(server).json()["choices"][0]["message"]["content"] == good
    assert server.worker.is_healthy


def test_metrics_count_what_happened(server):
    before = figures(server)
    post(server)
    assert wait_until(lambda: server.worker.outstanding == 0)  # an answer is whole a moment before its place is free
    after = figures(server)
    assert after["mlx_mimo_generated_tokens_total"] == before["mlx_mimo_generated_tokens_total"] + 4
    assert after["mlx_mimo_first_token_seconds_count"] == before["mlx_mimo_first_token_seconds_count"] + 1
    assert after["mlx_mimo_token_seconds_count"] == before["mlx_mimo_token_seconds_count"] + 3
    assert after["mlx_mimo_expert_hits_total"] + after["mlx_mimo_expert_misses_total"] > (
        before["mlx_mimo_expert_hits_total"] + before["mlx_mimo_expert_misses_total"]
    )
    assert after["mlx_mimo_expert_misses_total"] > before["mlx_mimo_expert_misses_total"]
    slot_bytes = after["mlx_mimo_expert_slot_bytes"]
    read = [shown["mlx_mimo_expert_read_bytes_total"] for shown in (before, after)]
    misses = [shown["mlx_mimo_expert_misses_total"] for shown in (before, after)]
    assert read[1] - read[0] == pytest.approx((misses[1] - misses[0]) * slot_bytes, rel=0.1)
    assert after["mlx_mimo_expert_read_seconds_total"] > before["mlx_mimo_expert_read_seconds_total"]
    assert (after["mlx_mimo_queue"], after["mlx_mimo_running"]) == (0, 0)
    assert after["mlx_mimo_kv_bytes"] > 0
    assert after["mlx_mimo_expert_slots"] == server.worker.loaded.residency.counters.slots


@pytest.mark.parametrize("batched", [False, True])
def test_caches_of_running_requests_are_counted(request, gate, batched):
    server = request.getfixturevalue("resident" if batched else "server")
    server.worker.ask(server.worker.prompt_cache.clear).result(DEADLINE)
    assert figures(server)["mlx_mimo_kv_bytes"] == 0
    with begin(server, max_tokens=3000, logit_bias={"258": -100, "256": -100}):
        assert wait_until(lambda: server.worker.running_kv_bytes > 0)
        gate.close()
        assert figures(server)["mlx_mimo_kv_bytes"] > 0
    gate.open()
    assert wait_until(lambda: server.worker.running_kv_bytes == 0)


def test_health_is_503_once_the_generation_thread_is_dead(model_directory, monkeypatch):
    def dies(*_):
        raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    with running_server(model_directory) as server:
        assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200
        monkeypatch.setattr(server.worker, "_answer", dies)
        refused = post(server)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 503
        assert post(server).status_code == 503


def test_a_profile_that_cannot_be_written_does_not_keep_the_server_from_closing(model_directory, tmp_path, caplog):
    folder = tmp_path / "there"
    folder.mkdir()
    with running_server(model_directory, "--profile", str(folder / "uses")) as server:
        assert post(server).status_code == 200
        folder.rmdir()
    assert "profile cannot be written" in caplog.text
    assert server.worker.loaded.residency is None
    assert not server.worker._thread.is_alive()
    assert not server.worker.is_alive


def test_the_longest_prompt_is_what_the_flag_says(model_directory):
    with running_server(model_directory, "--max-prompt-tokens", "400") as server:
        long = {"messages": [{"role": "user", "content": "x" * 500}]}
        refused = post(server, **long).json()["error"]
        assert (refused["param"], refused["code"]) == ("messages", "context_length_exceeded")
        assert "1 to 400 expected" in refused["message"]
        assert post(server).status_code == 200


def test_health_is_503_while_the_model_loads(model_directory, monkeypatch):
    from mlx_mimo.server.engine import engine_model

    def held(*args, **options):
        assert go_on.wait(DEADLINE)
        return load(*args, **options)

    load, go_on = engine_model.load, threading.Event()
    monkeypatch.setattr(engine_model, "load", held)
    with running_server(model_directory, wait=False) as server:
        assert requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 503
        refused = post(server)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        go_on.set()
        assert wait_until(lambda: requests.get(f"{server.url}/health", timeout=DEADLINE).status_code == 200)
        assert post(server).status_code == 200


@pytest.fixture(scope="module")
def resident(model_directory):
    with running_server(model_directory, "--expert-memory", "all") as server:
        yield server


def test_resident_experts_are_batched_and_answers_are_those_of_one_alone(resident, server):
    assert resident.worker.loaded.is_batchable
    assert not server.worker.loaded.is_batchable
    questions = ["one", "two and more", "three"]

    def ask(question: str) -> str:
        client = openai.OpenAI(base_url=f"{resident.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=6, temperature=0
        )
        assert answer.usage.completion_tokens == 6
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask, questions))
    assert len(set(together)) > 1
    assert [ask(question) for question in questions] == together


def test_requests_that_come_together_are_computed_together(resident, monkeypatch):
    """Else a batch would be one only by name."""
    batches = []
    call = Model.__call__

    def seen(self, inputs, *rest, **options):
        batches.append(inputs.shape[0])
        assert len(batches) > 1 or wait_until(lambda: len(resident.worker._results) == 3), "the others do not come"
        return call(self, inputs, *rest, **options)

    monkeypatch.setattr(Model, "__call__", seen)
    bias = {"258": -100, "256": -100}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: post(resident, max_tokens=60, logit_bias=bias), range(3)))
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [60] * 3
    assert max(batches) == 3
    assert batches.count(3) > 20


def test_a_failed_step_of_a_batch_leaves_the_server_running(resident):
    layer = resident.worker.loaded.model.layers[-1].mlp
    experts = layer.switch_mlp

    def broken(*_):
        raise RuntimeError("a step failed")

    layer.switch_mlp = broken
    try:
        assert post(resident).status_code == 500
    finally:
        layer.switch_mlp = experts
    assert post(resident).status_code == 200
    assert resident.worker.is_healthy


def test_choices_and_forced_calls_work_beside_a_batch(resident):
    """A grammar wants one sequence at a time; the batch ends first, and begins again."""
    tool = {
        "type": "function",
        "function": {"name": "door", "parameters": {"properties": {"open": {"type": "boolean"}}}},
    }
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        several = [pool.submit(post, resident, n=3, temperature=1) for _ in range(3)]
        calls = [pool.submit(post, resident, **forced) for _ in range(3)]
    for answer in several:
        assert [choice["index"] for choice in answer.result().json()["choices"]] == [0, 1, 2]
    for answer in calls:
        (call,) = answer.result().json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "door"
    assert wait_until(lambda: resident.worker.outstanding == 0)


def test_a_server_that_is_leaving_finishes_every_choice_of_a_request(server, monkeypatch):
    answer = server.worker._answer

    def leaving(*args) -> None:
        server.worker.draining = True
        answer(*args)

    monkeypatch.setattr(server.worker, "draining", False)
    monkeypatch.setattr(server.worker, "_answer", leaving)
    assert len(post(server, n=3).json()["choices"]) == 3
    assert post(server).status_code == 503
