"""What bench reports: a result for each case, the table, the plot, and the machine it ran on."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.nn as nn

from ..errors import MimoError
from ..runtime.loaded import loaded_of
from ..units import format_size
from .timing import Case, Sample, Spread

OURS = "mlx-mimo"


@dataclass(frozen=True)
class CaseResult:
    """One system at one expert memory on one case, over all repeats. Figures about reads are None where nothing is
    read."""

    system: str
    expert_memory: str  # as the flag gave it
    slots: int | None
    resident: float  # share of all experts
    prompt_tokens: int
    context: int
    generation_tokens: int
    prefill_tps: dict  # median, least, most; the first token ends prefill
    decode_tps: dict
    prefill_hit_rate: float | None
    decode_hit_rate: float | None
    disk_bytes_per_token: float | None  # of decode
    decode_read_share: float | None  # share of decode time in which at least one read was running
    prefill_read_share: float | None
    decode_wait_share: float | None  # share of decode time in which the model waited for reads
    prefill_wait_share: float | None
    samples: list  # every counted run, in seconds and bytes


def case_result(system: str, memory: str, model: nn.Module | None, case: Case, samples: Sequence[Sample]) -> CaseResult:
    """Sums up the runs of one case. `model` is None for a system that keeps all experts in memory and counts
    nothing."""
    slots, resident = None, 1.0
    residency = None if model is None else loaded_of(model).residency
    if residency is not None:
        slots = residency.counters.slots
        resident = slots / sum(file.num_experts for file in residency.files.values())
    decoded = case.generation_tokens - 1  # the first token is prefill's
    streamed = residency is not None and not residency.all_resident

    def total(name: str) -> float:
        return sum(getattr(sample, name) for sample in samples)

    def ratio(over: float, under: float) -> float | None:
        return over / under if streamed and under else None

    return CaseResult(
        system,
        memory,
        slots,
        resident,
        case.prompt_tokens,
        case.depth,
        case.generation_tokens,
        asdict(Spread.of([case.prompt_tokens / sample.prefill_s for sample in samples])),
        asdict(Spread.of([decoded / sample.decode_s for sample in samples])),
        ratio(total("prefill_hits"), total("prefill_hits") + total("prefill_misses")),
        ratio(total("decode_hits"), total("decode_hits") + total("decode_misses")),
        ratio(total("decode_bytes"), decoded * len(samples)),
        ratio(total("decode_read_s"), total("decode_s")),
        ratio(total("prefill_read_s"), total("prefill_s")),
        ratio(total("decode_wait_s"), total("decode_s")),
        ratio(total("prefill_wait_s"), total("prefill_s")),
        [asdict(sample) for sample in samples],
    )


def machine_line() -> str:
    """Such as 'Linux x86_64, a processor's name, 8 cores, 32.0 GB of memory'."""
    import psutil

    memory = format_size(psutil.virtual_memory().total)
    return f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores, {memory} of memory"


def _processor() -> str:
    """The processor's name as the system gives it; Linux on ARM often has none."""
    from ..planning.machine import chip_name

    if platform.system() != "Linux":
        return chip_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "processor without a name"


def print_table(report: dict, rows: list[CaseResult]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"{report['machine']}; {versions}; {report['date']}")
    if report["disk_limit_bytes_per_s"]:
        print(f"reads held back to {format_size(int(report['disk_limit_bytes_per_s']))}/s")
    print(
        f"{'system':<9}{'memory':>9}{'resident':>9}{'context':>8}{'prompt':>7}  {'prefill tok/s':<23}"
        f"{'decode tok/s':<22}{'hits':>6}{'read/token':>11}{'reading':>8}{'waiting':>8}"
    )
    for row in rows:
        hits = "" if row.decode_hit_rate is None else f"{row.decode_hit_rate:.1%}"
        read = "" if row.disk_bytes_per_token is None else format_size(int(row.disk_bytes_per_token))
        reading, waiting = (
            "" if share is None else f"{share:.0%}" for share in (row.decode_read_share, row.decode_wait_share)
        )
        print(
            f"{row.system:<9}{row.expert_memory:>9}{row.resident:>9.1%}{row.context:>8}{row.prompt_tokens:>7}  "
            f"{_spread(row.prefill_tps):<23}{_spread(row.decode_tps):<22}{hits:>6}{read:>11}{reading:>8}{waiting:>8}"
        )


def _spread(figures: dict) -> str:
    return f"{figures['median']:.1f} ({figures['least']:.1f}–{figures['most']:.1f})"


def plot(path: Path, rows: list[CaseResult]) -> None:
    """Writes a plot of decode and prefill speed against whichever of memory, context and prompt length has most values.
    Raises MimoError without matplotlib, or where the file cannot be written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MimoError("--plot needs matplotlib: pip install 'mlx-mimo[plot]'") from None
    axes_of = {
        "experts resident, %": lambda row: 100 * row.resident,
        "context, tokens": lambda row: row.context,
        "prompt, tokens": lambda row: row.prompt_tokens,
    }
    label = max(axes_of, key=lambda name: len({axes_of[name](row) for row in rows if row.system == OURS}))
    place = axes_of[label]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    for panel, what in zip(panels, ("decode_tps", "prefill_tps")):
        for system in dict.fromkeys(row.system for row in rows):
            mine = sorted((row for row in rows if row.system == system), key=place)
            middle = [getattr(row, what)["median"] for row in mine]
            below = [getattr(row, what)["median"] - getattr(row, what)["least"] for row in mine]
            above = [getattr(row, what)["most"] - getattr(row, what)["median"] for row in mine]
            panel.errorbar([place(row) for row in mine], middle, [below, above], marker="o", capsize=3, label=system)
        panel.set(xlabel=label, ylabel=f"{what.removesuffix('_tps')}, tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise MimoError(f"{path}: plot cannot be written: {error}") from error
    plt.close(figure)
