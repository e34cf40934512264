"""A tiny directory with the bridge on, and mlx-lm's commands as processes on it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import requests

from mlx_mimo.bridge import __main__ as bridge
from mlx_mimo.device import VARIABLE
from support.converted import converted_directory
from support.patience import DEADLINE, wait_until

STREAMED = {"MLX_MIMO_EXPERT_MEMORY": "120KB"}  # a third of the experts
KINDS = ("stock", "bridged")
# mlx-lm keeps the device that is the default when it is imported: the tests' device is chosen before.
START = """
import runpy
from mlx_mimo.device import choose
choose()
runpy.run_module("mlx_lm", run_name="__main__")
"""


def bridged_directory(source: Path | None = None) -> Path:
    """`source` (default: `converted_directory`) with the bridge on, its weights being links. Read only."""
    return _bridged(source or converted_directory())


@cache
def _bridged(source: Path) -> Path:
    import atexit
    import shutil

    root = Path(mkdtemp(prefix="mlx-mimo-bridged-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    link_directory(source, root / "model")
    bridge.switch(root / "model", True)
    return root / "model"


def link_directory(source: Path, target: Path) -> None:
    """A directory like `source` whose config.json may be written."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())


def model_flags(kind: str, source: Path | None = None) -> tuple[str, ...]:
    """`--model` and what it needs: mlx-lm's own model, or ours through the bridge."""
    if kind == "stock":
        return ("--model", str(source or converted_directory()))
    return ("--model", str(bridged_directory(source)), "--trust-remote-code")


def environment(kind: str, settings: dict | None = None) -> dict:
    """The environment of a command. Stock commands get mx.compile turned off, which on a CPU runs a C++ compiler for
    each fused kernel; the bridge turns it off itself."""
    dropped = ("MLX_MIMO_", "MLX_DISABLE")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped) or key == VARIABLE}
    own = {"MLX_DISABLE_COMPILE": "1"} if kind == "stock" else STREAMED
    return inherited | {"HF_HUB_OFFLINE": "1"} | own | (settings or {})


def mlx_lm(
    kind: str,
    command: str,
    *arguments,
    stdin: str = "",
    settings: dict | None = None,
    cwd: Path | None = None,
    source: Path | None = None,
    without: tuple[str, ...] = (),
    saved: Path | None = None,
) -> subprocess.CompletedProcess:
    """`mlx_lm COMMAND --model …` as a process, `without` some of `model_flags`. The model is `source` with or without
    the bridge, or the directory `saved` as it is."""
    model = [flag for flag in model_flags(kind, source) if flag not in without]
    if saved is not None:
        model[1] = str(saved)
    return subprocess.run(
        [sys.executable, "-c", START, command, *model, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment(kind, settings),
        cwd=cwd,
    )


@contextmanager
def mlx_lm_server(kind: str, log: Path, *arguments: str, settings: dict | None = None) -> Iterator[str]:
    """`mlx_lm server --model …` as a process that answers at the URL given, and ends with Ctrl-C's signal."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", START, "server", *model_flags(kind), "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(kind, settings))
    try:
        _until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE)


def _until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(f"{url}/health", timeout=DEADLINE).status_code == 200
        except requests.ConnectionError:
            return False  # not listening yet

    assert wait_until(healthy), log.read_text()


def succeeded(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def generated(result: subprocess.CompletedProcess) -> str:
    """The text that mlx_lm.generate printed."""
    return succeeded(result).split("==========")[1]
