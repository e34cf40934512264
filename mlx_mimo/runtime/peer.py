"""Unmodified mlx-lm in a process of its own: `bench --against mlx-lm` asks it for one timed run at a time.

Run as `python -m mlx_mimo.runtime.peer DIR`. One JSON object a line comes in ({"past", "prompt", "following"}, token
ids) and one goes out ({"prefill_s", "decode_s"}); the first line out is {"ready": true}. What computes there imports
nothing of ours; `Peer` is this side of the pipe.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..device import choose as choose_device
from ..errors import MimoError
from ..experts.header import read_header

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

    # A directory of ours may name our class as its model_file: this is to be mlx-lm's own.
    model, _ = load_model(directory, model_config={"model_file": None})
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # MLX's CPU backend is several times slower in bfloat16
        mx.eval(model.parameters())
    return model


def bytes_in_memory(directory: Path, item_bytes: int) -> int:
    """What that model takes; `item_bytes` is the size of a 16-bit parameter there, 4 on a CPU."""
    total = 0
    for path in directory.glob("model*.safetensors"):
        if not path.name.startswith("model-mtp"):
            for tensor in read_header(path).tensors.values():
                total += tensor.nbytes // 2 * item_bytes if tensor.dtype in ("BF16", "F16") else tensor.nbytes
    return total


def timed(model, past: Sequence[int], prompt: Sequence[int], following: Sequence[int]) -> dict:
    """Seconds of one run on given tokens; nothing of it is still being computed when this returns."""
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
    # mlx-lm has enqueued a step more than it was asked for: it would run on while the other program is timed.
    mx.synchronize(generation_stream)
    return {"prefill_s": first - began, "decode_s": end - first}


def answer(fields: dict) -> None:
    print(json.dumps(fields), flush=True)


class Peer:
    """The process, while the context lasts. Raises MimoError where it ends before it is told to."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self) -> "Peer":
        command = [sys.executable, "-m", "mlx_mimo.runtime.peer", str(self.directory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            self.process.stdin.close()
        except OSError:
            self.process.kill()  # it does not read any more: there is nothing to wait for
        self.process.stdout.close()
        self.process.wait()

    def run(self, case, tokens: Sequence[int]):
        from .timing import Sample, split

        past, prompt, following = split(case, tokens)
        try:
            self.process.stdin.write(json.dumps({"past": past, "prompt": prompt, "following": following}) + "\n")
            self.process.stdin.flush()
        except OSError as error:  # a broken pipe must not be taken for our own reader's going away
            raise self._ended() from error
        return Sample(**self._answer())

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> MimoError:
        return MimoError(f"--against {NAME}: its process ended with {self.process.wait()}; see its error above")


if __name__ == "__main__":
    main()
