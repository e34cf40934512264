"""Servers in this process on a tiny converted checkpoint with random weights."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import openai
import pytest
import requests
from support.checkpoints import tiny_config, write_checkpoint
from support.patience import DEADLINE
from support.serving import Process, running_server

from mlx_mimo.convert import convert_checkpoint
from mlx_mimo.server.engine import samplers
from mlx_mimo.server.http import exchange, protocol
from mlx_mimo.server.running import Running

TEMPLATE = Path(__file__).parents[2] / "examples" / "demo_model" / "chat_template.jinja"


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """Converted, with the chat template that knows tools and thinking."""
    root = tmp_path_factory.mktemp("served")
    write_checkpoint(root / "hf", tiny_config(), mtp=False)
    directory = convert_checkpoint(root / "hf", root / "tiny", progress=False)
    shutil.copy(TEMPLATE, directory / "chat_template.jinja")
    return directory


@pytest.fixture(scope="session", autouse=True)
def patient_servers() -> Iterator[None]:
    """They wait for a client as long as it waits for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEAD_SECONDS", DEADLINE)
        patch.setattr(exchange, "WRITE_SECONDS", DEADLINE)
        yield


@pytest.fixture(scope="session")
def server(model_directory) -> Iterator[Running]:
    """Experts streamed: one request at a time."""
    with running_server(model_directory) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE)


@dataclass
class Script:
    """What the model says next, whatever it thinks: `say` sets it for the generations that follow."""

    server: Running
    monkeypatch: pytest.MonkeyPatch

    def say(self, text: str, end: bool = True) -> None:
        tokenizer = self.server.worker.loaded.tokenizer
        tokens = tokenizer.encode(text, add_special_tokens=False)
        tokens += [tokenizer.convert_tokens_to_ids("<|im_end|>")] if end else []

        def sampler_of(*_) -> Callable[[mx.array], mx.array]:
            steps = iter(tokens)
            return lambda logprobs: mx.array([next(steps)])

        self.monkeypatch.setattr(samplers, "sampler_of", sampler_of)


@pytest.fixture
def script(server, monkeypatch) -> Script:
    return Script(server, monkeypatch)


@pytest.fixture
def start():
    processes = []

    def begin(*flags: str) -> Process:
        processes.append(Process(*flags))
        return processes[-1]

    yield begin
    for process in processes:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


@pytest.fixture
def worker_lives(server):
    """Whatever was refused, the server goes on."""
    yield
    assert server.worker.is_healthy
    assert requests.get(f"{server.url}/health", timeout=DEADLINE).json() == {"status": "ok"}
