"""bench: its report, the disk limit, mlx-lm beside it, the flags it rejects, and synthetic models."""

import json
import os
import platform
import re
import threading
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import psutil
import pytest
from support.converted import converted_directory
from support.patience import DEADLINE, Clock, ClockOfEachThread, wait_until

from mlx_mimo import load
from mlx_mimo.bench import __main__ as bench_module
from mlx_mimo.bench import throttle as throttle_module
from mlx_mimo.bench import timing
from mlx_mimo.bench.__main__ import bench, build_parser
from mlx_mimo.bench.peer import bytes_in_memory, load_peer
from mlx_mimo.bench.report import machine_line
from mlx_mimo.bench.synthetic import parameters, synthetic_config, write_synthetic
from mlx_mimo.bench.throttle import Throttle
from mlx_mimo.bench.timing import Case, Spread, forced_sampler, run_case
from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import MimoError, UsageError
from mlx_mimo.experts import reader as reader_module
from mlx_mimo.planning.budget import estimate, measure
from mlx_mimo.units import format_size

SHORT = ("--prompt-tokens", "8", "--generation-tokens", "4", "--repeats", "2", "--warmup", "0")


def run_bench(capsys, *arguments) -> dict:
    assert bench(build_parser().parse_args([*map(str, arguments), "--json"])) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.long
def test_bench_reports_a_row_for_every_combination(tmp_path, capsys):
    report = run_bench(
        capsys, "--model", converted_directory(), *SHORT, "--context", "0,40", "--expert-memory", "25%,all",
        "--output", tmp_path / "bench.json", "--plot", tmp_path / "bench.png",
    )  # fmt: skip
    assert report["schema_version"] == 1
    assert [(row["expert_memory"], row["context"]) for row in report["rows"]] == [
        ("25%", 0),
        ("25%", 40),
        ("all", 0),
        ("all", 40),
    ]
    streamed, resident = report["rows"][0], report["rows"][2]
    assert streamed["slots"] == 6
    assert streamed["resident"] == 0.25
    assert 0 <= streamed["decode_hit_rate"] < 1
    assert streamed["disk_bytes_per_token"] > 0
    assert 0 < streamed["decode_read_share"] <= 1
    assert resident["decode_hit_rate"] is None
    for row in report["rows"]:
        assert len(row["samples"]) == 2
        for what in ("prefill_tps", "decode_tps"):
            assert 0 < row[what]["least"] <= row[what]["median"] <= row[what]["most"]
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_speeds_and_hit_rates_are_computed_from_the_samples(capsys):
    row = run_bench(capsys, "--model", converted_directory(), *SHORT, "--expert-memory", "25%")["rows"][0]
    speeds = sorted(3 / sample["decode_s"] for sample in row["samples"])
    assert row["decode_tps"] == {"median": sum(speeds) / 2, "least": speeds[0], "most": speeds[1]}
    hits, misses = (sum(s[name] for s in row["samples"]) for name in ("decode_hits", "decode_misses"))
    assert hits + misses == 2 * 3 * 3 * 2  # repeats, tokens, MoE layers, experts a token
    assert row["decode_hit_rate"] == hits / (hits + misses)


def test_a_disk_limit_slows_reads_down_to_its_speed(monkeypatch):
    throttle, size, clock = Throttle(20e6), 1 << 20, Clock()
    monkeypatch.setattr(throttle_module, "time", clock)
    handle = os.open("/dev/zero", os.O_RDONLY)
    try:
        for done in range(1, 4):
            assert throttle(handle, [memoryview(bytearray(size))], 0) == size
            assert clock.perf_counter() == pytest.approx(done * size / 20e6)
        clock.sleep(1)  # in which nothing is asked: the disk saves nothing up
        throttle(handle, [memoryview(bytearray(size))], 0)
        assert clock.perf_counter() == pytest.approx(1 + 4 * size / 20e6)
    finally:
        os.close(handle)


def test_all_threads_together_stay_under_a_disk_limit(monkeypatch):
    """Eight readers at once get the speed of one."""
    throttle, size, each, clock = Throttle(40e6), 1 << 18, 3, ClockOfEachThread()
    monkeypatch.setattr(throttle_module, "time", clock)
    handle = os.open("/dev/zero", os.O_RDONLY)
    ends = []

    def read():
        for _ in range(each):
            throttle(handle, [memoryview(bytearray(size))], 0)
            ends.append(clock.perf_counter())

    workers = [threading.Thread(target=read) for _ in range(8)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        os.close(handle)
    assert sorted(ends) == pytest.approx([done * size / 40e6 for done in range(1, 8 * each + 1)])


@pytest.mark.filterwarnings("ignore:expert memory")
def test_a_disk_limit_shows_in_the_reported_figures(capsys, monkeypatch):
    """On a machine that takes no time for anything but its disk."""
    clock = Clock()
    for module in (throttle_module, timing, reader_module):
        monkeypatch.setattr(module, "time", clock)
    arguments = ("--model", converted_directory(), *SHORT, "--expert-memory", "10%")
    row = run_bench(capsys, *arguments, "--disk-limit", "300kB/s")["rows"][0]
    speeds = [sample["decode_bytes"] / sample["decode_s"] for sample in row["samples"]]
    assert speeds == pytest.approx([300e3] * 2, rel=1e-3)
    assert row["decode_read_share"] == pytest.approx(1)
    assert row["decode_wait_share"] == pytest.approx(1)


def test_waiting_counts_only_time_that_the_models_thread_spends_on_reads(monkeypatch):
    """A read in the background costs nothing until the model waits for it."""
    clock, go_on, wait = Clock(), threading.Event(), reader_module.ReadBatch.wait
    monkeypatch.setattr(timing, "time", clock)
    model, _ = load(converted_directory(), expert_memory=200_000)
    reader = model.residency.reader

    def preadv(*arguments) -> int:
        assert go_on.wait(DEADLINE)
        clock.sleep(0.1)
        return os.preadv(*arguments)

    reader._preadv = preadv
    layer, file = next(iter(reader.files.items()))
    request = reader_module.ReadRequest(layer, 0, [memoryview(bytearray(file.layout.nbytes))])
    with timing.Waiting(reader) as waiting:
        batch = reader.submit([request], background=True)
        go_on.set()
        assert wait_until(lambda: batch.done)
        batch.wait()
        assert waiting.seconds == 0
        go_on.clear()
        monkeypatch.setattr(reader_module.ReadBatch, "wait", lambda batch: (go_on.set(), wait(batch))[1])
        reader.submit([request], background=True).wait()
        assert waiting.seconds == pytest.approx(0.1)
        reader.submit([request])
        assert waiting.seconds == pytest.approx(0.2)
    spent = waiting.seconds
    reader.submit([request])
    assert waiting.seconds == spent, "reads outside of the context were counted"
    model.residency.close()


def test_bench_rejects_a_disk_limit_where_every_expert_is_resident(capsys):
    with pytest.raises(UsageError, match="nothing is read"):
        run_bench(capsys, "--model", converted_directory(), *SHORT, "--expert-memory", "all", "--disk-limit", "1GB/s")


@pytest.mark.filterwarnings("ignore:expert memory")
def test_two_runs_on_the_same_tokens_need_the_same_experts():
    """The given tokens are computed, whatever the model would have chosen."""
    model, _ = load(converted_directory(), expert_memory=1)
    case = Case(prompt_tokens=5, depth=3, generation_tokens=4)
    tokens = list(range(20))
    samples = [run_case(model, case, tokens) for _ in range(2)]
    model.residency.close()
    assert samples[0].decode_misses == samples[1].decode_misses == 3 * 3 * 2
    assert samples[0].decode_bytes == samples[1].decode_bytes > 0
    assert case.cut(tokens) == ([0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11])
    sampler = forced_sampler([7, 9])
    assert [sampler(None).item() for _ in range(3)] == [7, 9, 9]


def test_spread_is_median_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.long
def test_bench_reports_mlx_lm_beside_us(capsys):
    report = run_bench(capsys, "--model", converted_directory(), *SHORT, "--against", "mlx-lm", "--repeats", 1)
    assert [(row["system"], row["resident"]) for row in report["rows"]] == [("mlx-mimo", 1.0), ("mlx-lm", 1.0)]
    assert all(row["decode_tps"]["median"] > 0 for row in report["rows"])
    assert report["rows"][1]["decode_wait_share"] is None


def test_bench_rejects_a_second_copy_that_does_not_fit_into_memory(capsys, monkeypatch):
    directory = converted_directory()
    theirs = bytes_in_memory(directory, 4)
    model = load_peer(directory)
    held = sum(value.nbytes for _, value in nn.utils.tree_flatten(model.parameters()))
    assert theirs == held
    monkeypatch.setattr("mlx_mimo.planning.memory.available_memory", lambda *_: int(1.5 * theirs))
    started = []
    monkeypatch.setattr(bench_module, "Peer", lambda *_: started.append(1))
    with pytest.raises(MimoError, match=r"whole model in mlx-lm takes 2\.1 MB and ours beside it \S+ MB; .* are free"):
        run_bench(capsys, "--model", directory, *SHORT, "--against", "mlx-lm", "--expert-memory", "all")
    assert not started


class FakePeer:
    """Records the tokens of each run."""

    seen: list

    def __init__(self, directory):
        FakePeer.seen = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, case, tokens):
        FakePeer.seen.append(tuple(tokens[: case.tokens]))
        return timing.Sample(1.0, 1.0)


@pytest.mark.parametrize("text", [False, True])
def test_repeats_use_different_tokens_and_systems_and_memories_the_same(tmp_path, capsys, monkeypatch, text):
    """For random tokens and for a text: a repeated prompt would find its experts resident."""
    ours = []

    def run_case(model, case, tokens):
        ours.append(tuple(tokens[: case.tokens]))
        return timing.Sample(1.0, 1.0)

    monkeypatch.setattr(timing, "run_case", run_case)
    monkeypatch.setattr(bench_module, "Peer", FakePeer)
    file = tmp_path / "text.txt"
    file.write_text("".join(map(chr, chain(range(32, 127), range(126, 31, -1)))))
    arguments = ["--prompt-tokens", "8,12", "--generation-tokens", 4, "--repeats", 2, "--warmup", 1]
    arguments += ["--model", converted_directory(), "--against", "mlx-lm", "--expert-memory", "50%,all"]
    run_bench(capsys, *arguments, *(["--text", file] if text else []))
    assert [len(tokens) for tokens in ours] == 2 * (3 * [12] + 3 * [16])
    assert ours[:6] == ours[6:], "both expert memories"
    assert ours == FakePeer.seen, "both systems"
    starts = {tokens[i : i + 4] for tokens in ours[:6] for i in range(0, 12, 4)}
    assert len(starts) == 18, "no piece comes twice"


def test_bench_rejects_a_text_too_short_for_all_runs(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 2)
    arguments = ("--model", converted_directory(), *SHORT, "--repeats", 3)
    with pytest.raises(UsageError, match="has 32 tokens; 36 are needed, since every run reads a piece of its own"):
        run_bench(capsys, *arguments, "--text", tmp_path / "text.txt")


def narrow_directory(directory, recipe="4bit", experts=40):
    """A synthetic model with few weights: its slots can be counted, and scales widened to float32 would show."""
    config = synthetic_config(2 * 10**9, recipe) | {
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "swa_num_attention_heads": 4,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 4,
        "vocab_size": 64,
        "n_routed_experts": experts,
    }
    write_synthetic(directory, config, recipe)
    return directory


@pytest.mark.parametrize("share", [1, 12.5, 25, 60])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.filterwarnings("ignore:expert memory")
def test_a_percentage_of_expert_memory_keeps_that_share_of_experts_resident(tmp_path, monkeypatch, share, kernels):
    """To within half a slot, both with the kernels, which keep 16-bit scales, and without, where they are float32."""
    if not kernels:
        monkeypatch.setattr("mlx_mimo.planning.backend.kernels_available", lambda: False)
    directory = narrow_directory(tmp_path)
    nbytes = bench_module._memory(f"{share}%", directory)
    model, _ = load(directory, expert_memory=nbytes)
    every = len(model.residency.files) * 40
    slots = model.residency.counters.slots
    model.residency.close()
    assert abs(slots - share / 100 * every) <= 0.5


@pytest.mark.parametrize("size", [2, 8, 60])
@pytest.mark.parametrize("recipe", ["4bit", "mxfp4"])
def test_a_synthetic_model_has_the_requested_size(size, recipe):
    config = synthetic_config(size * 10**9, recipe)
    args = ModelArgs.from_dict(config)
    budget = estimate(config, named(recipe), args, 1, 1, 2, 2)
    one = len(args.moe_layers) * budget.slot_bytes
    assert 0 <= size * 10**9 - budget.trunk - budget.experts < 1.1 * one
    assert (args.hidden_size, args.moe_intermediate_size, args.num_attention_heads) == (4096, 2048, 64)


def test_a_narrow_synthetic_model_has_more_experts():
    wide, narrow = synthetic_config(2 * 10**9, "4bit"), synthetic_config(2 * 10**9, "4bit", 4)
    assert narrow["n_routed_experts"] > 8 * wide["n_routed_experts"]
    assert (narrow["hidden_size"], narrow["head_dim"], narrow["num_experts_per_tok"]) == (1024, 192, 8)
    assert parameters(narrow) == pytest.approx(parameters(wide), rel=0.5)


def test_bench_rejects_a_synthetic_size_below_the_smallest_model():
    with pytest.raises(UsageError, match="at least"):
        synthetic_config(10**8, "4bit")


@pytest.mark.parametrize("recipe", ["4bit", "mxfp4"])
def test_a_synthetic_model_loads_and_computes_finite_logits(tmp_path, recipe):
    config = synthetic_config(2 * 10**9, recipe) | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "swa_num_attention_heads": 4,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 4,
        "vocab_size": 64,
    }
    write_synthetic(tmp_path, config, recipe)
    assert measure(tmp_path, ModelArgs.from_dict(config), 8, 8, 2, 2).num_experts > 0
    model, tokenizer = load(tmp_path, expert_memory="all")
    logits = model(mx.array([[3, 5, 7]]))
    assert 0.1 < logits.std().item() < 10
    assert tokenizer.encode("t5", add_special_tokens=False) == [5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert-memory", "some"], "'some'"),
        (["--expert-memory", "x%"], "'x%'; a share above 0%"),
        (["--expert-memory", "25%,0%"], "'0%'; a share above 0%"),
        (["--recipe", "4bit"], "--recipe: goes with --synthetic only"),
        (["--narrow", "2"], "--narrow: goes with --synthetic only"),
        (["--disk-limit", "quick"], "'quick'"),
        (["--model", "/no/such"], "/no/such"),
        (["--generation-tokens", "1"], "--generation-tokens: at least 2"),
        (["--text", "/no/such"], "/no/such cannot be read"),
        (["--output", "/no/such/bench.json"], "--output: .*: no such folder"),
        (["--plot", "/no/such/bench.png"], "--plot: .*: no such folder"),
    ],
)
def test_bench_rejects_wrong_flags_before_it_measures(monkeypatch, arguments, message):
    """Before anything is written, loaded or timed."""
    monkeypatch.setattr(bench_module, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        bench(build_parser().parse_args([*SHORT, *arguments]))


def test_bench_rejects_text_for_a_synthetic_model_before_it_writes_one(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_mimo.bench.synthetic.write_synthetic", lambda *_: pytest.fail("written"))
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(UsageError, match="knows no words"):
        bench(build_parser().parse_args(["--synthetic", "2GB", "--text", str(tmp_path / "text.txt")]))


@pytest.mark.parametrize("subject", [["--synthetic", "2GB"], ["--model", "MODEL"]])
def test_bench_rejects_more_tokens_than_the_model_has_positions(monkeypatch, subject):
    monkeypatch.setattr("mlx_mimo.bench.synthetic.write_synthetic", lambda *_: pytest.fail("written"))
    subject = [str(converted_directory()) if word == "MODEL" else word for word in subject]
    with pytest.raises(UsageError, match="max_position_embeddings is"):
        bench(build_parser().parse_args([*subject, "--context", "0,262144"]))


def test_figures_are_printed_before_a_file_fails_to_be_written(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    with pytest.raises(MimoError, match="cannot be written"):
        run_bench(capsys, "--model", converted_directory(), *SHORT, "--output", tmp_path / "taken")
    assert json.loads(capsys.readouterr().out)["rows"]


def test_the_machine_line_names_processor_cores_and_memory():
    line = machine_line()
    assert line.startswith(f"{platform.system()} {platform.machine()}, ")
    assert f"{os.cpu_count()} cores, {format_size(psutil.virtual_memory().total)} of memory" in line
    assert re.fullmatch(r".+, .*\w.*, \d+ cores, .+", line)
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        with open("/proc/cpuinfo") as info:
            name = next(line for line in info if line.startswith("model name"))
        assert name.partition(":")[2].strip() in line
