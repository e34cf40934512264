"""A program in a terminal of its own, as somebody types into it."""

import os
import re
import select
import subprocess
import sys
import time

from support.patience import DEADLINE

# pty.spawn in a process of its own: this one has threads, which a fork would not survive.
# A shell's background job ignores Ctrl-C's signal, and its children would inherit that.
SPAWN = """
import os, pty, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
CTRL_A, CTRL_C, CTRL_D, UP = b"\x01", b"\x03", b"\x04", b"\x1b[A"


class Terminal:
    def __init__(self, *command: str, env: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SPAWN, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env | {"TERM": "xterm"},
        )
        self.seen = ""
        self._begin = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()

    def type(self, keys: bytes) -> None:
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def expect(self, pattern: str) -> re.Match:
        """The first match in what was shown since the last one."""
        deadline = time.monotonic() + DEADLINE
        while True:
            if match := re.compile(pattern).search(self.seen, self._begin):
                self._begin = match.end()
                return match
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            assert data, f"{pattern!r} was not shown:\n{self.seen}"
            self.seen += data.decode(errors="replace")

    def ended(self) -> int:
        """The exit status, once the program has ended by itself."""
        return self.process.wait(DEADLINE)
