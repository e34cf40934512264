"""`python -m mlx_mimo.plan`: prints whether a model fits and how fast it is, before any download."""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import add_machine_arguments, given, positive_int, run
from .checkpoint.directory import Directory
from .config import released
from .config.model_args import ModelArgs
from .demo import CHECKPOINT
from .errors import MimoError, UsageError
from .planning.budget import usual_context
from .planning.forecast import Range
from .planning.machine import MACS, Given, machine_with
from .planning.plan import Plan, advice, assumptions, make_plan
from .planning.subject import Subject, released_subject, subject_of_config, subject_of_directory
from .units import format_size, parse_size

SCHEMA_VERSION = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo plan",
        description="Does it fit, and how fast: from config.json alone, before any download. Nothing is loaded.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="a directory, a Hub repo (only its config.json is fetched), or demo (default: MiMo-V2-Flash as released)",
    )
    parser.add_argument("--recipe", metavar="NAME", help="what convert would use (default: as converted, else 4bit)")
    parser.add_argument(
        "--context", metavar="TOKENS", type=tokens, help="such as 32k (default: 32k, or the most the model takes)"
    )
    parser.add_argument(
        "--expert-memory", metavar="SIZE", default="auto", help="bytes for experts, or auto, or all (default: auto)"
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="take the hit rate of this routing trace instead of assuming it"
    )
    parser.add_argument("--all", action="store_true", help="a table of common Macs")
    add_machine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def tokens(text: str) -> int:
    """argparse type: 4096 or 32k (k = 1024 tokens)."""
    match = re.fullmatch(r"(\d+)k", text.strip().lower())
    return positive_int(match[1]) * 1024 if match else positive_int(text)


def subject_of(model: str | None, recipe: str | None) -> Subject:
    """The subject that `--model` names. Of a Hub repo one small file is fetched.

    Raises FormatError, MimoError or UsageError.
    """
    from .checkpoint.recipe import named

    if recipe is not None:
        named(recipe)  # a wrong name is refused before anything is read
    if model is None or model in released.REPOS:
        return released_subject(recipe)
    path = CHECKPOINT if model == "demo" else Path(model).expanduser()
    if path.is_dir():
        return subject_of_directory(model if model == "demo" else path.resolve().name, Directory(path), recipe)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.exists():
        return subject_of_config(model, _fetch_config(model), recipe)
    raise UsageError(f"{model}: no such directory, and not the name of a Hub repo (owner/name)")


def _fetch_config(repo: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        config: dict[str, Any] = json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
        return config
    except Exception as error:  # the Hub's client raises its own, httpx's and OS errors
        raise MimoError(
            f"{repo}: config.json cannot be fetched from the Hub: {type(error).__name__}: {error}"
        ) from error


class TraceHits:
    """planning's HitRates from a recorded routing trace: LFU's are expected, LRU's are the other end of the range."""

    def __init__(self, path: str, args: ModelArgs):
        """Raises MimoError for a file that cannot be read, UsageError for a trace that is empty or of another model."""
        from .experts.simulate import needs_of
        from .experts.trace import read_trace

        self.name, self.trace = Path(path).name, read_trace(path)
        if (len(self.trace.layers), self.trace.num_experts) != (len(args.moe_layers), args.n_routed_experts):
            raise UsageError(
                f"{self.name}: a trace of {len(self.trace.layers)} layers and {self.trace.num_experts} experts, "
                f"{len(args.moe_layers)} and {args.n_routed_experts} expected"
            )
        self._needs = needs_of(self.trace)
        if not self._needs:
            raise UsageError(f"{self.name}: a trace without a single token; record one with --trace")
        self._known: dict[int, Range] = {}

    def __call__(self, slots: int) -> Range:
        from .experts.simulate import simulate

        if slots >= len(self.trace.layers) * self.trace.num_experts:
            return Range(1.0, 1.0, 1.0)  # all experts are read before the first token
        slots = max(1, slots)
        if slots not in self._known:
            lfu, lru = (simulate(self.trace, name, slots, needs=self._needs).hit_rate for name in ("lfu", "lru"))
            self._known[slots] = Range(min(lfu, lru), lfu, max(lfu, lru))
        return self._known[slots]

    @property
    def source(self) -> str:
        return f"of {self.name}, replayed from empty slots: LFU's, and LRU's as the other end of the range"


def plan(args: argparse.Namespace) -> int:
    if args.expert_memory not in ("auto", "all"):
        parse_size(args.expert_memory)
    machine = given(args)
    if args.all and machine != Given():
        raise UsageError("--all: the table has machines of its own; leave the flags for another machine out")
    subject = subject_of(args.model, args.recipe)
    model = ModelArgs.from_dict(subject.config)
    if args.context is None:
        args.context = usual_context(model)
    if args.context > model.max_position_embeddings:
        raise UsageError(
            f"--context: {args.context:,} tokens; max_position_embeddings = {model.max_position_embeddings:,}"
        )
    trace = TraceHits(args.trace, model) if args.trace else None
    options = {"expert_memory": args.expert_memory, "hits": trace}
    machines = MACS if args.all else [machine_with(machine, subject.files)]
    plans = [make_plan(subject, model, args.context, machine, **options) for machine in machines]
    if args.all:
        if args.json:
            rows = [report(subject, args.context, plan, []) for plan in plans]
            print(json.dumps({"schema_version": SCHEMA_VERSION, "machines": rows}, ensure_ascii=False))
        else:
            print_table(subject, args.context, plans)
        return 0
    helps = advice(subject, model, args.context, plans[0], **options)
    if args.json:
        fields = {"schema_version": SCHEMA_VERSION} | report(subject, args.context, plans[0], helps)
        print(json.dumps(fields, ensure_ascii=False))
    else:
        print_plan(subject, args.context, plans[0], helps)
    return 0 if plans[0].forecast else 1


def report(subject: Subject, context: int, plan: Plan, helps: list[tuple[str, float]]) -> dict[str, Any]:
    """The JSON object of one plan."""
    budget, found = plan.budget, plan.forecast
    return {
        "model": subject.name,
        "recipe": subject.recipe,
        "context": context,
        "chunk": budget.chunk,
        "machine": asdict(plan.machine),
        "fits": found is not None,
        "refusal": plan.refusal or None,
        "bytes": {
            "trunk": budget.trunk,
            "kv": budget.kv,
            "transients": budget.transients,
            "all_experts": budget.experts,
            "everything": budget.everything,
            "pool": found.expert_bytes if found else 0,
            "total": found.total_bytes if found else None,
        },
        "experts": {
            "count": budget.num_experts,
            "slot_bytes": budget.slot_bytes,
            "slots": found.slots if found else 0,
            "share": found.share if found else 0.0,
            "all_resident": bool(found and found.all_resident),
        },
        "forecast": {name: asdict(getattr(found, name)) for name in _RANGES} if found else None,
        "assumptions": assumptions(plan),
        "would_help": [{"what": what, "decode_tps": tps} for what, tps in helps],
    }


_RANGES = ("hit_rate", "disk_bytes_per_token", "decode_tps", "prefill_tps")


def print_plan(subject: Subject, context: int, plan: Plan, helps: list[tuple[str, float]]) -> None:
    budget, found, machine = plan.budget, plan.forecast, plan.machine
    print(f"{subject.name}, {subject.recipe}, {context:,} tokens of context, on {machine.name} ({machine.backend})")
    print(f"memory: {format_size(machine.memory)}, of which {format_size(machine.available)} usable")
    print(f"  trunk       {format_size(budget.trunk):>10}")
    print(f"  KV caches   {format_size(budget.kv):>10}")
    print(f"  transients  {format_size(budget.transients):>10}   of a prefill chunk of {budget.chunk:,} tokens")
    if found is None:
        print(f"It does not fit: {plan.refusal}.")
    else:
        print(
            f"  expert pool {format_size(found.expert_bytes):>10}   {found.slots:,} of {budget.num_experts:,} experts "
            f"({found.share:.1%}), {format_size(budget.slot_bytes)} each"
        )
        print(f"  total       {format_size(found.total_bytes):>10}")
        rates, disk = found.hit_rate, found.disk_bytes_per_token
        print(f"hit rate {rates.expected:.0%} ({rates.low:.0%}–{rates.high:.0%})")
        print(
            f"read from disk for a token: {format_size(int(disk.expected))} "
            f"({format_size(int(disk.low))}–{format_size(int(disk.high))})"
        )
        print(f"decode   {_range(found.decode_tps)} tokens/s")
        print(f"prefill  {_range(found.prefill_tps)} tokens/s in long prompts")
    if helps:
        print("what would help:")
        for what, tps in helps:
            print(f"  {what}: {tps:.1f} tokens/s")
    print("A forecast, not a measurement. It assumes:")
    for line in assumptions(plan):
        print(f"  {line}")


def _range(r: Range) -> str:
    return f"{r.expected:.1f} ({r.low:.1f}–{r.high:.1f})"


def print_table(subject: Subject, context: int, plans: list[Plan]) -> None:
    print(
        f"{subject.name}, {subject.recipe}, {context:,} tokens of context. Forecasts, not measurements; GB = 10⁹ bytes."
    )
    print(f"{'machine':<26} {'SSD':>5} {'pool':>9} {'resident':>8} {'hits':>5} {'decode tok/s':>18} {'prefill':>8}")
    for row in plans:
        found, speed = row.forecast, f"{row.machine.disk / 1e9:.1f}"
        if found is None:
            print(f"{row.machine.name:<26} {speed:>5} does not fit")
            continue
        print(
            f"{row.machine.name:<26} {speed:>5} {format_size(found.expert_bytes):>9} {found.share:>8.1%} "
            f"{found.hit_rate.expected:>5.0%} {_range(found.decode_tps):>18} {found.prefill_tps.expected:>8.0f}"
        )


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: plan(args), computes=False)


if __name__ == "__main__":
    raise SystemExit(main())
