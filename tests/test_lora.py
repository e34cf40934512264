"""mlx_lm.lora through the bridge, and its adapters in our commands, with residency on."""

import json
import os
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import requests
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load as mlx_lm_load
from mlx_lm.utils import load_model
from support.bridged import KINDS, STREAMED, bridged_directory, generated, mlx_lm, mlx_lm_server, succeeded
from support.converted import converted_directory, demo_directory
from support.patience import DEADLINE
from support.serving import running_server
from test_generate import mimo

from mlx_mimo import load
from mlx_mimo.bridge import __main__ as bridge
from mlx_mimo.bridge import model as bridge_file
from mlx_mimo.checkpoint.header import read_header
from mlx_mimo.errors import FormatError, MimoError, UsageError

pytestmark = pytest.mark.long  # mlx-lm's training, as processes.


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LORA = {"rank": 4, "scale": 20.0, "dropout": 0.0}
ALL_LAYERS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two lines, so that a batch of two is the same in every iteration."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text}) + "\n" for text in ("the cat sat on the mat", "the dog ran to the tree")]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def train(data: Path, adapter: Path, keys: list[str], *flags: str, **options):
    config = adapter.parent / f"{adapter.name}.yaml"
    config.write_text(json.dumps({"lora_parameters": LORA | {"keys": keys}}))
    arguments = ("--train", "--data", data, "--num-layers", ALL_LAYERS, "--batch-size", 2, "--adapter-path", adapter)
    return mlx_lm("bridged", "lora", *arguments, "-c", config, *flags, **options)


def losses(output: str) -> list[float]:
    """The training losses that mlx_lm.lora printed, in order."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    return [float(value) for value in re.findall(r"^ +\d+ +(\d+\.\d+)", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, str, Path]:
    """(adapter's directory, what training printed, its temporary folder)"""
    root = tmp_path_factory.mktemp("trained")
    (root / "tmp").mkdir()
    flags = ("--iters", 6, "--learning-rate", "2e-4", "--steps-per-report", 1, "--test")
    result = train(data, root / "adapter", ATTENTION, *flags, settings={"TMPDIR": str(root / "tmp")})
    return root / "adapter", succeeded(result), root / "tmp"


def test_training_lowers_the_loss(trained):
    found = losses(trained[1])
    assert len(found) == 6
    assert found[-1] < found[0] - 0.1
    tested = re.search(r"Test loss (\d+\.\d+)", trained[1])
    assert float(tested[1]) < found[0]


def test_training_changes_every_projection_of_attention(trained):
    weights = mx.load(str(trained[0] / "adapters.safetensors"))
    expected = {
        f"model.layers.{layer}.{key}.lora_{part}" for layer in range(ALL_LAYERS) for key in ATTENTION for part in "ab"
    }
    assert weights.keys() == expected
    for name, value in weights.items():
        assert mx.abs(value).max().item() > 1e-5, name  # lora_b begins as zeros


def test_no_kernel_was_compiled_on_the_cpu(trained):
    """Compiling them would take minutes before the first step."""
    assert not [file for file in trained[2].rglob("*") if file.suffix in (".so", ".cpp")]


@pytest.mark.long
def test_the_demo_learns(data, tmp_path):
    flags = ("--iters", 4, "--learning-rate", "1e-3", "--steps-per-report", 1, "--val-batches", 1)
    found = losses(succeeded(train(data, tmp_path / "adapter", ATTENTION, *flags, source=demo_directory())))
    assert len(found) == 4
    assert found[-1] < found[0] - 0.5
    learnt = [name for name in mx.load(str(tmp_path / "adapter" / "adapters.safetensors")) if name.endswith("lora_b")]
    assert len(learnt) == ALL_LAYERS * len(ATTENTION)


def adapted(model: nn.Module) -> nn.Module:
    """Puts the same adapters on a model, none of them zero."""
    model.freeze()
    linear_to_lora_layers(model, ALL_LAYERS, LORA | {"keys": ATTENTION})
    mx.random.seed(1)
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.02, model.trainable_parameters()))
    return model


def test_gradients_are_those_of_mlx_lms_own_model(monkeypatch):
    for name, value in STREAMED.items():
        monkeypatch.setenv(name, value)
    theirs, _ = load_model(converted_directory())
    theirs.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, theirs.parameters()))
    batch, lengths = mx.random.randint(0, 256, (2, 13)), mx.array([[0, 13], [2, 9]])
    results = []
    try:
        for model in (theirs, load_model(bridged_directory(), trust_remote_code=True)[0]):
            adapted(model).train()
            (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, batch, lengths)
            results.append((loss.item(), dict(tree_flatten(gradients))))
    finally:
        mx.enable_compile()  # on a CPU the bridge turns it off for the whole process
    (expected_loss, expected), (loss, gradients) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * len(ATTENTION) * ALL_LAYERS
    for name, gradient in gradients.items():
        size = mx.linalg.norm(expected[name]).item()
        assert size > 1e-4, name
        assert mx.linalg.norm(gradient - expected[name]).item() < 1e-3 * size, name


def test_training_of_experts_is_rejected(data, tmp_path):
    result = train(data, tmp_path / "adapter", [*ATTENTION, "mlp.switch_mlp.gate_proj"], "--iters", 1)
    assert result.returncode != 0
    assert "ExpertsKeptOutsideTheModel" in result.stderr.splitlines()[-1]


# The adapter in use


def float32(model: nn.Module) -> nn.Module:
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, model.parameters()))
    return model


def test_an_adapted_model_with_streamed_experts_computes_what_mlx_lms_does(trained):
    theirs, _ = mlx_lm_load(str(converted_directory()), adapter_path=str(trained[0]))
    ours, _ = load(converted_directory(), expert_memory="120KB", adapter_path=trained[0])
    plain, _ = load(converted_directory(), expert_memory="all")
    tokens = mx.random.randint(0, 256, (1, 12))
    logits = ours(tokens)
    assert not ours.residency.all_resident
    assert mx.allclose(logits, float32(theirs)(tokens), atol=2e-3)
    assert mx.abs(logits - plain(tokens)).max().item() > 0.05, "the adapter changed nothing"
    ours.residency.close()


PROMPT = ("--prompt", "the cat", "--max-tokens", 8, "--temp", 0, "--ignore-chat-template")


def test_generate_takes_an_adapter_with_residency_on(trained):
    flags = ("--model", converted_directory(), *PROMPT, "--json", "--expert-memory", "120KB")
    plain, with_it = (json.loads(succeeded(mimo(*flags, *more))) for more in ((), ("--adapter-path", trained[0])))
    assert with_it["experts"]["misses"] > 0
    assert with_it["token_ids"] != plain["token_ids"]


@pytest.mark.long
def test_mlx_lms_generate_takes_an_adapter_through_the_bridge(trained):
    plain, with_it = (
        generated(mlx_lm("bridged", "generate", *PROMPT, *more)) for more in ((), ("--adapter-path", trained[0]))
    )
    assert plain != with_it


@pytest.mark.long
def test_mlx_lms_chat_takes_an_adapter_through_the_bridge(trained):
    flags = ("--max-tokens", 4, "--temp", 0)
    plain, with_it = (
        succeeded(mlx_lm("bridged", "chat", *flags, *more, stdin="hello\nq\n"))
        for more in ((), ("--adapter-path", trained[0]))
    )
    assert plain != with_it


@pytest.mark.long
def test_mlx_lms_server_takes_an_adapter_through_the_bridge(trained, tmp_path):
    texts = []
    for name, flags in {"plain": (), "adapted": ("--adapter-path", str(trained[0]))}.items():
        with mlx_lm_server("bridged", tmp_path / name, *flags) as url:
            body = {"prompt": "the cat", "max_tokens": 8, "temperature": 0}
            answer = requests.post(f"{url}/v1/completions", json=body, timeout=DEADLINE)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["text"])
    assert texts[0] != texts[1]


@pytest.mark.long
def test_chat_takes_an_adapter_with_residency_on(trained):
    flags = ("--model", converted_directory(), "-m", 4, "--temp", 0, "--expert-memory", "120KB")
    lines = "hello\n/stats\n"
    plain, with_it = (
        succeeded(mimo(*flags, *more, stdin=lines, command="chat")) for more in ((), ("--adapter-path", trained[0]))
    )
    assert "slots" in with_it
    assert plain.splitlines()[0] != with_it.splitlines()[0]


def test_the_server_takes_an_adapter_with_residency_on(trained):
    texts = []
    for flags in ((), ("--adapter-path", str(trained[0]))):
        with running_server(converted_directory(), *flags) as server:
            url = f"{server.url}/v1/completions"
            answer = requests.post(url, json={"prompt": "the cat", "max_tokens": 8, "temperature": 0}, timeout=DEADLINE)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["text"])
    assert texts[0] != texts[1]


def fused_error(fused: nn.Module, trained: Path) -> tuple[float, float]:
    """How far a fused model's logits are from base and adapter, and how far the adapter took those from the base."""
    adapted, _ = load(converted_directory(), expert_memory="all", adapter_path=trained)
    plain, _ = load(converted_directory(), expert_memory="all")
    tokens = mx.random.randint(0, 256, (1, 12), key=mx.random.key(0))
    wanted = adapted(tokens)
    error, effect = mx.abs(fused(tokens) - wanted).mean().item(), mx.abs(wanted - plain(tokens)).mean().item()
    for model in (adapted, plain):
        model.residency.close()
    return error, effect


def types(directory: Path) -> dict:
    return {
        entry.name: (entry.dtype, entry.shape)
        for file in directory.glob("model*.safetensors")
        for entry in read_header(file).tensors.values()
    }


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_adapter_streams_after_repack(kind, trained, tmp_path):
    fused = tmp_path / "fused"
    succeeded(mlx_lm(kind, "fuse", "--adapter-path", trained[0], "--save-path", fused))
    if kind == "bridged":
        bridge.switch(fused, False)
    succeeded(mimo("repack", fused, "--in-place", command="convert"))
    ours, _ = load(fused, expert_memory="120KB")
    error, effect = fused_error(ours, trained[0])
    assert not ours.residency.all_resident
    assert error < effect / 3  # fusing rounds the sum of weight and adapter to the weight's bits again
    ours.residency.close()


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), pytest.param(("--dequantize",), marks=pytest.mark.long)])
def test_fuse_through_the_bridge_saves_what_fuse_without_it_saves(flags, trained, tmp_path):
    for kind in KINDS:
        succeeded(mlx_lm(kind, "fuse", "--adapter-path", trained[0], "--save-path", tmp_path / kind, *flags))
    assert types(tmp_path / "bridged") == types(tmp_path / "stock")
    assert any(".switch_mlp." in name for name in types(tmp_path / "bridged"))
    # As a bridged directory, as one of ours, and after `off` as mlx-lm's own.
    settings = {"MLX_MIMO_EXPERT_MEMORY": "all"}
    said = generated(mlx_lm("bridged", "generate", *PROMPT, settings=settings, saved=tmp_path / "bridged"))
    assert json.loads(succeeded(mimo("--model", tmp_path / "bridged", *PROMPT, "--json")))["text"] == said.strip("\n")
    bridge.switch(tmp_path / "bridged", False)
    theirs, _ = load_model(tmp_path / "bridged")
    error, effect = fused_error(float32(theirs), trained[0])
    assert error < effect / 3


def test_fuse_rejects_experts_that_do_not_fit_into_memory(monkeypatch):
    for name, value in STREAMED.items():
        monkeypatch.setenv(name, value)
    model, _ = load_model(bridged_directory(), trust_remote_code=True)
    mx.enable_compile()
    monkeypatch.setattr(bridge_file, "available_memory", lambda *_: 1000)
    with pytest.raises(MimoError, match=r"mlx_lm\.fuse needs all experts in memory"):
        [module.fuse() for _, module in model.named_modules() if hasattr(module, "fuse")]
    model._end_residency()


def on_experts(directory: Path, keys: list[str] | None) -> Path:
    """An adapter of one layer's experts: as mlx-lm saves it, named in its keys or taken in because none are."""
    directory.mkdir()
    lora = LORA if keys is None else LORA | {"keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": ALL_LAYERS, "lora_parameters": lora}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.1.mlp.switch_mlp.gate_proj"
    weights = {f"{name}.lora_a": mx.zeros((8, 4, 128)), f"{name}.lora_b": mx.zeros((8, 64, 4))}
    mx.save_safetensors(str(directory / "adapters.safetensors"), weights)
    return directory


@pytest.mark.parametrize("keys", [None, ["mlp.switch_mlp.gate_proj"]])
def test_load_rejects_an_adapter_on_experts_by_its_tensor(keys, tmp_path):
    with pytest.raises(MimoError, match=r"model\.layers\.1\.mlp\.switch_mlp\.gate_proj.*attention alone"):
        load(converted_directory(), expert_memory="120KB", adapter_path=on_experts(tmp_path / "adapter", keys))


@pytest.mark.parametrize("keys", [None, ["mlp.switch_mlp.gate_proj"]])
def test_mlx_lm_rejects_an_adapter_on_experts_through_the_bridge(keys, tmp_path):
    flags = ("--adapter-path", on_experts(tmp_path / "adapter", keys))
    result = mlx_lm("bridged", "generate", *PROMPT, *flags)
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert ("switch_mlp.gate_proj" if keys is None else "ExpertsKeptOutsideTheModel") in last


def test_an_adapter_on_experts_is_one_line_on_stderr(tmp_path):
    result = mimo("--model", converted_directory(), *PROMPT, "--adapter-path", on_experts(tmp_path / "adapter", None))
    assert result.returncode == 1
    assert "adapts experts" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_load_rejects_a_directory_that_is_not_an_adapter(tmp_path):
    model = converted_directory()
    with pytest.raises(UsageError, match="no such directory"):
        load(model, adapter_path=tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"adapter_config\.json is missing"):
        load(model, adapter_path=tmp_path)
    directory = on_experts(tmp_path / "adapter", None)
    mx.save_safetensors(str(directory / "adapters.safetensors"), {"model.other.lora_a": mx.zeros((2, 2))})
    with pytest.raises(FormatError, match=r"does not fit the model.*model\.other"):
        load(model, adapter_path=directory)
    (directory / "adapter_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"adapter_config\.json: not a configuration"):
        load(model, adapter_path=directory)
    os.truncate(directory / "adapters.safetensors", 20)
    (directory / "adapter_config.json").write_text(json.dumps({"num_layers": 4, "lora_parameters": LORA}))
    with pytest.raises(FormatError, match=r"adapters\.safetensors"):
        load(model, adapter_path=directory)
