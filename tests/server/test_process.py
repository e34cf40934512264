"""The command as a process: how it starts, and how it ends."""

import json
import os
import shutil
import signal

import mlx.core as mx
import openai
import pytest
from support.patience import DEADLINE
from support.serving import Process

pytestmark = pytest.mark.long  # Each starts a server as a process.


FLAGS = ("--port", "0", "--expert-memory", "120KB", "--log-level", "WARNING")


def begun(process: Process, max_tokens: int = 3500, choices: int = 16):
    """A stream that has begun; unless told otherwise one that lasts far longer than a test."""
    url = process.wait_for(r"ready: (\S+)")[1]
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "hi"}]
    bias = {"256": -100, "258": -100}
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=max_tokens, n=choices, stream=True, logit_bias=bias
    )
    next(iter(stream))
    return stream


def test_sigterm_cancels_an_answer_that_does_not_finish_within_the_deadline_and_exits_0(start, model_directory):
    process = start("--model", model_directory, *FLAGS, "--shutdown-seconds", "1")
    stream = begun(process)
    process.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError):
        list(stream)
    assert process.end() == 0
    process.wait_for("1 requests are cancelled")


def test_sigterm_lets_a_short_answer_finish_and_does_not_wait_longer(start, model_directory):
    process = start("--model", model_directory, *FLAGS, "--shutdown-seconds", str(100 * DEADLINE))
    stream = begun(process, max_tokens=200, choices=1)
    process.process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert process.end() == 0


CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast

pathlib.Path({marker!r}).touch()


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_model_runs_only_with_the_flag(start, model_directory, tmp_path, monkeypatch, trusted):
    model, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_directory, model)
    (model / "tokenizer_code.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "tokenizer_code.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    process = start("--model", model, *FLAGS, *(["--trust-remote-code"] if trusted else []))
    process.wait_for("ready:|error:")
    assert marker.exists() == trusted


def test_a_second_sigterm_does_not_wait(start, model_directory):
    process = start("--model", model_directory, *FLAGS, "--shutdown-seconds", str(100 * DEADLINE))
    begun(process)
    process.process.send_signal(signal.SIGTERM)
    process.wait_for("finishing what runs")
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == 0
    process.wait_for("1 requests are cancelled")


def test_what_was_said_before_a_restart_is_not_read_again(start, model_directory, tmp_path):
    file = tmp_path / "kv"
    flags = ("--model", model_directory, *FLAGS, "--prompt-cache-file", file)
    messages = [{"role": "user", "content": "a question that fills more than one window of sixteen tokens"}]

    def ask(process: Process):
        client = openai.OpenAI(base_url=process.wait_for(r"ready: (\S+)")[1], api_key="none", max_retries=0)
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)

    def end(process: Process) -> None:
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == 0

    process = start(*flags)
    first = ask(process)
    assert not first.usage.prompt_tokens_details.cached_tokens
    end(process)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and another"},
    ]
    process = start(*flags)
    second = ask(process)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 20
    end(process)
    file.write_bytes(file.read_bytes()[:-1])
    process = start(*flags)
    assert not ask(process).usage.prompt_tokens_details.cached_tokens
    process.wait_for("the cache begins empty")
    end(process)


def test_a_model_that_cannot_be_loaded_ends_it_with_one_line(start, model_directory, tmp_path):
    for file in model_directory.iterdir():
        if file.name != "model-experts-2.safetensors":
            os.symlink(file, tmp_path / file.name)
    process = start("--model", tmp_path, *FLAGS)
    assert process.end() == 1
    process.wait_for(r"error: .*model-experts-2\.safetensors")
    assert "Traceback" not in process.said


def test_an_adapter_on_streamed_experts_or_nowhere_ends_it_with_one_line(start, model_directory, tmp_path):
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = {"model.layers.1.mlp.switch_mlp.gate_proj.lora_a": mx.zeros((8, 4, 128))}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    for adapter, code, said in ((tmp_path, 1, "adapts experts"), (tmp_path / "nowhere", 2, "no such directory")):
        process = start("--model", model_directory, *FLAGS, "--adapter-path", adapter)
        assert process.end() == code
        process.wait_for(f"error: .*{said}")
        assert "Traceback" not in process.said
        assert "ready:" not in process.said
