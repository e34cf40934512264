"""Expert residency at the full model's record size: reading, decoding, prefill and memory, measured on this machine.

    python examples/residency_bench.py make DIR             # two MoE layers of 256 experts, 7.3 GB, random weights
    python examples/residency_bench.py run DIR [--threads 8] [--only reading,decode,hits,prefill,memory]

Each part prints what was measured beside what it is compared with; docs/RESIDENCY.md says what to expect. The page
cache is emptied of the files before every cold measurement, so nothing but the disk answers.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mimo.experts.compute import choose_compute
from mlx_mimo.experts.layer import ResidentSwitchGLU, StreamedSwitchGLU
from mlx_mimo.experts.pool import Pool
from mlx_mimo.experts.reader import ExpertReader
from mlx_mimo.experts.record import (
    ALIGNMENT,
    TENSOR_ORDER,
    ExpertFile,
    expert_file_name,
    expert_files,
    expert_tensor_name,
)
from mlx_mimo.experts.residents import Need

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


def bare_reads(file: ExpertFile, experts: np.ndarray, threads: int, batch: int) -> float:
    """Seconds that `threads` threads of nothing but preadv take for the records, `batch` at a time."""
    buffers = [bytearray(file.layout.nbytes) for _ in range(batch)]
    fd = os.open(file.path, os.O_RDONLY)

    def work(jobs):
        for expert, buffer in jobs:
            view, offset = memoryview(buffer), file.offset(int(expert))
            while view:
                count = os.preadv(fd, [view], offset)
                view, offset = view[count:], offset + count

    began = time.perf_counter()
    for start in range(0, len(experts), batch):
        jobs = list(zip(experts[start : start + batch], buffers))
        workers = [threading.Thread(target=work, args=(jobs[i::threads],)) for i in range(min(threads, len(jobs)))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    seconds = time.perf_counter() - began
    os.close(fd)
    return seconds


def pool_reads(pool: Pool, layer: int, experts: np.ndarray, batch: int) -> float:
    """The same records as misses of a pool, `batch` in each call."""
    began = time.perf_counter()
    for start in range(0, len(experts), batch):
        chosen = experts[start : start + batch].astype(np.int32)
        for _ in pool.serve(Need.of(layer, chosen[None])):
            pass
    return time.perf_counter() - began


def reading(files: dict[int, ExpertFile], args: argparse.Namespace) -> None:
    """Misses through a pool against bare preadv: the same records, interleaved, always cold."""
    layer, file = next(iter(files.items()))
    reader = ExpertReader(files, args.threads)
    rng = np.random.default_rng(1)
    record = file.layout.nbytes
    for batch in (TOP_K, 32):
        ratios, speeds = [], []
        for _ in range(args.rounds):
            experts = rng.permutation(EXPERTS)[:96]
            pool = Pool(files, 48, reader)
            cold(files)
            bare = bare_reads(file, experts, args.threads, batch)
            cold(files)
            pooled = pool_reads(pool, layer, experts, batch)
            ratios.append(bare / pooled)
            speeds.append(len(experts) * record / pooled / GB)
        print(
            f"reading, {batch} misses a call, {args.threads} threads, cold: {statistics.median(speeds):.2f} GB/s, "
            f"{statistics.median(ratios):.0%} of bare preadv (rounds {', '.join(f'{r:.0%}' for r in ratios)}; "
            f"at least 90% expected)"
        )
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
    reader = ExpertReader(files, args.threads)
    compute = choose_compute(file.layout, HIDDEN)
    x = mx.random.normal((1, 1, HIDDEN))
    mx.eval(x)
    for split in (False, True):
        pool = Pool(files, 64, reader, widen=compute.widen)
        module = StreamedSwitchGLU(layer, pool, compute, split)
        for misses in (0, 1, 2, 4, 8):
            rng = np.random.default_rng(2)
            totals, limits = [], []
            for _ in range(args.rounds * 3):
                chosen = rng.permutation(EXPERTS)[:TOP_K].astype(np.uint32)
                hits, missing = chosen[misses:], chosen[:misses]
                pool.residents.forget()
                if hits.size:
                    mx.eval(module(x, mx.array(hits[None, None])))
                slots = np.arange(TOP_K, dtype=np.int32)[None]
                of_hits = timed(3, compute, x[0], slots[:, : hits.size], pool.arrays) if hits.size else 0.0
                of_misses = timed(3, compute, x[0], slots[:, :misses], pool.arrays) if misses else 0.0
                cold(files)
                read = bare_reads(file, missing, args.threads, TOP_K) if misses else 0.0
                cold(files)
                totals.append(timed(1, module, x, mx.array(chosen[None, None])))
                limits.append(1.15 * (max(of_hits, read) + of_misses) + SPARE_KERNEL_SECONDS)
            total, limit = statistics.median(totals), statistics.median(limits)
            print(
                f"decode, {misses} of {TOP_K} missing, cold, {'hits first' if split else 'together'}: "
                f"{1e3 * total:.1f} ms a layer; at most {1e3 * limit:.1f} ms expected"
            )
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
    scale = 1 if sys.platform == "darwin" else 1024
    # Outputs of all pairs twice (by expert, then in order), and what the largest wave needs beside.
    pairs = args.tokens * TOP_K
    transients = 4 * (3 * pairs * HIDDEN + pairs * (HIDDEN + 2 * INNER)) + 3 * 4 * HIDDEN * INNER
    print(
        json.dumps(
            {
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
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
