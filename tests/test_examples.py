"""Every script in examples/ runs as its first line says."""

import runpy
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from converted import converted_directory, fp8_directory

from mlx_mimo.convert.recipe import named
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
