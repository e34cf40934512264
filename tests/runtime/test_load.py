"""load: the tokens of mlx-lm's loops at every budget, and errors that name what is wrong with a directory."""

import json
import shutil
import sys
import threading

import mlx.core as mx
import mlx_lm
import numpy as np
import psutil
import pytest
from mlx_lm.generate import BatchGenerator
from support.converted import converted_directory, fp8_directory

from mlx_mimo import load, stream_generate
from mlx_mimo.arguments import load_options
from mlx_mimo.bench import __main__ as bench
from mlx_mimo.compare import __main__ as compare
from mlx_mimo.errors import FormatError, MimoError, UsageError
from mlx_mimo.generate import build_parser

PROMPT = list(range(65, 105))  # 40 tokens: past the tiny model's window of 16


@pytest.fixture(scope="module")
def resident():
    return load(converted_directory(), expert_memory="all")


def greedy(model, tokenizer, prompt=PROMPT, n=24, **options) -> list[int]:
    return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=n, **options)]


def test_tokens_equal_those_of_mlx_lm_generate_on_the_same_model(resident):
    model, tokenizer = resident
    theirs = [r.token for r in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=24)]
    assert greedy(model, tokenizer) == theirs


def test_the_loaded_model_works_in_mlx_lm_batches(resident):
    model, tokenizer = resident
    prompts = [PROMPT, PROMPT[:7]]
    generator = BatchGenerator(model, max_tokens=12)
    rows = {uid: [] for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for response in responses:
            rows[response.uid].append(response.token)
    assert list(rows.values()) == [greedy(model, tokenizer, prompt, n=12) for prompt in prompts]
    assert len(mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=2).texts) == 2


@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.01])
def test_streamed_tokens_equal_resident_ones(resident, share, policy):
    model, tokenizer = resident
    counters = model.residency.counters
    budget = max(1, int(counters.slots * counters.slot_bytes * share))
    with pytest.warns() if share < 0.25 else nothing():
        streamed, _ = load(converted_directory(), expert_memory=budget, expert_policy=policy)
    assert greedy(streamed, tokenizer) == greedy(model, tokenizer)
    streamed.residency.close()


class nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 2048])
def test_the_prefill_chunk_does_not_change_the_tokens(resident, chunk):
    model, tokenizer = resident
    assert greedy(model, tokenizer, prefill_step_size=chunk) == greedy(model, tokenizer)


def test_every_end_token_of_generation_config_is_the_tokenizers(resident):
    _, tokenizer = resident
    fields = json.loads((fp8_directory() / "generation_config.json").read_text())
    assert set(fields["eos_token_id"]) <= set(tokenizer.eos_token_ids)


def test_sliding_window_is_the_number_of_keys_that_a_query_sees():
    narrow, _ = load(converted_directory(), expert_memory="all", sliding_window=16)
    assert narrow.args.window == 16
    wide, _ = load(converted_directory(), expert_memory="all")
    assert wide.args.window == 17
    x = mx.array([PROMPT])
    difference = np.abs(np.array(narrow(x)) - np.array(wide(x))).max(axis=-1)[0]
    assert difference[:16].max() < 1e-5
    assert difference[17:].max() > 1e-3


def test_mlx_lms_own_model_equals_ours_at_its_window():
    """mlx-lm 0.32 counts the query's own key within sliding_window_size."""
    directory = converted_directory("bf16")
    ours, _ = load(directory, expert_memory="all", sliding_window=16)
    stock, _ = mlx_lm.utils.load_model(directory)
    stock.set_dtype(mx.float32)
    x = mx.array([PROMPT])
    # Ours routes in float32 from float32 weights, as stock does after set_dtype.
    assert np.abs(np.array(ours(x)) - np.array(stock(x))).max() < 1e-4


def test_a_stacked_directory_loads_resident_and_rejects_a_budget(tmp_path):
    model, _ = mlx_lm.utils.load_model(converted_directory())
    config = json.loads((converted_directory() / "config.json").read_text())
    mlx_lm.utils.save_model(tmp_path, model)
    for file in converted_directory().glob("*.json"):
        if "index" not in file.name and file.name != "mlx_mimo.json":
            shutil.copy(file, tmp_path)
    config.pop("mlx_mimo", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    stacked, tokenizer = load(tmp_path)
    ours, _ = load(converted_directory(), expert_memory="all")
    assert greedy(stacked, tokenizer) == greedy(ours, tokenizer)
    with pytest.raises(FormatError, match="repack"):
        load(tmp_path, expert_memory="1MB")


# Bad input


@pytest.fixture
def damaged(tmp_path):
    """A copy of the converted directory to damage."""
    target = tmp_path / "model"
    shutil.copytree(converted_directory(), target)
    return target


def test_load_names_a_missing_file(damaged):
    (damaged / "model-experts-2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-experts-2\.safetensors"):
        load(damaged)


@pytest.mark.parametrize("name", ["model-experts-1.safetensors", "model-trunk-00001.safetensors"])
def test_load_names_a_truncated_file_and_both_sizes(damaged, name):
    path = next(damaged.glob(name.replace("00001", "*1")))
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(FormatError, match=rf"{path.name}: {size:,} bytes expected.* {size - 100:,} found"):
        load(damaged)


def test_load_rejects_an_index_that_names_an_absent_tensor(damaged):
    index = damaged / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    file = next(iter(fields["weight_map"].values()))
    fields["weight_map"]["model.nothing.weight"] = file
    index.write_text(json.dumps(fields))
    with pytest.raises(FormatError, match=r"model\.nothing\.weight is missing"):
        load(damaged)


def test_load_rejects_a_directory_without_config(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json: not found"):
        load(tmp_path)


def test_load_rejects_another_model_by_its_name(damaged):
    config = json.loads((damaged / "config.json").read_text()) | {"model_type": "llama", "architectures": ["Llama"]}
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"llama.*mimo_v2_flash"):
        load(damaged)


def test_load_names_the_command_that_converts_an_fp8_directory():
    with pytest.raises(MimoError, match="mlx_mimo convert --hf-path"):
        load(fp8_directory())


def test_load_rejects_a_name_that_is_neither_directory_nor_repo():
    with pytest.raises(UsageError, match="no such directory"):
        load("./nowhere")


def test_reader_threads_sets_the_number_of_reading_threads():
    flags = build_parser().parse_args(["--reader-threads", "3", "--expert-memory", "100kB"])
    model, _ = load(converted_directory(), **load_options(flags))
    assert model.residency.reader.threads == 3
    model.residency.close()


def test_bench_and_compare_pass_reader_threads_to_load(tmp_path):
    (tmp_path / "text").write_text("some words to compare with")
    model = str(converted_directory())
    for command, arguments in (
        (bench.bench, ["--model", model, "--prompt-tokens", "8", "--generation-tokens", "4"]),
        (compare.compare, [model, model, "--text", str(tmp_path / "text")]),
    ):
        flags = sys.modules[command.__module__].build_parser().parse_args([*arguments, "--reader-threads", "65"])
        with pytest.raises(UsageError, match="reader threads: 1 to 64"):
            command(flags)


@pytest.mark.parametrize("count", [0, -1, 65])
def test_load_rejects_reader_threads_out_of_range(count):
    with pytest.raises(UsageError, match=f"1 to 64 expected, {count} found"):
        load(converted_directory(), reader_threads=count)


@pytest.mark.parametrize("failing", ["adapter", "trace", "tokenizer"])
def test_an_error_after_experts_were_attached_closes_their_files(failing, damaged, tmp_path):
    options = {"expert_memory": "100kB"}
    if failing == "adapter":
        options["adapter_path"] = tmp_path / "adapter"
        options["adapter_path"].mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_parameters": {}}')
        mx.save_safetensors(str(tmp_path / "adapter" / "adapters.safetensors"), {"model.other": mx.zeros((2,))})
    elif failing == "trace":
        options["trace"] = tmp_path / "no such folder" / "routes"
    else:
        (damaged / "tokenizer.json").write_text("{")
    threads, files = threading.active_count(), open_files(damaged)
    with pytest.raises(MimoError) as raised:
        load(damaged, **options)
    del raised  # with the frames that hold the model
    assert (threading.active_count(), open_files(damaged)) == (threads, files)


def open_files(directory) -> list[str]:
    return sorted(file.path for file in psutil.Process().open_files() if str(directory) in file.path)


@pytest.mark.parametrize("memory", [0, -5, "0GB", "much"])
def test_load_rejects_expert_memory_that_is_not_a_size(memory):
    with pytest.raises(UsageError, match="size"):
        load(converted_directory(), expert_memory=memory)
