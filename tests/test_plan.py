"""plan: whether a model fits and how fast it is, from config.json alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import tiny_config
from support.converted import converted_directory, fp8_directory, stacked_directory

from mlx_mimo.config import released
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import MimoError, UsageError
from mlx_mimo.experts import simulate as simulate_module
from mlx_mimo.experts import trace as trace_module
from mlx_mimo.experts.trace import TraceWriter
from mlx_mimo.plan import build_parser, plan, subject_of, tokens
from mlx_mimo.planning.forecast import HIT_RATES, forecast, hit_rate
from mlx_mimo.planning.machine import CHIP_BANDWIDTH, GIB, MACS, imagined, read_speed, working_set
from mlx_mimo.planning.plan import advice, make_plan

ARGS = ModelArgs.from_dict(released.CONFIG)
GB = 10**9


def mac(gib: int, disk: float, bandwidth: float):
    return imagined(f"{gib} GiB", gib * GIB, disk * GB, bandwidth * GB)


# Seven machines, from a base Air to a Mac Studio: what is chosen on each. A change here is a change for users.
PINNED = [
    # GiB, disk GB/s, bandwidth GB/s, recipe → slots, prefill chunk, decode and prefill tokens a second
    (16, 2.5, 100, "4bit", None, None, None, None),  # does not fit
    (24, 2.8, 100, "2bit", 538, 2048, 1.0, 54),
    (36, 5.0, 150, "3bit", 1164, 2048, 1.8, 73),
    (48, 6.0, 273, "4bit", 1816, 2048, 2.6, 72),
    (64, 17.0, 307, "4bit", 2644, 2048, 6.8, 184),
    (128, 7.0, 546, "4bit", 5807, 4096, 8.6, 277),
    (256, 7.0, 819, "4bit", 12032, 2048, 41.0, 492),
]


@pytest.mark.parametrize(("gib", "disk", "bandwidth", "recipe", "slots", "chunk", "decode", "prefill"), PINNED)
def test_choices_on_seven_machines(gib, disk, bandwidth, recipe, slots, chunk, decode, prefill):
    planned = make_plan(subject_of(None, recipe), ARGS, 32768, mac(gib, disk, bandwidth))
    found = planned.forecast
    if slots is None:
        assert found is None
        return
    assert (found.slots, planned.budget.chunk) == (slots, chunk)
    assert found.decode_tps.expected == pytest.approx(decode, abs=0.05)
    assert found.prefill_tps.expected == pytest.approx(prefill, abs=0.5)
    assert found.all_resident == (slots == 12032)
    assert found.total_bytes < working_set(gib * GIB)


@pytest.mark.parametrize(("kernels", "slots", "decode"), [(True, 3359, 1.37), (False, 3000, 1.28)])
def test_choices_on_a_cpu(monkeypatch, kernels, slots, decode):
    """64 GiB, two memory channels, a fast SSD. Without the kernels scales and trunk are in float32."""
    monkeypatch.setattr("mlx_mimo.planning.backend.kernels_available", lambda: kernels)
    machine = imagined("cpu", 64 * GIB, 3e9, 40e9, backend="cpu")
    planned = make_plan(subject_of(None, "4bit"), ARGS, 32768, machine)
    assert (planned.forecast.slots, planned.budget.chunk) == (slots, 2048)
    assert planned.forecast.decode_tps.expected == pytest.approx(decode, abs=0.005)


def run_plan(capsys, *arguments) -> dict:
    code = plan(build_parser().parse_args([*map(str, arguments), "--json"]))
    return json.loads(capsys.readouterr().out) | {"exit": code}


def test_json_of_the_released_model_needs_no_download(capsys):
    fields = run_plan(capsys, "--memory", "64GB", "--ssd", "6GB/s", "--bandwidth", "400GB/s")
    assert fields["schema_version"] == 1
    assert fields["exit"] == 0
    assert fields["fits"]
    assert (fields["model"], fields["recipe"], fields["context"]) == ("MiMo-V2-Flash", "4bit", 32768)
    assert fields["experts"]["count"] == 12032
    assert fields["experts"]["slots"] == fields["bytes"]["pool"] // fields["experts"]["slot_bytes"]
    parts = fields["bytes"]
    assert parts["total"] == parts["trunk"] + parts["kv"] + parts["transients"] + parts["pool"]
    speed = fields["forecast"]["decode_tps"]
    assert speed["low"] < speed["expected"] < speed["high"]
    assert fields["machine"]["disk_from"] == "given"
    assert fields["assumptions"]
    assert all(row["decode_tps"] > speed["expected"] for row in fields["would_help"])


def test_plan_refuses_a_machine_that_is_too_small(capsys):
    fields = run_plan(capsys, "--memory", "16GB")
    assert fields["exit"] == 1
    assert not fields["fits"]
    assert "before the first expert" in fields["refusal"]
    assert any(row["what"].startswith("more memory") for row in fields["would_help"])


def test_the_plan_of_a_converted_directory_measures_its_files(capsys):
    directory = converted_directory()
    fields = run_plan(capsys, "--model", directory, "--context", 1000, "--memory", "64GB", "--ssd", "6GB/s")
    assert fields["recipe"] == "4bit"
    on_disk = sum(path.stat().st_size for path in directory.glob("model-experts-*.safetensors"))
    assert fields["bytes"]["all_experts"] == pytest.approx(on_disk, rel=0.5)
    assert fields["experts"]["all_resident"]


def test_a_directory_with_nothing_but_config_is_enough(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    only_config = run_plan(capsys, "--model", tmp_path, "--context", 1000, "--memory", "64GB")
    whole = run_plan(capsys, "--model", fp8_directory(), "--context", 1000, "--memory", "64GB")
    assert only_config["bytes"] == whole["bytes"]


def test_the_table_has_a_row_for_every_common_mac(capsys):
    assert plan(build_parser().parse_args(["--all", "--recipe", "2bit"])) == 0
    text = capsys.readouterr().out
    assert all(machine.name in text for machine in MACS)
    assert "does not fit" in text
    assert run_plan(capsys, "--all")["machines"][-1]["experts"]["all_resident"]


def test_the_text_names_what_is_assumed_and_what_would_help(capsys):
    plan(build_parser().parse_args(["--memory", "48GB", "--ssd", "6GB/s", "--bandwidth", "273GB/s"]))
    text = capsys.readouterr().out
    for words in ("trunk", "KV caches", "expert pool", "hit rate", "A forecast", "what would help", "--recipe"):
        assert words in text


def test_advice_is_ordered_by_the_speed_it_gives():
    subject, machine = subject_of(None, "4bit"), mac(48, 6.0, 273)
    now = make_plan(subject, ARGS, 32768, machine)
    helps = advice(subject, ARGS, 32768, now)
    speeds = [tps for _, tps in helps]
    assert speeds == sorted(speeds, reverse=True)
    assert {text.partition(":")[0] for text, _ in helps} >= {"a smaller recipe", "more memory", "a faster disk"}
    # An all-resident machine is not told to buy anything.
    resident = make_plan(subject, ARGS, 32768, mac(256, 7.0, 819))
    assert not [text for text, _ in advice(subject, ARGS, 32768, resident) if "memory" in text or "disk" in text]


def test_more_memory_or_a_faster_disk_is_never_slower():
    subject = subject_of(None, "4bit")
    previous = 0.0
    for gib in (24, 32, 36, 48, 64, 96, 128, 192, 256):
        speed = make_plan(subject, ARGS, 32768, mac(gib, 6.0, 400)).forecast.decode_tps.expected
        assert speed > previous
        previous = speed
    speeds = [
        make_plan(subject, ARGS, 32768, mac(64, disk, 400)).forecast.decode_tps.expected for disk in (1, 3, 6, 17)
    ]
    assert speeds == sorted(set(speeds))


def test_the_assumed_hit_rates_agree_with_the_published_ones():
    assert 0.64 <= hit_rate(0.125).low <= hit_rate(0.125).high <= 0.71
    assert 0.80 <= hit_rate(0.25).low <= hit_rate(0.25).high <= 0.87
    assert hit_rate(1.0).expected == 1.0
    assert hit_rate(0.0).expected == 0.0
    for column in (1, 2, 3):
        values = [row[column] for row in HIT_RATES]
        assert values == sorted(values)


def test_the_bytes_a_token_reads_are_those_of_the_released_model():
    """A token uses 5.32 GB of experts; at a hit rate of 0.9 and 10 GB/s reading takes 53 ms."""
    subject, machine = subject_of(None, "4bit"), mac(128, 10.0, 546)
    budget = subject.budget(ARGS, 32768, machine)
    found = forecast(ARGS, budget, machine, budget.experts // 2, 2048)
    missed = found.disk_bytes_per_token.expected / (1 - found.hit_rate.expected)
    assert missed / 1e9 == pytest.approx(5.32, abs=0.01)
    assert 0.1 * missed / 10e9 == pytest.approx(0.053, abs=0.001)


def write_trace(path, layers=(1, 2, 3), experts=8, calls=64):
    rng = np.random.default_rng(0)
    writer = TraceWriter(path, layers, experts, 2)
    for _ in range(calls):
        for layer in layers:
            writer(layer, rng.permutation(experts)[None, :2])
    writer.close()
    return path


def test_a_trace_replaces_the_assumed_hit_rate(tmp_path, capsys):
    trace = write_trace(tmp_path / "trace.bin")
    base = ("--model", converted_directory(), "--context", 1000, "--memory", "64GB", "--expert-memory", "120kB")
    assumed = run_plan(capsys, *base)
    measured = run_plan(capsys, *base, "--trace", trace)
    assert 0 < measured["experts"]["share"] < 1
    assert measured["forecast"]["hit_rate"] != assumed["forecast"]["hit_rate"]
    with pytest.raises(UsageError, match="3 layers"):
        run_plan(capsys, "--trace", trace, "--memory", "64GB")


def test_the_assumptions_name_the_source_of_the_hit_rate(tmp_path, capsys):
    trace = write_trace(tmp_path / "trace.bin")
    base = ("--model", converted_directory(), "--context", 1000, "--memory", "64GB", "--expert-memory", "120kB")
    assumed, known = (run_plan(capsys, *base, *more)["assumptions"] for more in ((), ("--trace", trace)))
    assert [line for line in assumed if line.startswith("hit rates as others measured")]
    assert [line for line in known if line.startswith("hit rates of trace.bin, replayed")]
    assert not [line for line in known if "others" in line]


def test_with_everything_resident_a_trace_reads_nothing(tmp_path, capsys):
    """The trace's cold misses are those of an empty pool; here all experts are read before the first token."""
    trace = write_trace(tmp_path / "trace.bin", calls=2)
    fields = run_plan(capsys, "--model", converted_directory(), "--context", 1000, "--memory", "64GB", "--trace", trace)
    assert fields["experts"]["all_resident"]
    assert fields["forecast"]["hit_rate"] == {"low": 1.0, "expected": 1.0, "high": 1.0}
    assert fields["forecast"]["disk_bytes_per_token"]["high"] == 0


def test_plan_rejects_a_file_that_is_not_a_trace(tmp_path, capsys):
    base = ("--model", converted_directory(), "--context", 1000, "--memory", "64GB")
    (tmp_path / "damaged.bin").write_bytes(b"not a trace at all")
    for name, message in (("missing.bin", "cannot be read"), ("damaged.bin", "not a routing trace")):
        with pytest.raises(MimoError, match=message):
            run_plan(capsys, *base, "--trace", tmp_path / name)
    with pytest.raises(UsageError, match="without a single token"):
        run_plan(capsys, *base, "--trace", write_trace(tmp_path / "empty.bin", calls=0))


def test_a_trace_is_read_once_and_simulated_once_for_each_size(tmp_path, monkeypatch):
    reads, runs = [], []
    read, run = trace_module.read_trace, simulate_module.simulate
    monkeypatch.setattr(trace_module, "read_trace", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(
        simulate_module,
        "simulate",
        lambda trace, policy, slots, **more: runs.append(slots) or run(trace, policy, slots, **more),
    )
    trace = write_trace(tmp_path / "trace.bin", layers=ARGS.moe_layers, experts=256, calls=4)
    assert plan(build_parser().parse_args(["--all", "--json", "--trace", str(trace)])) == 0
    assert len(reads) == 1
    assert len(runs) == 2 * len(set(runs)) < 2 * len(MACS)  # LFU and LRU; Macs of one memory have the same slots


def test_advice_uses_the_given_expert_memory_and_trace(tmp_path, capsys):
    """With 20 GB for experts more memory changes nothing; with a trace its hit rates decide."""
    base = ("--memory", "64GB", "--ssd", "6GB/s", "--bandwidth", "273GB/s")
    assert any("more memory" in row["what"] for row in run_plan(capsys, *base)["would_help"])
    fixed = run_plan(capsys, *base, "--expert-memory", "20GB")
    assert not any("more memory" in row["what"] for row in fixed["would_help"])
    assert any("a smaller recipe" in row["what"] for row in fixed["would_help"])
    trace = write_trace(tmp_path / "trace.bin", layers=ARGS.moe_layers, experts=256, calls=4)
    told = run_plan(capsys, *base, "--expert-memory", "20GB", "--trace", trace)
    speed = told["forecast"]["decode_tps"]["expected"]
    faster = next(row for row in told["would_help"] if "a faster disk" in row["what"])
    assert speed < faster["decode_tps"] <= 2 * speed  # the assumed hit rates would make it more than that
    assert told["forecast"]["hit_rate"]["expected"] < fixed["forecast"]["hit_rate"]["expected"] / 2


# How much is needed


def test_a_size_for_experts_must_leave_room_for_everything_else(capsys):
    """Of 24 GB 18 are asked for experts; trunk, caches and activations exceed the rest."""
    base = ("--memory", "40GB", "--available", "24GB")
    fields = run_plan(capsys, *base, "--expert-memory", "18GB")
    assert (fields["exit"], fields["fits"]) == (1, False)
    assert "--expert-memory asks for 18.0 GB, and 7.5 GB are needed besides" in fields["refusal"]
    least = run_plan(capsys, *base, "--expert-memory", "16GB")
    assert least["fits"]
    assert least["bytes"]["total"] <= 24 * GB


def test_plan_accepts_a_size_on_a_small_machine_as_load_does(capsys):
    """auto leaves 4 GB to the system; a size that the user gives is granted."""
    base = ("--memory", "16GB", "--available", "11GB")
    assert not run_plan(capsys, *base)["fits"]
    fields = run_plan(capsys, *base, "--expert-memory", "3GB")
    assert fields["fits"]
    assert fields["experts"]["slots"] == 3 * GB // fields["experts"]["slot_bytes"]
    assert fields["chunk"] == 512


def test_a_refusal_counts_the_systems_memory_once(capsys):
    refusal = run_plan(capsys, "--memory", "16GB")["refusal"]
    assert "7.5 GB are needed before the first expert, and 4.0 GB are left to the system" in refusal


def test_the_chunk_is_printed(capsys):
    fields = run_plan(capsys, "--memory", "128GB")
    assert fields["chunk"] == 4096
    assert any("chunks of 4096" in line for line in fields["assumptions"])
    plan(build_parser().parse_args(["--memory", "128GB"]))
    assert "of a prefill chunk of 4,096 tokens" in capsys.readouterr().out


# What is there already


def quantised(directory, quantization: dict):
    config = {name: value for name, value in tiny_config().items() if name != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    return directory


EXPERTS = "model.layers.2.mlp.switch_mlp."


@pytest.mark.parametrize(
    ("quantization", "recipe"),
    [
        ({"group_size": 64, "bits": 8}, "8bit"),
        ({"group_size": 64, "bits": 3, "mode": "affine"}, "3bit"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mxfp4"),
        ({"group_size": 64, "bits": 6, "model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 8}}, "6bit"),
        ({"group_size": 32, "bits": 4}, None),
        ({"group_size": 64, "bits": 4, f"{EXPERTS}down_proj": {"group_size": 64, "bits": 6}}, None),
    ],
)
def test_a_directory_that_mlx_lm_quantised_is_planned_with_its_recipe(tmp_path, capsys, quantization, recipe):
    arguments = ("--model", quantised(tmp_path, quantization), "--context", 1000, "--memory", "64GB")
    if recipe is None:
        with pytest.raises(UsageError, match="give --recipe"):
            run_plan(capsys, *arguments)
        recipe = "5bit"
        arguments += ("--recipe", recipe)
    fields = run_plan(capsys, *arguments)
    assert fields["recipe"] == recipe
    assert fields["experts"]["slot_bytes"] == run_plan(capsys, *arguments, "--recipe", recipe)["experts"]["slot_bytes"]


def test_stacked_experts_must_all_fit(tmp_path, capsys):
    """A directory of mlx-lm's cannot stream, so plan refuses it as load does."""
    directory = stacked_directory(tmp_path)
    fields = run_plan(capsys, "--model", directory, "--memory", "64GB")
    assert (fields["recipe"], fields["experts"]["all_resident"]) == ("4bit", True)
    fields = run_plan(capsys, "--model", directory, "--memory", "64GB", "--available", "1MB")
    assert "stacked ones must all be resident" in fields["refusal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/directory"], "no such directory"),
        (["--recipe", "9bit"], "recipe"),
        (["--context", "1000000"], "max_position_embeddings"),
        (["--memory", "lots"], "24GB"),
        (["--memory", "64GB", "--ssd", "quick"], "6GB/s"),
        (["--expert-memory", "some"], "24GB"),
        (["--memory", "64GB", "--ssd", "6"], "a unit"),
        (["--memory", "64GB", "--bandwidth", "0.5"], "6GB/s"),
        (["--memory", "64GB", "--ssd", "10Gb/s"], "bits"),
        (["--memory", "64GB", "--available", "65GB"], "--available"),
        (["--all", "--memory", "64GB"], "--all"),
        (["--all", "--ssd", "6GB/s"], "--all"),
        (["--all", "--bandwidth", "400GB/s"], "--all"),
        (["--all", "--available", "6GB"], "--all"),
        (["--all", "--backend", "cpu"], "--all"),
    ],
)
def test_wrong_flags_are_refused(arguments, message):
    with pytest.raises(MimoError, match=message) as error:
        plan(build_parser().parse_args(arguments))
    assert error.value.exit_code == 2


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(model_type="llama")))
    with pytest.raises(MimoError, match="model_type"):
        plan(build_parser().parse_args(["--model", str(tmp_path)]))


def test_the_default_context_is_at_most_the_models_maximum(capsys):
    assert run_plan(capsys, "--model", converted_directory(), "--memory", "64GB")["context"] == 4096


def test_context_is_parsed_in_units_of_1024():
    assert (tokens("32k"), tokens("4096")) == (32768, 4096)


def test_this_machine_is_planned_without_mlx():
    """Importing MLX or transformers would take most of a second."""
    code = (
        "import sys; sys.argv = ['plan', '--json', '--context', '4k']; "
        "from mlx_mimo.plan import main; main(); "
        "sys.exit('imported' if {'transformers', 'torch'} & set(sys.modules) "
        "or (sys.platform == 'linux' and 'mlx.core' in sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["machine"]["memory"] > 0


def test_every_mac_of_the_table_has_its_chips_bandwidth():
    assert all(machine.bandwidth / GB in CHIP_BANDWIDTH.values() for machine in MACS)
    assert next(m for m in MACS if "M4 Max" in m.name).bandwidth == 546 * GB
    assert next(m for m in MACS if m.name.startswith("MacBook Pro M5 32")).bandwidth == 153 * GB


def test_disk_speed_is_measured_on_the_models_files(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(1 << 20))
    assert read_speed([path], seconds=0, piece=1 << 16) > 0
    assert read_speed([path], piece=1 << 22) is None


def test_every_json_field_is_documented(capsys):
    page = (Path(__file__).parents[1] / "docs" / "JSON.md").read_text(encoding="utf-8")
    table = page.partition("## plan")[2].partition("## bench")[0]
    fields = run_plan(capsys, "--memory", "64GB", "--ssd", "6GB/s")
    names = {*fields, "machines", *fields["machine"], *fields["bytes"], *fields["experts"], *fields["forecast"]} - {
        "exit",
        "name",
    }
    assert not [name for name in names if f"`{name}`" not in table]
