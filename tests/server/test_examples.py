"""The examples for the server, against the demo as a process of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.patience import DEADLINE
from support.serving import Process

pytestmark = pytest.mark.long  # Examples as processes.


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(URL, process)"""
    file = tmp_path_factory.mktemp("soak") / "kv"
    process = Process("--port", "0", "--log-level", "WARNING", "--expert-memory", "3MB", "--prompt-cache-file", file)
    try:
        yield process.wait_for(r"ready: (\S+)/v1")[1], process.process
    finally:
        process.process.kill()
        process.process.wait()


def example(name: str, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE,
    )


def test_a_question_is_answered_as_it_streams(demo):
    result = example("server_chat", "What is 17 plus 68?", MLX_MIMO_URL=f"{demo[0]}/v1")
    assert result.returncode == 0, result.stderr
    assert "85" in result.stdout
    assert re.search(r"\[\d+ \+ \d+ tokens\]", result.stderr)


def test_the_model_is_offered_a_function(demo):
    result = example("server_tools", "What is 17 times 4?", MLX_MIMO_URL=f"{demo[0]}/v1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.long
def test_a_short_soak_succeeds(demo):
    result = example(
        "measure/server_soak", "--url", demo[0], "--pid", demo[1].pid, "--minutes", 0.2, "--deadline", DEADLINE
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0, report
    assert (report["failures"], report["hung"], report["healthy"]) == ({}, 0, True)
    assert len({outcome.split()[0] for outcome in report["outcomes"]}) == 14, "every kind of request was made"
    assert len(report["rss_least_and_most_mb"]) == 3


class Broken(BaseHTTPRequestHandler):
    """A server that says it is well, and is not."""

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" else 404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.behave(self)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_) -> None:
        pass


BEHAVIOUR = {
    "refuses good requests": (lambda handler: handler.answer(400), DEADLINE, "whole → 400"),
    "answers another form": (lambda handler: handler.answer(200), DEADLINE, "several → KeyError"),
    "hangs": (lambda handler: handler.server.over.wait(), 0.5, "whole → ReadTimeout"),
    "hangs up": (lambda handler: handler.connection.close(), DEADLINE, "whole → ConnectionError"),
}


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_a_soak_tells_what_a_server_did_wrong(monkeypatch, capsys, name):
    behave, deadline, expected = BEHAVIOUR[name]
    spec = importlib.util.spec_from_file_location("soak", EXAMPLES / "measure" / "server_soak.py")
    soak = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", soak)
    spec.loader.exec_module(soak)
    kept = (soak.whole, soak.several, soak.saves)
    monkeypatch.setattr(soak, "ACTIONS", {action: soak.ACTIONS[action] for action in kept})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    server.behave, server.over = behave, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    arguments = ["--url", url, "--pid", os.getpid(), "--minutes", 0.02, "--deadline", deadline, "--clients", 8]
    monkeypatch.setattr(sys, "argv", ["server_soak.py", *map(str, arguments)])
    try:
        assert soak.main() == 1
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
    failures = json.loads(capsys.readouterr().out)["failures"]
    assert any(failure.startswith(expected) for failure in failures), failures
