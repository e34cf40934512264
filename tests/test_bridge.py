"""The bridge, and mlx-lm's own commands as processes on a converted directory: stock, and with our model."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import tiny_config, write_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_mimo import bridge
from mlx_mimo.convert import convert_checkpoint
from mlx_mimo.errors import FormatError, MimoError, UsageError
from mlx_mimo.models.cache import make_cache
from mlx_mimo.runtime.bridge_file import VARIABLES, Settings

STREAMED = {"MLX_MIMO_EXPERT_MEMORY": "120KB"}  # a third of the experts below


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bridge")
    write_checkpoint(root / "hf", tiny_config(), mtp=False)
    return convert_checkpoint(root / "hf", root / "plain", progress=False)


@pytest.fixture(scope="module")
def bridged(plain, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bridged") / "model"
    directory.mkdir()
    for file in plain.iterdir():
        (directory / file.name).symlink_to(file) if file.name != "config.json" else None
    (directory / "config.json").write_bytes((plain / "config.json").read_bytes())
    bridge.switch(directory, True)
    return directory


def command(*arguments: str, stdin: str = "", settings: dict | None = None) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLX_MIMO_")}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | (settings or {}),
    )


def generated(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout.split("==========")[1]


# The switch


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_off_gives_back_every_byte(plain, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_bytes((plain / "config.json").read_bytes())
    before = digests(directory)
    bridge.switch(directory, True)
    assert json.loads((directory / "config.json").read_text())["model_file"] == bridge.FILE
    once = digests(directory)
    bridge.switch(directory, True)
    assert digests(directory) == once
    bridge.switch(directory, False)
    assert digests(directory) == before


def test_refuses_a_directory_whose_model_file_is_not_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_file": "other.py"}')
    with pytest.raises(FormatError, match=r"other\.py"):
        bridge.switch(tmp_path, True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_file": "other.py"}


def test_refuses_an_fp8_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(UsageError, match="convert it first"):
        bridge.switch(tmp_path, True)


def test_settings_come_from_the_environment_and_errors_name_the_variable():
    assert Settings.from_environment({}) == Settings()
    found = Settings.from_environment({"MLX_MIMO_EXPERT_MEMORY": "24GB", "MLX_MIMO_LOOKAHEAD": "1"})
    assert (found.expert_memory, found.lookahead) == (24 * 10**9, True)
    for name, text in {"EXPERT_MEMORY": "much", "EXPERT_POLICY": "fifo", "THREADS": "0", "LOOKAHEAD": "yes"}.items():
        with pytest.raises(UsageError, match=f"MLX_MIMO_{name}"):
            Settings.from_environment({f"MLX_MIMO_{name}": text})


def test_every_variable_is_in_the_documented_table():
    table = (Path(__file__).parents[1] / "docs" / "SERVER.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\| `MLX_MIMO_(\w+)`", table)) >= {field.upper() for field in VARIABLES}


# In this process


@pytest.fixture
def loaded(bridged, monkeypatch):
    monkeypatch.setenv("MLX_MIMO_EXPERT_MEMORY", "120KB")
    model, _ = load_model(bridged, trust_remote_code=True)
    yield model
    model.residency.close()


def test_mlx_lm_loads_our_model_with_streamed_experts(loaded):
    assert not loaded.residency.all_resident
    assert not [name for name, _ in tree_flatten(loaded.parameters()) if "switch_mlp" in name]


def test_mlx_lms_caches_see_what_ours_see(loaded):
    tokens = mx.random.randint(0, 256, (1, 50))  # three windows
    ours, theirs = make_cache(loaded.args), loaded.make_cache()
    for start, end in ((0, 30), (30, 49), (49, 50)):
        piece = tokens[:, start:end]
        assert mx.allclose(loaded(piece, cache=ours), loaded(piece, cache=theirs), atol=1e-4)


def test_training_gets_differentiable_experts_and_evaluation_streams_again(loaded):
    tokens = mx.array([[5, 6, 7, 8]])
    streamed = loaded(tokens)
    hits_and_misses = loaded.residency.counters
    loaded.train()
    whole = loaded(tokens)
    assert mx.allclose(streamed, whole, atol=1e-3)
    assert loaded.residency.counters == hits_and_misses, "training read through the pool"
    # The gradient of an early layer passes through all experts above it.
    weight = loaded.layers[0].input_layernorm.weight

    def loss(scale: mx.array) -> mx.array:
        loaded.layers[0].input_layernorm.weight = weight * scale
        return mx.logsumexp(loaded(tokens), axis=-1).sum()

    gradient = mx.grad(loss)(mx.array(1.0)).item()
    step = 1e-2
    difference = (loss(mx.array(1 + step)) - loss(mx.array(1 - step))).item() / (2 * step)
    loaded.layers[0].input_layernorm.weight = weight
    assert gradient == pytest.approx(difference, rel=0.05)
    loaded.eval()
    again = loaded(tokens)
    assert mx.array_equal(streamed, again)
    assert loaded.residency.counters != hits_and_misses


def test_a_stacked_directory_refuses_a_budget(tmp_path):
    from mlx_mimo.runtime.bridge_file import classes

    with pytest.raises(MimoError, match="MLX_MIMO_EXPERT_MEMORY"):
        classes(tmp_path, Settings(expert_memory=1000))


# As processes


def test_generate_stock_and_bridged(plain, bridged, tmp_path):
    arguments = ("mlx_lm", "generate", "--prompt", "hello", "-m", "12", "--temp", "0")
    assert len(generated(command(*arguments, "--model", plain))) > 1
    refused = command(*arguments, "--model", bridged)
    assert refused.returncode != 0
    assert "trust_remote_code" in refused.stderr
    profile = tmp_path / "use.npz"
    arguments += ("--model", bridged, "--trust-remote-code")
    streamed = command(*arguments, settings=STREAMED | {"MLX_MIMO_PROFILE": str(profile)})
    assert generated(streamed) == generated(command(*arguments, settings={"MLX_MIMO_EXPERT_MEMORY": "all"}))
    assert profile.exists(), "our residency did not run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "bridged"])
def test_chat_cache_prompt_and_benchmark(kind, plain, bridged, tmp_path):
    model = ("--model", plain) if kind == "stock" else ("--model", bridged, "--trust-remote-code")
    settings = {} if kind == "stock" else STREAMED
    chat = command("mlx_lm", "chat", *model, "--max-tokens", "4", stdin="hello\nq\n", settings=settings)
    assert chat.returncode == 0, chat.stderr
    cache = tmp_path / "cache.safetensors"
    file = ("--prompt-cache-file", cache)
    made = command("mlx_lm", "cache_prompt", *model, "--prompt", "hello", *file, settings=settings)
    assert made.returncode == 0, made.stderr
    used = command("mlx_lm", "generate", *model, "--prompt", "more", "-m", "3", *file, settings=settings)
    assert generated(used)
    measured = command("mlx_lm", "benchmark", *model, "-p", "8", "-g", "4", "-n", "1", settings=settings)
    assert measured.returncode == 0, measured.stderr
    assert "generation_tps" in measured.stdout
