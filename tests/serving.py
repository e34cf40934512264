"""A server in this process, on a free port."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from mlx_mimo.arguments import load_options
from mlx_mimo.server.__main__ import build_parser, complete
from mlx_mimo.server.running import Running
from mlx_mimo.server.worker import wait_until


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
            assert wait_until(lambda: server.worker.is_healthy, 60)
        yield server
    finally:
        hurry = threading.Event()
        hurry.set()
        server.stop(0, hurry)
