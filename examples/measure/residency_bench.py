"""Expert residency at the full model's record size: reading, decoding, prefill and memory, measured on this machine.

    python examples/measure/residency_bench.py make DIR   # two MoE layers of 256 experts, 7.3 GB, random weights
    python examples/measure/residency_bench.py run DIR [--threads 8] [--only reading,decode,hits,prefill,memory]

Each part prints what was measured beside what it is compared with; docs/RESIDENCY.md says what to expect. The page
cache is emptied of the files before every cold measurement, and what is compared takes turns in going first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mimo.checkpoint.record import (
    ALIGNMENT,
    TENSOR_ORDER,
    ExpertFile,
    expert_file_name,
    expert_files,
    expert_tensor_name,
)
from mlx_mimo.experts.layer import ResidentSwitchGLU, StreamedSwitchGLU
from mlx_mimo.experts.pool import Pool
from mlx_mimo.experts.reader import ExpertReader
from mlx_mimo.experts.residents import Need
from mlx_mimo.planning.memory import peak_memory_bytes
from mlx_mimo.runtime.compute import choose_compute

HIDDEN, INNER, EXPERTS, TOP_K, GROUP = 4096, 2048, 256, 8, 64
SPARE_KERNEL_SECONDS = 0.001
GB = 1e9


# ---- the checkpoint


def make(directory: Path, layers: int) -> None:
    """4-bit groups of 64: 14,155,776 bytes an expert, as `convert` writes them by default."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for layer in range(1, layers + 1):
        header, offset, blobs = {}, 0, []
        for expert in range(EXPERTS):
            for name in TENSOR_ORDER:
                outputs, inputs = (HIDDEN, INNER) if name.startswith("down") else (INNER, HIDDEN)
                packed = name.endswith("weight")
                shape = [outputs, inputs // 8 if packed else inputs // GROUP]
                nbytes = shape[0] * shape[1] * (4 if packed else 2)
                header[expert_tensor_name(layer, expert, name)] = {
                    "dtype": "U32" if packed else "BF16",
                    "shape": shape,
                    "data_offsets": [offset, offset + nbytes],
                }
                offset += nbytes
                blobs.append((packed, shape))
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        with open(directory / expert_file_name(layer), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for packed, shape in blobs:
                if packed:
                    file.write(rng.bytes(4 * shape[0] * shape[1]))
                else:  # about ±0.004: the products stay near 1
                    values = rng.standard_normal(shape, dtype=np.float32) * 0.004
                    file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            file.flush()
            os.fsync(file.fileno())
        print(f"{file.name}: {offset / GB:.2f} GB", flush=True)


def cold(files: dict[int, ExpertFile]) -> None:
    """Empties the page cache of the files (Linux; elsewhere the files are simply read warm)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files.values():
        fd = os.open(file.path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---- what is measured


class Bare:
    """Nothing but preadv: as many threads as the reader has, into memory that is there already."""

    def __init__(self, file: ExpertFile, threads: int, buffers: int):
        self.file = file
        self._fd = os.open(file.path, os.O_RDONLY)
        self._workers = ThreadPoolExecutor(threads)
        # Filled, for the same reason as a pool's banks are: the first touch of a page costs as much as a read.
        # Many, taken in turns: into one that is still in the processor's cache, reading is quicker than into any slot.
        self._buffers = [memoryview(np.full(file.layout.nbytes, 1, np.uint8)) for _ in range(buffers)]
        self._turn = 0

    def __call__(self, experts: np.ndarray, batch: int) -> float:
        """Seconds for the records, `batch` at a time."""
        began = time.perf_counter()
        for start in range(0, len(experts), batch):
            some = experts[start : start + batch].tolist()
            places = [self._buffers[(self._turn + i) % len(self._buffers)] for i in range(len(some))]
            self._turn += len(some)
            list(self._workers.map(self._read, some, places))
        return time.perf_counter() - began

    def _read(self, expert: int, view: memoryview) -> None:
        offset = self.file.offset(expert)
        while view:
            count = os.preadv(self._fd, [view], offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        self._workers.shutdown()
        os.close(self._fd)


def pool_reads(pool: Pool, layer: int, experts: np.ndarray, batch: int) -> float:
    """The same records as misses of a pool, `batch` in each call."""
    pool.residents.forget()
    began = time.perf_counter()
    for start in range(0, len(experts), batch):
        chosen = experts[start : start + batch].astype(np.int32)
        for _ in pool.serve(Need.of(layer, chosen[None])):
            pass
    return time.perf_counter() - began


def reading(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """Misses through a pool against bare preadv: the same records in the same order, taking turns in going first."""
    layer, file = next(iter(files.items()))
    reader = ExpertReader(files, args.threads)
    pool, bare = Pool(files, 32, reader), Bare(file, args.threads, 32)
    rng = np.random.default_rng(1)
    for batch, warm in ((TOP_K, False), (32, False), (TOP_K, True), (32, True)):
        seconds: dict[str, list[float]] = {"pool": [], "bare": []}
        for turn in range(args.rounds * 8):
            experts = rng.permutation(EXPERTS)[:32]
            if warm:
                bare(experts, batch)
            for name in ("pool", "bare") if turn % 2 else ("bare", "pool"):
                if not warm:
                    cold(files)
                call = bare(experts, batch) if name == "bare" else pool_reads(pool, layer, experts, batch)
                seconds[name].append(call)
        ratios = sorted(b / p for b, p in zip(seconds["bare"], seconds["pool"], strict=True))
        speeds = [32 * file.layout.nbytes / statistics.median(seconds[name]) / GB for name in ("pool", "bare")]
        tenth = len(ratios) // 10
        print(
            f"reading, {batch} misses a call, {args.threads} threads, {'page cache' if warm else 'cold'}: "
            f"{speeds[0]:.2f} GB/s, bare preadv {speeds[1]:.2f}; {statistics.median(ratios):.0%} of it "
            f"({len(ratios)} pairs, the middle eight tenths {ratios[tenth]:.0%} to {ratios[-1 - tenth]:.0%}"
            f"{'' if warm else '; at least 90% expected'})"
        )
    bare.close()
    reader.close()


def timed(rounds: int, call, *arguments) -> float:
    """Median seconds of a call until its output is there."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        mx.eval(call(*arguments))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def decode(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """One token's layer with some of its 8 experts missing, against its parts measured alone."""
    layer, file = next(iter(files.items()))
    reader, bare = ExpertReader(files, args.threads), Bare(file, args.threads, 64)
    compute = choose_compute(file.layout, HIDDEN)
    x = mx.random.normal((1, 1, HIDDEN))
    mx.eval(x)
    pool = Pool(files, 64, reader, widen=compute.widen)
    ways = {
        name: StreamedSwitchGLU(layer, pool, compute, hits_first)
        for name, hits_first in (("together", False), ("hits first", True), ("default", None))
    }
    for warm in (False, True):
        for misses in (0, 1, 2, 4, 8):
            rng = np.random.default_rng(2)
            seconds: dict[str, list[float]] = {name: [] for name in (*ways, "read", "hits", "misses")}
            for turn in range(args.rounds * 5):
                chosen = rng.permutation(EXPERTS)[:TOP_K].astype(np.uint32)
                hits, missing = chosen[misses:], chosen[:misses]
                if warm:
                    bare(missing, TOP_K)
                order = [*ways, "read"]
                for name in order[turn % 4 :] + order[: turn % 4]:
                    pool.residents.forget()
                    if hits.size:
                        mx.eval(ways["together"](x, mx.array(hits[None, None])))
                    if not warm:
                        cold(files)
                    if name == "read":
                        seconds[name].append(bare(missing, TOP_K))
                    else:
                        seconds[name].append(timed(1, ways[name], x, mx.array(chosen[None, None])))
                mx.eval(ways["together"](x, mx.array(chosen[None, None])))
                for name, some in (("hits", hits), ("misses", missing)):
                    slots = pool.slots_of(layer, some[None].astype(np.int32))
                    seconds[name].append(timed(1, compute, x[0], slots, pool.arrays) if some.size else 0.0)
            middle = {name: statistics.median(values) for name, values in seconds.items()}
            limit = 1.15 * (max(middle["hits"], middle["read"]) + middle["misses"]) + SPARE_KERNEL_SECONDS
            print(
                f"decode, {misses} of {TOP_K} missing, {'page cache' if warm else 'cold'}: "
                f"{', '.join(f'{name} {1e3 * middle[name]:.1f}' for name in ways)} ms a layer; "
                f"alone: bare read {1e3 * middle['read']:.1f}, computing hits {1e3 * middle['hits']:.1f}, "
                f"misses {1e3 * middle['misses']:.1f}; at most {1e3 * limit:.1f} ms expected",
                flush=True,
            )
    bare.close()
    reader.close()


def hits(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """All hits through a pool against the same experts in banks of the layer's own, turn by turn."""
    layer, file = next(iter(files.items()))
    reader = ExpertReader(files, args.threads)
    compute = choose_compute(file.layout, HIDDEN)
    count = 64  # of the layer's experts, to fit this machine
    some = ExpertFile(file.path, layer, count, file.data_offset, file.layout)
    resident = ResidentSwitchGLU(some, reader, compute)
    pool = Pool({layer: file}, count, reader, widen=compute.widen)
    streamed = StreamedSwitchGLU(layer, pool, compute)
    x = mx.random.normal((1, 1, HIDDEN))
    for start in range(0, count, TOP_K):
        mx.eval(streamed(x, mx.arange(start, start + TOP_K)[None, None]))
    rng, seconds = np.random.default_rng(3), {"resident": [], "streamed": []}
    for _ in range(args.rounds * 40):
        chosen = mx.array(rng.permutation(count)[:TOP_K].astype(np.uint32)[None, None])
        mx.eval(chosen)
        for name, module in (("resident", resident), ("streamed", streamed)):
            seconds[name].append(timed(1, module, x, chosen))
    alone, pooled = (statistics.median(seconds[name]) for name in ("resident", "streamed"))
    print(
        f"hits, {TOP_K} experts: {1e3 * pooled:.2f} ms through the pool, {1e3 * alone:.2f} ms without, "
        f"{pooled / alone - 1:+.1%} (at most +5% expected)"
    )
    reader.close()


def prefill(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """2048 tokens through each layer with 12.5 % of the experts resident."""
    reader = ExpertReader(files, args.threads)
    compute = choose_compute(next(iter(files.values())).layout, HIDDEN)
    pool = Pool(files, len(files) * EXPERTS // 8, reader, widen=compute.widen)
    rng = np.random.default_rng(4)
    x = mx.random.normal((1, args.tokens, HIDDEN))
    mx.eval(x)
    for layer, file in files.items():
        module = StreamedSwitchGLU(layer, pool, compute)
        chosen = np.argsort(rng.random((1, args.tokens, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint32)
        before = reader.bytes_read, reader.seconds
        cold(files)
        seconds = timed(1, module, x, mx.array(chosen))
        records = (reader.bytes_read - before[0]) / file.layout.nbytes
        print(
            f"prefill, layer {layer}, {args.tokens} tokens, cold: {seconds:.2f} s, of them reading "
            f"{reader.seconds - before[1]:.2f} s; {records:g} records read for {np.unique(chosen).size} experts"
        )
    reader.close()


def memory(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """Peak memory of a process that decodes and prefills through few slots, in processes of their own."""
    directory = str(next(iter(files.values())).path.parent)
    peaks = {}
    for slots in (0, 16, 64):
        command = [sys.executable, __file__, "peak", directory, "--slots", str(slots), "--tokens", str(args.tokens)]
        peaks[slots] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    empty = peaks.pop(0)["peak"]
    total = sum(file.path.stat().st_size for file in files.values())
    for slots, row in peaks.items():
        allowed = empty + row["slots"] + row["transients"]
        print(
            f"memory, {slots} slots of {total / GB:.1f} GB on disk: peak {row['peak'] / GB:.3f} GB = "
            f"{empty / GB:.3f} with nothing loaded + {row['slots'] / GB:.3f} slots + "
            f"{(row['peak'] - empty - row['slots']) / GB:.3f}; "
            f"at most {allowed / GB:.3f} expected"
        )


def peak(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """The child of `memory`: prints one JSON object."""
    mx.set_cache_limit(0)
    layer, file = next(iter(files.items()))
    compute = choose_compute(file.layout, HIDDEN)
    x = mx.random.normal((1, args.tokens, HIDDEN))
    mx.eval(x)
    slots_bytes = 0
    if args.slots:
        reader = ExpertReader(files, args.threads)
        pool = Pool(files, args.slots, reader, widen=compute.widen)
        slots_bytes = args.slots * pool.banks.slot_bytes
        module = StreamedSwitchGLU(layer, pool, compute)
        rng = np.random.default_rng(5)
        for tokens in (1, 1, 1, args.tokens):
            chosen = np.argsort(rng.random((1, tokens, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint32)
            mx.eval(module(x[:, :tokens], mx.array(chosen)))
    else:
        bank = {
            t.name: mx.zeros((1, *t.shape), dtype={"U32": mx.uint32, "BF16": mx.bfloat16}[t.dtype])
            for t in file.layout.tensors
        }
        if not compute.widen:
            mx.eval(compute(x[0, :1], np.zeros((1, 1), np.int32), bank))  # the kernels' own memory is no slot's
    # Outputs of all pairs twice (by expert, then in order), and what the largest wave needs beside.
    pairs = args.tokens * TOP_K
    transients = 4 * (3 * pairs * HIDDEN + pairs * (HIDDEN + 2 * INNER)) + 3 * 4 * HIDDEN * INNER
    print(
        json.dumps(
            {
                "peak": peak_memory_bytes(),
                "slots": slots_bytes,
                "transients": transients,
            }
        )
    )


PARTS = {"reading": reading, "decode": decode, "hits": hits, "prefill": prefill, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "peak"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="of make")
    parser.add_argument("--threads", type=int, default=8, help="reader threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prefill")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--slots", type=int, default=64, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "make":
        make(args.directory, args.layers)
        return
    files = expert_files(args.directory)
    if args.what == "peak":
        peak(files, args)
        return
    for name in args.only.split(","):
        PARTS[name](files, args)


if __name__ == "__main__":
    main()
