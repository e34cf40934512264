"""Unmodified mlx-lm in its own process: `bench --against mlx-lm` asks it for one timed run at a time.

Run as `python -m mlx_mimo.bench.peer DIR`. One JSON object a line comes in ({"past", "prompt", "following"}, token
ids) and one goes out ({"prefill_s", "decode_s"}); the first line out is {"ready": true}. The model code in
that process is mlx-lm's alone; `Peer` is this side of the pipe.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from ..checkpoint.directory import MTP_FILE, weight_files
from ..checkpoint.header import read_header
from ..device import choose as choose_device
from ..errors import MimoError

if TYPE_CHECKING:
    from .timing import Case, Sample

NAME = "mlx-lm"


def main() -> None:
    import mlx.core as mx

    choose_device()
    model = load_peer(Path(sys.argv[1]))
    answer({"ready": True})
    for line in sys.stdin:
        answer(timed(model, **json.loads(line)))
        mx.clear_cache()


def load_peer(directory: Path):
    """mlx-lm's own model of a directory, every expert in memory."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    # With the bridge on, model_file names our class: here mlx-lm's own is wanted.
    model, _ = load_model(directory, model_config={"model_file": None})
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # MLX's CPU backend is several times slower in bfloat16
        mx.eval(model.parameters())
    return model


def bytes_in_memory(directory: Path, item_bytes: int) -> int:
    """Bytes of the model that `load_peer` returns; `item_bytes` is what it stores a 16-bit parameter in: 4 on a CPU,
    else 2."""
    total = 0
    for path in weight_files(directory):
        if path.name != MTP_FILE:
            for tensor in read_header(path).tensors.values():
                total += tensor.nbytes // 2 * item_bytes if tensor.dtype in ("BF16", "F16") else tensor.nbytes
    return total


def timed(model, past: Sequence[int], prompt: list[int], following: Sequence[int]) -> dict:
    """Runs given tokens and returns {"prefill_s", "decode_s"}, once nothing of the run is being computed any more."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step, generation_stream
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for start in range(0, len(past), 2048):
        model(mx.array([past[start : start + 2048]]), cache=cache)
        mx.eval([entry.state for entry in cache])
    given = iter([*following, 0, 0])
    began, first = time.perf_counter(), 0.0
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=len(following),
        sampler=lambda logprobs: mx.array([next(given)]),
        prompt_cache=cache,
    )
    for _ in steps:
        first = first or time.perf_counter()
    end = time.perf_counter()
    # mlx-lm has enqueued one step too many: it would run on while the other program is timed.
    mx.synchronize(generation_stream)
    return {"prefill_s": first - began, "decode_s": end - first}


def answer(fields: dict) -> None:
    """Sends one line to the other side."""
    print(json.dumps(fields), flush=True)


class Peer:
    """Context manager: starts the process and ends it. Raises MimoError where the process ends early."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self) -> "Peer":
        command = [sys.executable, "-m", "mlx_mimo.bench.peer", str(self.directory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            self._pipe(self.process.stdin).close()
        except OSError:
            self.process.kill()  # it no longer reads its input, so it would not end by itself
        self._pipe(self.process.stdout).close()
        self.process.wait()

    def run(self, case: "Case", tokens: Sequence[int]) -> "Sample":
        """One timed run of a case on `tokens`."""
        from .timing import Sample

        past, prompt, following = case.cut(tokens)
        try:
            asked = self._pipe(self.process.stdin)
            asked.write(json.dumps({"past": past, "prompt": prompt, "following": following}) + "\n")
            asked.flush()
        except OSError as error:  # a BrokenPipeError would be taken for a closed stdout of ours
            raise self._ended() from error
        return Sample(**self._answer())

    def _answer(self) -> dict:
        line = self._pipe(self.process.stdout).readline()
        if not line.endswith("\n"):
            raise self._ended()
        return json.loads(line)

    @staticmethod
    def _pipe(end: IO[str] | None) -> IO[str]:
        """One end of the process, which was started with pipes at both."""
        return cast(IO[str], end)

    def _ended(self) -> MimoError:
        return MimoError(f"--against {NAME}: its process ended with {self.process.wait()}; see its error above")


if __name__ == "__main__":
    main()
