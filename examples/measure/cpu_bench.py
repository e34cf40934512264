"""Kernel speed against the machine's read bandwidth: `python examples/measure/cpu_bench.py [--bits 4] [--threads 2]`.

An expert layer's products with weights far larger than the caches, a plain sum over memory in one piece, a plain copy
of it (bytes read and written), and a plain sum over the weights of other experts, which lie in 24 places, alternate,
so that what else the machine does falls on all; medians and ratios are printed. No other program should run meanwhile.
"""

import argparse
import time

import mlx.core as mx
import numpy as np
from numba import njit, prange

from mlx_mimo.cpu import kernels
from mlx_mimo.cpu.packed import Packed
from mlx_mimo.cpu.products import ExpertMatrices, matmul, run_experts

HIDDEN, INNER, TOP_K = 4096, 2048, 8  # the released model's


@njit(parallel=True)
def read(x, parts):
    """Returns the sum of x, int64. Integers, since sums of floats are not vectorised."""
    totals = np.zeros(parts, np.int64)
    size = x.size // parts
    for part in prange(parts):
        mine = x[part * size : (part + 1) * size]
        total = 0
        for i in range(mine.size):
            total += mine[i]
        totals[part] = total
    return totals.sum()


@njit(parallel=True)
def copy(out, x):
    for i in prange(x.size):
        out[i] = x[i]


def random_bank(slots: int, rows: int, columns: int, bits: int, group: int, mode: str) -> Packed:
    """Returns a bank of random codes and constant scales; reading it takes as long as any other."""
    generator = np.random.default_rng(0)
    words = np.frombuffer(generator.bytes(slots * rows * columns * bits // 8), np.uint32)
    weight = mx.array(words.reshape(slots, rows, -1))
    shape = (slots, rows, columns // group)
    if mode == "mxfp4":
        return Packed(weight, mx.full(shape, 120, mx.uint8), bits=bits, group_size=group, mode=mode)
    scales, biases = mx.full(shape, 0.01, mx.bfloat16), mx.full(shape, -0.08, mx.bfloat16)
    return Packed(weight, scales, biases, bits=bits, group_size=group)


def alternate(work, scattered, nbytes: int, big: np.ndarray, repeats: int) -> list[float]:
    """Medians in GB/s: of `work`, which reads `nbytes`, of `scattered`, as many, of reading `big`, of copying half."""
    threads = kernels.threads()
    half = big.size // 2
    ways = [
        (work, nbytes),
        (scattered, nbytes),
        (lambda: read(big, threads), big.nbytes),
        (lambda: copy(big[:half], big[half:]), big.nbytes),
    ]
    seconds = [[] for _ in ways]
    for way, _ in ways:
        way()
    for _ in range(repeats):
        for (way, _), taken in zip(ways, seconds):
            read(big, threads)  # not timed: empties the caches
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return [size / np.median(taken) / 1e9 for (_, size), taken in zip(ways, seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--group", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--mxfp4", action="store_true", help="this format too")
    parser.add_argument("--slots", type=int, default=64, help="experts in the bank; 8 new ones a repeat")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        kernels.set_threads(options.threads)
    big = np.ones(2**26, np.int64)
    x = np.random.default_rng(1).normal(size=(1, HIDDEN)).astype(np.float32)
    formats = [(bits, options.group, "affine") for bits in options.bits] + [(4, 32, "mxfp4")] * options.mxfp4
    print(f"{kernels.threads()} threads, {options.repeats} repeats, GB/s as medians")
    for bits, group, mode in formats:
        shapes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
        bank = ExpertMatrices(*(random_bank(options.slots, *shape, bits, group, mode) for shape in shapes))
        order = np.random.default_rng(2).permutation(options.slots).astype(np.int32)
        turn = iter(range(10**9))

        matrices = (bank.gate, bank.up, bank.down)
        words = [matrix.views[0].host.reshape(options.slots, -1).view(np.int64) for matrix in matrices]

        def one_token(bank=bank, order=order, turn=turn) -> None:
            run_experts(x, np.roll(order, -TOP_K * next(turn))[None, :TOP_K], bank)

        def scattered(words=words, order=order, turn=turn) -> None:
            for slot in np.roll(order, -TOP_K * next(turn))[:TOP_K]:
                for matrix in words:
                    read(matrix[slot], kernels.threads())

        nbytes = TOP_K * sum(matrix.slot_bytes for matrix in matrices)
        ours, apart, plain, copied = alternate(one_token, scattered, nbytes, big, options.repeats)
        apart *= TOP_K * sum(part[0].nbytes for part in words) / nbytes  # codes only, without scales
        name = mode if mode == "mxfp4" else f"{bits} bits, groups of {group}"
        print(
            f"{name:22} expert layer, one token {ours:5.1f}   reading {plain:5.1f} ({ours / plain:.0%})   "
            f"copying {copied:5.1f} ({ours / copied:.0%})   reading experts {apart:5.1f} ({ours / apart:.0%})"
        )

        many = np.random.default_rng(3).normal(size=(512, HIDDEN)).astype(np.float32)
        matmul(many, bank.gate)
        start = time.perf_counter()
        matmul(many, bank.gate)
        seconds = time.perf_counter() - start
        print(f"{'':22} one matrix, 512 tokens {2 * 512 * INNER * HIDDEN / seconds / 1e9:8.0f} GFLOP/s")


if __name__ == "__main__":
    main()
