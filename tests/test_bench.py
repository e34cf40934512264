"""bench: what it reports, that a limit limits, that the peer computes the same tokens, and the synthetic model."""

import json
import os
import time

import mlx.core as mx
import pytest
from converted import converted_directory

from mlx_mimo import load
from mlx_mimo.bench import Peer, bench, build_parser
from mlx_mimo.convert.recipe import named
from mlx_mimo.errors import UsageError
from mlx_mimo.models.config import ModelArgs
from mlx_mimo.runtime.budget import estimate, measure
from mlx_mimo.runtime.synthetic import parameters, synthetic_config, write_synthetic
from mlx_mimo.runtime.throttle import Throttle
from mlx_mimo.runtime.timing import Case, Spread, forced, run_case, split

SHORT = ("--prompt-tokens", "8", "--generation-tokens", "4", "--repeats", "2", "--warmup", "0")


def run_bench(capsys, *arguments) -> dict:
    assert bench(build_parser().parse_args([*map(str, arguments), "--json"])) == 0
    return json.loads(capsys.readouterr().out)


def test_a_row_for_every_combination(tmp_path, capsys):
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


def test_figures_follow_from_the_samples(capsys):
    row = run_bench(capsys, "--model", converted_directory(), *SHORT, "--expert-memory", "25%")["rows"][0]
    speeds = sorted(3 / sample["decode_s"] for sample in row["samples"])
    assert row["decode_tps"] == {"median": sum(speeds) / 2, "least": speeds[0], "most": speeds[1]}
    hits, misses = (sum(s[name] for s in row["samples"]) for name in ("decode_hits", "decode_misses"))
    assert hits + misses == 2 * 3 * 3 * 2  # repeats, tokens, MoE layers, experts a token
    assert row["decode_hit_rate"] == hits / (hits + misses)


def test_a_disk_limit_holds_reads_back():
    throttle, size = Throttle(20e6), 1 << 20
    handle = os.open("/dev/zero", os.O_RDONLY)
    try:
        began = time.perf_counter()
        for _ in range(3):
            assert throttle(handle, [memoryview(bytearray(size))], 0) == size
        assert time.perf_counter() - began >= 3 * size / 20e6
    finally:
        os.close(handle)


@pytest.mark.filterwarnings("ignore:expert memory")
def test_the_limit_shows_in_the_figures(capsys):
    arguments = ("--model", converted_directory(), *SHORT, "--expert-memory", "10%")
    row = run_bench(capsys, *arguments, "--disk-limit", "300kB/s")["rows"][0]
    assert row["disk_bytes_per_token"] * row["decode_tps"]["most"] <= 300e3 * 1.05
    assert row["decode_read_share"] > 0.3


def test_a_limit_on_what_is_never_read_is_refused(capsys):
    with pytest.raises(UsageError, match="nothing is read"):
        run_bench(capsys, "--model", converted_directory(), *SHORT, "--expert-memory", "all", "--disk-limit", "1GB/s")


@pytest.mark.filterwarnings("ignore:expert memory")
def test_given_tokens_are_what_the_model_runs_on():
    """Two runs over the same tokens need the same experts, whatever the model itself would have said."""
    model, _ = load(converted_directory(), expert_memory=1)
    case = Case(prompt_tokens=5, depth=3, generation_tokens=4)
    tokens = list(range(20))
    samples = [run_case(model, case, tokens) for _ in range(2)]
    model.residency.close()
    assert samples[0].decode_misses == samples[1].decode_misses == 3 * 3 * 2
    assert samples[0].decode_bytes == samples[1].decode_bytes > 0
    assert split(case, tokens) == ([0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11])
    sampler = forced([7, 9])
    assert [sampler(None).item() for _ in range(3)] == [7, 9, 9]


def test_median_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.slow
def test_the_peer_runs_beside_us(capsys):
    report = run_bench(capsys, "--model", converted_directory(), *SHORT, "--against", "mlx-lm")
    assert [row["system"] for row in report["rows"]] == ["mlx-mimo", "mlx-lm"]
    assert all(row["decode_tps"]["median"] > 0 for row in report["rows"])


@pytest.mark.slow
def test_a_peer_that_cannot_load_is_said_to_have_ended(tmp_path):
    with pytest.raises(Exception, match="its process ended"), Peer(tmp_path):
        pass


@pytest.mark.parametrize("size", [2, 8, 60])
@pytest.mark.parametrize("recipe", ["4bit", "mxfp4"])
def test_a_synthetic_model_has_the_size_that_was_asked_for(size, recipe):
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


def test_a_synthetic_model_too_small_is_refused():
    with pytest.raises(UsageError, match="at least"):
        synthetic_config(10**8, "4bit")


@pytest.mark.parametrize("recipe", ["4bit", "mxfp4"])
def test_a_synthetic_model_loads_and_says_something_finite(tmp_path, recipe):
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


def test_wrong_flags_are_refused():
    for arguments in (
        ["--expert-memory", "some"],
        ["--recipe", "4bit"],
        ["--disk-limit", "quick"],
        ["--model", "/no/such"],
    ):
        with pytest.raises(UsageError):
            bench(build_parser().parse_args([*arguments, *SHORT]))
