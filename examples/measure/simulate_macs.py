"""SIMULATED, not measured: MiMo-V2-Flash on common Macs, tokens per second, and where more expert memory does harm.

    python examples/measure/simulate_macs.py [--plot docs/simulated.svg]

1. Routing of 47 layers × 256 experts, 8 a token, is made up: each layer has favourites (Zipf's law), which move with
   the subject every 400 tokens, and an expert of the token before stays with some probability. The three constants are
   chosen so that LRU in each layer hits what others measured on a model of this geometry: 64–71 % with an eighth of the
   experts resident and 80–87 % with a quarter.
2. The trace runs through the pool's own table and policy (LFU with the package's half-life, one pool for all layers).
   Only tokens after the warm-up count.
3. `mlx_mimo.planning.forecast` turns hit rates into time with the constants that `mlx_mimo plan` prints.
4. What the pool takes from the rest of the system comes back as paging: once the model, the system and the room that
   its page cache wants exceed the memory, that excess is read again from the disk, as far as a token touches it.
"""

import argparse
from bisect import bisect_right
from itertools import pairwise

import numpy as np

from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config import released
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import MimoError
from mlx_mimo.experts.policy import DEFAULT_HALF_LIFE_TOKENS, make_policy
from mlx_mimo.experts.residents import Need, Residents
from mlx_mimo.planning.budget import FLOOR_BYTES, Budget, estimate
from mlx_mimo.planning.forecast import DISK_USED, Range, fit_on, forecast
from mlx_mimo.planning.machine import GIB, MACS, SYSTEM_BYTES, Machine, imagined
from mlx_mimo.units import GB

LAYERS, EXPERTS, TOP_K = 47, 256, 8
SKEW, STAY, SUBJECT, SUBJECT_TOKENS = 0.9, 0.36, 1.4, 400
WARM_UP = 300
SHARES = (0.02, 0.05, 0.10, 0.125, 0.20, 0.25, 0.35, 0.50, 0.75)
RECIPES = ("2bit", "3bit", "4bit")
CONTEXT, CHUNK = 32768, 2048


def routing(tokens: int, layers: int = LAYERS, seed: int = 0) -> list[Need]:
    """Returns the calls of one sequence: for each token, its layers in order."""
    rng = np.random.default_rng(seed)
    law = -SKEW * np.log(np.arange(1, EXPERTS + 1))
    favourites = np.stack([rng.permutation(law) for _ in range(layers)])
    last = np.zeros((layers, 0), dtype=np.int64)
    needs = []
    for token in range(tokens):
        if token % SUBJECT_TOKENS == 0:
            subject = SUBJECT * rng.standard_normal((layers, EXPERTS))
        wish = favourites + subject + rng.gumbel(size=(layers, EXPERTS))
        stays = rng.random(last.shape) < STAY
        rows, columns = np.nonzero(stays)
        wish[rows, last[rows, columns]] = np.inf
        last = np.argpartition(-wish, TOP_K - 1, axis=1)[:, :TOP_K]
        needs += [Need.of(layer, last[layer][None].astype(np.int32)) for layer in range(layers)]
    return needs


def hit_rate(needs: list[Need], layers: int, slots: int, policy: str, warm_up: int) -> float:
    """Returns the share of hits after `warm_up` tokens."""
    table = Residents(tuple(range(layers)), EXPERTS, slots, make_policy(policy, layers * EXPERTS, layers))
    before = (0, 0)
    for position, need in enumerate(needs):
        if position == warm_up * layers:
            before = table.hits, table.misses
        for _ in table.schedule(need):
            pass
    hits, misses = table.hits - before[0], table.misses - before[1]
    return hits / (hits + misses)


def curve(needs: list[Need]) -> list[tuple[float, float]]:
    """Returns (share resident, hit rate) pairs for one LFU pool over all layers."""
    every = LAYERS * EXPERTS
    rates = [hit_rate(needs, LAYERS, round(share * every), "lfu", WARM_UP) for share in SHARES]
    return [(0.0, 0.0), *zip(SHARES, rates), (1.0, 1.0)]


def at(curve: list[tuple[float, float]], share: float) -> float:
    place = min(bisect_right([x for x, _ in curve], share), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y0 + (share - x0) / (x1 - x0) * (y1 - y0)


def speed(args: ModelArgs, budget: Budget, machine: Machine, expert_bytes: int, curve: list) -> float:
    """Returns decoded tokens per second, paging included."""
    hits = at(curve, min(1.0, expert_bytes / budget.experts))
    found = forecast(args, budget, machine, expert_bytes, CHUNK, Range(hits, hits, hits))
    excess = max(0, found.total_bytes + SYSTEM_BYTES + FLOOR_BYTES - machine.memory)
    touched = found.memory_bytes_per_token * min(1.0, excess / found.total_bytes)
    return 1 / (1 / found.decode_tps.expected + touched / (machine.disk * DISK_USED.expected))


def plot(path: str, args: ModelArgs, budget: Budget, curve: list) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "mlx-mimo", "svg.fonttype": "none"}  # the same bytes each time; text as text
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    left.plot([100 * x for x, _ in curve], [100 * y for _, y in curve], marker="o", label="simulated: LFU, one pool")
    for share, low, high in ((12.5, 64, 71), (25, 80, 87)):
        left.plot([share, share], [low, high], linewidth=5, alpha=0.4, color="tab:orange")
    left.plot([], [], linewidth=5, alpha=0.4, color="tab:orange", label="published: LRU in each layer")
    left.set(xlabel="experts resident, %", ylabel="hit rate, %", ylim=(0, 100), title="hit rate (simulated)")
    left.legend()
    sizes = np.arange(2, 64, 1.0)
    for disk in (2.5, 6.0, 17.0):
        machine = imagined("64 GB", 64 * GIB, disk * GB, 300 * GB)
        right.plot(sizes, [speed(args, budget, machine, int(s * GB), curve) for s in sizes], label=f"{disk:g} GB/s")
    room = fit_on(budget, machine).expert_bytes / GB
    right.axvline(room, color="grey", linestyle=":", label="auto")
    right.set(xlabel="expert memory, GB", ylabel="decode, tokens/s", title="64 GB Mac, 4bit, by disk (simulated)")
    right.set_ylim(0, None)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1300, help="of the made-up trace (default: 1300)")
    parser.add_argument("--plot", metavar="FILE", help="write the curves (.svg, .png)")
    options = parser.parse_args()
    args = ModelArgs.from_dict(released.CONFIG)
    budgets = {r: estimate(released.CONFIG, named(r), args, CONTEXT, CHUNK, 2, 2) for r in RECIPES}
    needs = routing(options.tokens)
    found = curve(needs)
    assert all(a[1] <= b[1] for a, b in pairwise(found)), "more slots must not hit less"
    lru = [(x, hit_rate(needs, LAYERS, round(x * LAYERS * EXPERTS), "lru", WARM_UP)) for x in (0.05, 0.125, 0.25)]
    print(f"{options.tokens:,} tokens, LFU's counts halve every {DEFAULT_HALF_LIFE_TOKENS:g} tokens\n")
    for policy, rates in (("lfu", found[1:-1]), ("lru", lru)):
        print(f"Hit rates of {policy}, simulated: " + ", ".join(f"{y:.0%} at {x:.1%}" for x, y in rates) + "\n")
    print("| Mac | SSD, GB/s | " + " | ".join(RECIPES) + " |")
    print("|---|---|" + "---|" * len(RECIPES))
    for machine in MACS:
        cells = []
        for recipe in RECIPES:
            try:
                room = fit_on(budgets[recipe], machine).expert_bytes
                tps = speed(args, budgets[recipe], machine, room, found)
                cells.append(f"{tps:.1f} ({min(1, room / budgets[recipe].experts):.0%})")
            except MimoError:
                cells.append("does not fit")
        print(f"| {machine.name} | {machine.disk / GB:g} | " + " | ".join(cells) + " |")
    if options.plot:
        plot(options.plot, args, budgets["4bit"], found)


if __name__ == "__main__":
    main()
