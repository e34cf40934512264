"""Every script in examples/ and examples/measure/ runs as its docstring says and prints right answers."""

import importlib.util
import json
import operator
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from mlx_lm.utils import load_model, save_model
from support.converted import converted_directory, fp8_directory

from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config import released
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.experts.policy import DEFAULT_HALF_LIFE_TOKENS, make_policy
from mlx_mimo.experts.residents import Residents
from mlx_mimo.experts.trace import read_trace
from mlx_mimo.planning.backend import kernels_available as cpu_kernels
from mlx_mimo.planning.budget import estimate
from mlx_mimo.planning.machine import MACS, imagined
from mlx_mimo.runtime.load import load_tokenizer
from mlx_mimo.runtime.source import find
from mlx_mimo.units import GB

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, cwd: Path, *arguments) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a script in this process, in an empty folder, and returns what it printed."""

    def run(name: str, *arguments) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def module_of(name: str):
    """Imports a script as a module, so that a test can make its sizes small."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


# Scripts to copy, on the demo and without arguments


def test_generate_answers_its_question(run_here):
    assert run_here("generate") == "85\n"


def test_a_tool_is_called_and_the_answer_uses_its_result(run_here):
    assert run_here("chat_with_tools").splitlines() == [
        "the model calls calculate({'expression': '4218 - 4176'})",
        "answer: 42",
    ]


@pytest.mark.parametrize("expression", ["1 / 2", "one + two", "import os", "2 ** 9", "1 + 2 + 3"])
def test_the_tool_evaluates_one_operation_only(expression):
    source = (EXAMPLES / "chat_with_tools.py").read_text(encoding="utf-8")
    names = {}
    exec(source[source.index("def calculate") : source.index("def tool(")], {"operator": operator}, names)
    assert names["calculate"]("17 * 25") == 425
    with pytest.raises((KeyError, ValueError)):
        names["calculate"](expression)


def test_a_batch_answers_each_question(run_here):
    lines = run_here("batch").splitlines()
    answers = dict(zip(lines[::2], map(str.strip, lines[1::2])))
    assert answers == {
        "What is 2 plus 3?": "5",
        "What is the capital of France?": "Paris",
        "Sort 41, 7, 23.": "7, 23, 41",
    }


@pytest.mark.long
def test_a_sweep_shows_more_hits_with_more_memory(run_here, tmp_path):
    rows = re.findall(r"(\d+)% resident: +([\d.]+)% hits, +([\d.]+) tokens/s", run_here("budget_sweep"))
    assert [row[0] for row in rows] == ["15", "25", "50", "75"]
    hits = [float(row[1]) for row in rows]
    assert hits == sorted(hits)
    assert hits[0] + 20 < hits[-1] < 100
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_makes_the_second_start_warm(run_here, tmp_path):
    text = run_here("warm_profile")
    read = [int(count) for count in re.findall(r"\((\d+) experts read for the profile\)", text)]
    hits = [float(rate) for rate in re.findall(r"([\d.]+)% hits", text)]
    assert read == [0, 40], "a quarter of 160 experts"
    assert hits[0] < hits[1]
    assert (tmp_path / "usage.profile").exists()


def test_a_recorded_trace_is_replayed(run_here, tmp_path):
    lines = run_here("replay_trace").splitlines()
    trace = read_trace(tmp_path / "routing.trace")
    assert lines[0] == f"{len(trace.calls)} calls, {trace.routed} routed experts, 160 experts in all"
    assert lines[1].split() == ["resident", "lfu", "lru", "belady"]
    for share, line in zip((5, 10, 25, 50), lines[2:], strict=True):
        rates = [float(cell.rstrip("%")) for cell in line.split()]
        assert rates[0] == share
        assert max(rates[1:3]) <= rates[3]


def test_a_hub_repo_is_fetched_and_converted_as_the_command_does(run_here, tmp_path, monkeypatch):
    fetched = []

    def snapshot_download(repo, allow_patterns):
        fetched.append(repo)
        assert {"*.json", "*.safetensors"} <= set(allow_patterns)
        return str(fp8_directory())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run_here("convert_from_hub", "somebody/model", "out", "3bit").endswith("converted into out\n")
    assert fetched == ["somebody/model"]
    wanted = {file.name: file.read_bytes() for file in converted_directory("3bit").glob("*.safetensors")}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")} == wanted


# Other directories


@pytest.fixture
def stacked(tmp_path):
    """A directory as mlx-lm's own convert writes it."""
    path = tmp_path / "stacked"
    shutil.copytree(converted_directory(), path, ignore=shutil.ignore_patterns("model*", "mlx_mimo.json"))
    model, _ = load_model(converted_directory())
    save_model(path, model)
    config = json.loads((path / "config.json").read_text())
    config.pop("mlx_mimo", None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_generate_runs_on_stacked_experts(run_here, stacked):
    assert len(run_here("generate", "Say something.", stacked)) > 1


@pytest.mark.parametrize("name", ["budget_sweep", "warm_profile", "replay_trace"])
def test_a_script_that_needs_separate_experts_names_the_repack_command(run_here, stacked, name):
    with pytest.raises(SystemExit, match="stacked.*; run mlx_mimo convert repack"):
        run_here(name, stacked)


# Scripts that measure run and print their tables


def test_held_out_questions_are_taken_each_once():
    spread = module_of("measure/demo_quality").spread
    assert spread([*range(419)], 420) == spread([*range(419)], 419) == [*range(419)]
    assert spread([*range(10)], 5) == [0, 2, 4, 6, 8]


def test_quality_is_measured_on_the_answers_tokens_alone():
    quality = module_of("measure/demo_quality")
    items = [json.loads(line) for line in (quality.DEMO / "heldout.jsonl").read_text().splitlines()[::40]]
    tokenizer = load_tokenizer(find(None))
    answers = [tokenizer.decode(text.answer) for text in quality.texts(tokenizer, items)]
    assert answers == [item["answer"] + "<|im_end|>" for item in items if item["tools"] is None]


@pytest.mark.long
def test_the_quality_table_has_a_row_a_recipe(run_here):
    lines = run_here("measure/demo_quality", "--recipes", "8bit,2bit", "--limit", 20).splitlines()
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    assert head == ["recipe", "bits per expert weight", "exact match", "mean KL", "99 % KL", "top-1 agreement"]
    assert [row[0] for row in rows] == ["8bit", "2bit"]
    assert [float(row[1]) for row in rows] == [8.5, 2.5]
    assert int(rows[0][2].partition("/")[0]) >= 17
    assert float(rows[0][3]) < float(rows[1][3]) / 5
    assert float(rows[0][5].rstrip("%")) > 98


@pytest.mark.long
def test_the_table_of_policies_is_printed(run_here, tmp_path):
    lines = run_here(
        "measure/residency_policies",
        "--tokens",
        100,
        "--only",
        "zipf",
        "--demo",
        2,
        "--half-life",
        "32",
        "--save",
        "traces",
    ).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        [name, share] for name in ("zipf", "demo") for share in ("5%", "10%", "25%", "50%")
    ]
    for row in rows:
        assert max(float(row[2]), float(row[3])) <= float(row[4]), "nothing beats belady"
    assert read_trace(tmp_path / "traces" / "zipf.trace").routed == 100 * 12 * 8


@pytest.mark.long
def test_a_cpu_step_is_split_into_its_parts(tmp_path):
    if not cpu_kernels():
        pytest.skip("no CPU kernels")
    text = example("measure/cpu_step", tmp_path, "--model", converted_directory(), "--steps", 3, "--context", 8)
    parts = re.findall(r"^(\w.*?) {2,}([\d.]+) ms", text, flags=re.M)
    assert {"experts", "q, k, v", "attention", "router", "head"} <= {name for name, _ in parts}
    assert all(float(spent) >= 0 for _, spent in parts)


@pytest.mark.long
def test_kernels_are_timed_against_memory(tmp_path):
    if not cpu_kernels():
        pytest.skip("no CPU kernels")
    text = example("measure/cpu_bench", tmp_path, "--bits", 2, "--mxfp4", "--slots", 16, "--repeats", 2)
    assert re.search(r"^2 bits, groups of 64 +expert layer, one token +[\d.]+", text, flags=re.M)
    assert re.search(r"^mxfp4 +expert layer, one token +[\d.]+", text, flags=re.M)
    assert len(re.findall(r"512 tokens +\d+ GFLOP/s", text)) == 2


@pytest.mark.long
def test_residency_is_measured_part_by_part(tmp_path, monkeypatch, capsys):
    """With small experts. The part `memory` is left out: it starts a process with experts of full size."""
    bench = module_of("measure/residency_bench")
    for name, value in {"HIDDEN": 256, "INNER": 128, "EXPERTS": 64}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(sys, "argv", ["residency_bench.py", "make", str(tmp_path), "--layers", "1"])
    bench.main()
    options = ["--rounds", "1", "--tokens", "64", "--only", "reading,decode,hits,prefill"]
    monkeypatch.setattr(sys, "argv", ["residency_bench.py", "run", str(tmp_path), *options])
    bench.main()
    text = capsys.readouterr().out
    for part in ("reading", "decode", "hits", "prefill"):
        assert re.search(rf"^{part}\b.*\d", text, flags=re.M), part


@pytest.mark.long
def test_the_simulation_prints_a_line_for_each_mac(run_here, tmp_path):
    text = run_here("measure/simulate_macs", "--tokens", 400, "--plot", tmp_path / "simulated.svg")
    for machine in MACS:
        assert re.search(rf"^\| {re.escape(machine.name)} \| {machine.disk / GB:g} \| .+ \|$", text, flags=re.M)
    assert "simulated" in (tmp_path / "simulated.svg").read_text()


def test_the_simulated_routing_hits_as_often_as_published():
    """LRU in each layer hits 64–71 % with an eighth of 256 experts resident, 80–87 % with a quarter."""
    simulation = runpy.run_path(str(EXAMPLES / "measure" / "simulate_macs.py"))
    runs = [simulation["routing"](500, layers=1, seed=seed) for seed in range(4)]
    rates = [mean(simulation["hit_rate"](needs, 1, slots, "lru", 200) for needs in runs) for slots in (32, 64)]
    assert 0.64 <= rates[0] <= 0.71
    assert 0.80 <= rates[1] <= 0.87


def test_simulated_speed_falls_once_the_system_lacks_memory():
    simulation = runpy.run_path(str(EXAMPLES / "measure" / "simulate_macs.py"))
    args = ModelArgs.from_dict(released.CONFIG)
    budget = estimate(released.CONFIG, named("4bit"), args, 32768, 2048, 2, 2)
    machine = imagined("64 GB", 64 * 2**30, 6e9, 300e9)
    curve = [(0.0, 0.0), (0.125, 0.68), (0.25, 0.82), (1.0, 1.0)]
    speeds = [simulation["speed"](args, budget, machine, size * 10**9, curve) for size in (10, 20, 40, 50, 60, 68)]
    best = speeds.index(max(speeds))
    assert speeds[: best + 1] == sorted(speeds[: best + 1])
    assert speeds[best:] == sorted(speeds[best:], reverse=True)
    assert 0 < best < 5


def test_the_simulation_decays_counts_as_the_package_does():
    """Its hit rates equal those of the package's table with the default half-life."""
    simulation = runpy.run_path(str(EXAMPLES / "measure" / "simulate_macs.py"))
    needs = simulation["routing"](120, layers=1)
    table = Residents((0,), 256, 32, make_policy("lfu", 256, 1, DEFAULT_HALF_LIFE_TOKENS))
    for need in needs:
        for _ in table.schedule(need):
            pass
    assert simulation["hit_rate"](needs, 1, 32, "lfu", 0) == table.hits / (table.hits + table.misses)


@pytest.mark.long
def test_forecasts_are_checked_against_runs(tmp_path):
    """On a tiny model, with one budget, one disk and everything resident, the table equals the JSON."""
    text = example(
        "measure/forecast_check", tmp_path, "--model", converted_directory(), "--expert-memory", "25%", "--disk-limit",
        "50MB/s", "--prompt-tokens", 4, "--generation-tokens", 3, "--repeats", 1, "--json", "check.json",
    )  # fmt: skip
    lines = json.loads((tmp_path / "check.json").read_text())["lines"]
    assert [(line["disk"], line["resident"]) for line in lines] == [(None, 1.0), (50e6, 0.25)]
    assert lines[0]["hits"] == lines[0]["assumed_hits"] == 1.0
    assert lines[0]["plain"] == lines[0]["informed"]
    errors = [line["plain"]["expected"] / line["measured"] - 1 for line in lines]
    cells = [row.split("|")[6].strip() for row in text.splitlines() if re.match(r"\| (not read|50\.0 MB/s) ", row)]
    assert cells == [f"{error:+.0%}" for error in errors]
    assert f"median error {mean(map(abs, errors)):.0%}" in text
    assert re.search(r"[0-2] of 2 runs lie in the range", text)


def test_a_forecast_with_measured_hits_differs_only_in_the_bytes_read():
    """The full model on a 64 GB machine: bench measured 90 % hits, the forecast assumes 67.5 %."""
    check = runpy.run_path(str(EXAMPLES / "measure" / "forecast_check.py"))
    args = ModelArgs.from_dict(released.CONFIG)
    budget = estimate(released.CONFIG, named("4bit"), args, 32768, 2048, 2, 2)
    machine = imagined("64 GB", 64 * 2**30, 6e9, 300e9)
    speed = {"median": 4.0, "least": 3.0, "most": 5.0}
    row = {"slots": budget.num_experts // 8, "resident": 0.125, "decode_hit_rate": 0.9, "decode_tps": speed}
    line = check["compared"](row, 3e9, args, budget, machine)
    assert line.assumed_hits == 0.675
    seconds = 1 / line.plain.expected - 1 / line.informed.expected
    assert seconds == pytest.approx(47 * 8 * budget.record_bytes * (0.9 - 0.675) / (3e9 * 0.85))
    assert line.error == pytest.approx(line.plain.expected / 4.0 - 1)
    assert line.within == (line.plain.low <= 4.0 <= line.plain.high)
