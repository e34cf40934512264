"""Every script in examples/ runs as its first line says."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from converted import converted_directory, fp8_directory

from mlx_mimo.convert.recipe import named
from mlx_mimo.experts.policy import DEFAULT_HALF_LIFE_TOKENS, make_policy
from mlx_mimo.experts.residents import Residents
from mlx_mimo.models.config import ModelArgs
from mlx_mimo.runtime import released
from mlx_mimo.runtime.budget import estimate
from mlx_mimo.runtime.machine import imagined

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, cwd: Path, *arguments) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("generate", ["Say something.", "MODEL"], ""),
        ("chat_with_tools", ["MODEL"], "tool call"),
        ("batch", ["MODEL"], "Say hello."),
        ("budget_sweep", ["MODEL", "sweep.png"], "75% resident"),
        ("warm_profile", ["MODEL", "usage.profile"], "warm: loaded"),
        ("replay_trace", ["MODEL", "routing.trace"], "belady"),
    ],
)
def test_an_example_runs_on_a_tiny_model(tmp_path, name, arguments, said):
    model = converted_directory()
    assert said in example(name, tmp_path, *(model if a == "MODEL" else a for a in arguments))


@pytest.mark.slow
def test_converting_leaves_a_directory_that_loads(tmp_path):
    assert "converted into out" in example("convert_from_hub", tmp_path, fp8_directory(), "out", "3bit")
    assert example("generate", tmp_path, "Say something.", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["generate", "chat_with_tools", "batch", "budget_sweep", "warm_profile", "replay_trace"]
)
def test_an_example_runs_on_the_demo(tmp_path, name):
    """Without arguments, as its reader would try it first."""
    assert example(name, tmp_path)


def test_the_simulations_routing_is_skewed_as_published():
    """LRU in each layer: 64–71 % hits with an eighth of 256 experts resident, 80–87 % with a quarter."""
    simulation = runpy.run_path(str(EXAMPLES / "simulate_macs.py"))
    runs = [simulation["routing"](500, layers=1, seed=seed) for seed in range(4)]
    rates = [mean(simulation["hit_rate"](needs, 1, slots, "lru", 200) for needs in runs) for slots in (32, 64)]
    assert 0.64 <= rates[0] <= 0.71
    assert 0.80 <= rates[1] <= 0.87


def test_simulated_speed_has_its_peak_where_the_system_starves():
    simulation = runpy.run_path(str(EXAMPLES / "simulate_macs.py"))
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
    """Its hit rates are those of the default half-life, whatever that is."""
    simulation = runpy.run_path(str(EXAMPLES / "simulate_macs.py"))
    needs = simulation["routing"](120, layers=1)
    table = Residents((0,), 256, 32, make_policy("lfu", 256, 1, DEFAULT_HALF_LIFE_TOKENS))
    for need in needs:
        for _ in table.schedule(need):
            pass
    assert simulation["hit_rate"](needs, 1, 32, "lfu", 0) == table.hits / (table.hits + table.misses)


def test_forecasts_are_checked_against_runs(tmp_path):
    """One budget, one disk and the whole model resident, on a tiny model: what it prints is what its JSON says."""
    text = example(
        "forecast_check", tmp_path, "--model", converted_directory(), "--expert-memory", "25%", "--disk-limit",
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


def test_a_forecast_that_knows_the_hits_differs_only_in_what_is_read():
    """The full model on a 64 GB machine: bench's row says 90 % hits where 67.5 % are assumed."""
    check = runpy.run_path(str(EXAMPLES / "forecast_check.py"))
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
