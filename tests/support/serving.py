"""Servers on free ports: in this process, or as a process of their own."""

import contextlib
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from mlx_mimo.arguments import load_options
from mlx_mimo.server.__main__ import build_parser, complete
from mlx_mimo.server.running import Running
from support.patience import DEADLINE, wait_until


@contextlib.contextmanager
def running_server(directory: Path | None, *flags: str, wait: bool = True) -> Iterator[Running]:
    """Of a directory, or of the demo; its experts streamed unless `flags` say otherwise."""
    model = () if directory is None else ("--model", str(directory))
    args = build_parser().parse_args([*model, "--port", "0", "--expert-memory", "120KB", *flags])
    complete(args)
    server = Running(args, load_options(args))
    server.start()
    try:
        if wait:
            assert wait_until(lambda: server.worker.is_healthy)
        yield server
    finally:
        hurry = threading.Event()
        hurry.set()
        server.stop(0, hurry)


class Process:
    """`python -m mlx_mimo.server`, and what it says."""

    def __init__(self, *flags: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_mimo.server", *map(str, flags)], stderr=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.said = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.put(line)
        self.lines.put("")

    def wait_for(self, pattern: str) -> re.Match:
        while (match := re.search(pattern, self.said)) is None:
            line = self.lines.get(timeout=DEADLINE)
            assert line, f"ended, having said: {self.said}"
            self.said += line
        return match

    def end(self) -> int:
        return self.process.wait(timeout=DEADLINE)
