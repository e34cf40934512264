"""Run as a script: converts again and again, each attempt killed at a random call to the disk, until it is through.

`killed.py SOURCE ROOT ROUNDS SEED` leaves ROOT/0, ROOT/1, … and prints how many attempts were killed.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from mlx_mimo.convert import convert_checkpoint, quantize, writer


def _half(file_writer: writer.FileWriter, data) -> None:
    view = memoryview(data).cast("B")
    file_writer._file.write(view[: len(view) // 2])


def die_at(call: int) -> None:
    """Makes the process kill itself in its `call`-th write, flush or rename, in the middle of a write."""
    count = 0

    def counted(function, torn=None):
        def wrapper(*arguments):
            nonlocal count
            count += 1
            if count == call:
                if torn:
                    torn(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapper

    write = writer.FileWriter.write
    writer.FileWriter.write = counted(write, _half)
    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)


def attempt(source: Path, target: Path, call: int) -> bool:
    """Whether the conversion ended before the `call`-th call."""
    child = os.fork()
    if child == 0:
        try:
            die_at(call)
            convert_checkpoint(source, target, progress=False, threads=2)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("an attempt failed instead of being killed")
    if os.WIFSIGNALED(status):
        if (target / "config.json").exists():
            files = json.loads((target / "mlx_mimo.json").read_text())["files"]
            assert all((target / name).stat().st_size == files[name]["bytes"] for name in files), "loadable too early"
        return False
    return True


def main() -> None:
    source, root, rounds, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    quantize.kernels_available()  # imported once, before the forks
    chance, killed = random.Random(seed), 0
    for number in range(rounds):
        while not attempt(source, root / str(number), chance.randrange(1, 60) if chance.random() < 0.5 else 500):
            killed += 1
    print(killed)


if __name__ == "__main__":
    main()
