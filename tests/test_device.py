"""MLX_MIMO_DEVICE chooses where MLX computes; a wrong one is refused by every command before anything is loaded."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest
from support.patience import DEADLINE

from mlx_mimo import __main__ as commands
from mlx_mimo import device
from mlx_mimo.errors import UsageError
from mlx_mimo.planning.backend import backend_and_limits

# The least with which a command gets past its parser.
LEAST = {
    "bridge": ["/no/such"],
    "convert": ["--hf-path", "/no/such"],
    "replay": ["/no/such"],
    "compare": ["/no/such", "/no/such", "--text", "/no/such"],
    "chat": [],
    "generate": [],
    "server": [],
    "plan": [],
    "doctor": [],
    "bench": [],
}


@pytest.fixture
def default(monkeypatch):
    """What is said to MLX, and a machine whose GPU is there or not."""
    said = []
    monkeypatch.setattr(mx, "set_default_device", said.append)
    return said


def test_unset_or_empty_it_leaves_the_choice_to_mlx(monkeypatch, default):
    monkeypatch.delenv(device.VARIABLE, raising=False)
    device.choose()
    monkeypatch.setenv(device.VARIABLE, "")
    device.choose()
    assert default == []


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_device_that_is_there_is_taken(monkeypatch, default, name):
    monkeypatch.setattr(mx, "is_available", lambda _: True)
    monkeypatch.setenv(device.VARIABLE, name)
    device.choose()
    assert default == [getattr(mx, name)]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, default):
    monkeypatch.setattr(mx, "is_available", lambda what: what == mx.cpu)
    monkeypatch.setenv(device.VARIABLE, "gpu")
    with pytest.raises(UsageError, match="MLX_MIMO_DEVICE=gpu: MLX finds no GPU here; cpu expected"):
        device.choose()
    assert default == []


def test_where_mlx_lm_chose_otherwise_the_bridge_refuses(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setenv(device.VARIABLE, "gpu")
    device.check()
    monkeypatch.setenv(device.VARIABLE, "cpu")
    with pytest.raises(UsageError, match="MLX_MIMO_DEVICE=cpu: mlx-lm's commands choose by themselves, and took gpu"):
        device.check()


def test_a_plan_reckons_with_the_chosen_device(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv(device.VARIABLE, "cpu")
    assert backend_and_limits() == ("cpu", {})


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_refuses_another_word_in_one_line(command):
    result = subprocess.run(
        [sys.executable, "-m", "mlx_mimo", command, *LEAST[command]],
        env=os.environ | {device.VARIABLE: "tpu"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.endswith("error: MLX_MIMO_DEVICE: cpu or gpu expected, 'tpu' found\n")
    assert result.stderr.count("\n") == 1


def test_the_tests_run_where_it_says():
    asked = device.asked()
    assert asked is None or mx.default_device().type.name == asked
