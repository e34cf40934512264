"""The replay command prints a table or JSON, writes a plot, and refuses wrong arguments and traces."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mlx_mimo import replay
from mlx_mimo.errors import MimoError, UsageError
from mlx_mimo.experts.simulate import simulate
from mlx_mimo.experts.trace import TraceWriter, read_trace

SLOT_BYTES = 1_000_000


@pytest.fixture
def trace(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "routing.trace"
    writer = TraceWriter(path, (1, 2), 32, 4, "abc", SLOT_BYTES)
    likely = 1 / np.arange(1, 33)
    for _ in range(60):
        for layer in (1, 2):
            writer(layer, rng.choice(32, 4, replace=False, p=likely / likely.sum())[None])
    writer.close()
    return path


def run(capsys, *arguments) -> str:
    replay.replay(replay.build_parser().parse_args([str(a) for a in arguments]))
    return capsys.readouterr().out


def test_json_has_a_row_for_each_policy_and_budget(trace, capsys):
    result = json.loads(run(capsys, trace, "--expert-memory", "8MB,25%,1GB", "--json"))
    assert (result["layers"], result["num_experts"], result["top_k"], result["routed"]) == (2, 32, 4, 480)
    rows = {(row["expert_memory"], row["policy"]): row for row in result["rows"]}
    assert {row["slots"] for row in result["rows"]} == {8, 16, 64}
    for (budget, policy), row in rows.items():
        wanted = simulate(read_trace(trace), policy, row["slots"])
        assert (row["hits"], row["misses"]) == (wanted.hits, wanted.misses)
        assert 0 <= row["shuffled_hit_rate"] <= 1
        assert row["hit_rate"] <= rows[budget, "belady"]["hit_rate"]
        assert row["routed_per_second"] > 0


def test_the_table_has_a_line_for_each_policy(trace, capsys):
    lines = run(capsys, trace, "--expert-memory", "10%", "--policy", "lru,belady").splitlines()
    assert len(lines) == 4
    assert "480 routed experts" in lines[0]
    assert lines[2].split()[3] == "lru"
    assert lines[3].split()[3] == "belady"


def test_slot_bytes_and_half_life_can_be_given(trace, capsys):
    result = json.loads(run(capsys, trace, "--expert-memory", "8MB", "--slot-bytes", "2MB", "--half-life", 3, "--json"))
    rows = {row["policy"]: row for row in result["rows"]}
    assert rows["lfu"]["slots"] == 4
    assert rows["lfu"]["hits"] == simulate(read_trace(trace), "lfu", 4, half_life_tokens=3).hits


def test_the_plot_is_written(trace, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run(capsys, trace, "--plot", tmp_path / "hits.png")
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MimoError, match="plot cannot be written"):
        run(capsys, trace, "--plot", tmp_path / "no" / "hits.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "lfu,fifo"], "--policy: 'fifo'"),
        (["--expert-memory", "0%"], "'0%'; a share above 0%"),
        (["--expert-memory", "x%"], "'x%'; a share above 0%"),
        (["--expert-memory", "much"], "'much'"),
    ],
)
def test_replay_rejects_wrong_policies_and_budgets(trace, capsys, arguments, message):
    with pytest.raises(UsageError, match=message):
        run(capsys, trace, *arguments)


def test_replay_rejects_a_trace_without_calls(tmp_path, capsys):
    TraceWriter(tmp_path / "t", (1,), 4, 2).close()
    with pytest.raises(MimoError, match="t: the trace holds no calls"):
        run(capsys, tmp_path / "t")


def test_a_budget_in_bytes_needs_the_size_of_an_expert(tmp_path, capsys):
    writer = TraceWriter(tmp_path / "t", (1,), 4, 2)
    writer(1, np.array([[0, 1]]))
    writer.close()
    with pytest.raises(UsageError, match="give --slot-bytes"):
        run(capsys, tmp_path / "t", "--expert-memory", "8GB")
    assert json.loads(run(capsys, tmp_path / "t", "--expert-memory", "50%", "--json"))["rows"][0]["slots"] == 2


def test_the_command_prints_the_table_or_one_line_of_error(trace, tmp_path):
    command = [sys.executable, "-m", "mlx_mimo.replay"]
    done = subprocess.run([*command, str(trace)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "belady" in done.stdout
    done = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("nowhere: trace cannot be read: No such file or directory")
    assert len(done.stderr.splitlines()) == 1
