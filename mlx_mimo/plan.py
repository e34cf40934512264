"""`python -m mlx_mimo.plan`: does it fit, and how fast, before any download."""

import argparse
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .arguments import add_machine_arguments, given, positive_int, run
from .errors import MimoError, UsageError
from .models.config import ModelArgs
from .runtime import released
from .runtime.budget import CHUNK, Budget, estimate, format_size, measure, parse_size, usual_context
from .runtime.forecast import (
    DISK_USED,
    OPERATIONS_PER_BYTE,
    ROUTER_WAIT,
    Forecast,
    Range,
    bandwidth_used,
    fit_on,
    forecast,
)
from .runtime.machine import MACS, Given, Machine, imagined, machine_with
from .runtime.source import DEMO, read_config

SCHEMA_VERSION = 1
# From the largest to the smallest: what `a smaller recipe` means.
RECIPES = ("bf16", "8bit", "6bit", "5bit", "4bit", "mxfp4", "mixed-3-4", "3bit", "mixed-2-3", "2bit")
WORTH_SAYING = 1.10  # how much faster something must be to be named as what would help


@dataclass(frozen=True)
class Subject:
    """What is planned: a config.json, and where there is one a converted directory as it is."""

    name: str
    config: dict
    recipe: str  # the one whose bytes are planned
    converted: Path | None = None

    @property
    def streamed(self) -> bool:
        """Whether experts can be read one by one; what is not converted yet will be so that they can."""
        return self.converted is None or any(self.converted.glob("model-experts-*.safetensors"))

    @property
    def files(self) -> list[Path]:
        return [] if self.converted is None else sorted(self.converted.glob("model*.safetensors"))

    def budget(self, args: ModelArgs, context: int, machine: Machine) -> Budget:
        sizes = (args, context, CHUNK, *machine.item_bytes)
        if self.converted is not None:
            return measure(self.converted, *sizes)
        from .convert.recipe import named

        return estimate(self.config, named(self.recipe), *sizes)


@dataclass(frozen=True)
class Plan:
    machine: Machine
    budget: Budget
    forecast: Forecast | None  # None: it does not fit
    refusal: str = ""
    hits_from: str = "as others measured them on models of this geometry, one sequence, after it has warmed up"


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
    """What `--model` names. A Hub repo costs one small file. Raises FormatError, MimoError or UsageError."""
    from .convert.recipe import named

    if recipe is not None:
        named(recipe)  # refused by its name before anything else
    if model is None or model in released.REPOS:
        return Subject(released.NAME, released.CONFIG, recipe or "4bit")
    path = DEMO if model == "demo" else Path(model).expanduser()
    if path.is_dir():
        config = read_config(path)
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.exists():
        config = _fetch_config(model)
    else:
        raise UsageError(f"{model}: no such directory, and not the name of a Hub repo (owner/name)")
    name = model if model == "demo" or not path.is_dir() else path.resolve().name
    if recipe is None and path.is_dir() and "quantization_config" in config and "quantization" not in config:
        recipe = "4bit"  # an FP8 checkpoint, to be converted
    if recipe is None and path.is_dir() and any(path.glob("model*.safetensors")):
        ours = config.get("mlx_mimo")
        return Subject(name, config, (ours.get("recipe") if isinstance(ours, dict) else None) or "as it is", path)
    return Subject(name, config, recipe or _recipe_in(config) or "4bit")


def _recipe_in(config: dict) -> str | None:
    """The recipe of a converted config.json, or the one whose experts have the bits that mlx-lm gave them; None where
    nothing is quantised. Raises UsageError for bits that no recipe has."""
    ours = config.get("mlx_mimo")
    name = ours.get("recipe") if isinstance(ours, dict) else None
    if name in RECIPES:
        return name
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return None
    kinds = {_bits_of(quantization)} | {
        _bits_of(quantization | found)
        for path, found in quantization.items()
        if isinstance(found, dict) and (".switch_mlp." in path or ".experts." in path)
    }
    name = _BITS.get(kinds.pop()) if len(kinds) == 1 else None
    if name is None:
        raise UsageError("config.json: it is quantised as no recipe does it; give --recipe to say which comes nearest")
    return name


def _bits_of(fields: dict) -> tuple:
    return fields.get("mode", "affine"), fields.get("bits"), fields.get("group_size")


# How mlx-lm names what our recipes do with experts.
_BITS = {("affine", bits, 64): f"{bits}bit" for bits in (2, 3, 4, 5, 6, 8)} | {("mxfp4", 4, 32): "mxfp4"}


def _fetch_config(repo: str) -> dict:
    from huggingface_hub import hf_hub_download

    try:
        return json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
    except Exception as error:  # the Hub's client raises its own, httpx's and OS errors
        raise MimoError(
            f"{repo}: config.json cannot be fetched from the Hub: {type(error).__name__}: {error}"
        ) from error


class TraceHits:
    """Hit rates of a recorded routing trace, by the number of slots: LFU's, and LRU's as the other end of a range."""

    def __init__(self, path: str, args: ModelArgs):
        """Raises MimoError or UsageError where the file is none, empty, or of another model."""
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
            return Range(1.0, 1.0, 1.0)  # all were read before the first token
        slots = max(1, slots)
        if slots not in self._known:
            lfu, lru = (simulate(self.trace, name, slots, needs=self._needs).hit_rate for name in ("lfu", "lru"))
            self._known[slots] = Range(min(lfu, lru), lfu, max(lfu, lru))
        return self._known[slots]

    @property
    def said(self) -> str:
        return f"of {self.name}, replayed from empty slots: LFU's, and LRU's as the other end of the range"


def make_plan(
    subject: Subject,
    args: ModelArgs,
    context: int,
    machine: Machine,
    expert_memory: str = "auto",
    trace: TraceHits | None = None,
) -> Plan:
    """The plan of one model on one machine; one that does not fit says why."""
    budget = subject.budget(args, context, machine)
    size = expert_memory if expert_memory in ("auto", "all") else parse_size(expert_memory)
    try:
        found = fit_on(budget, machine, size, subject.streamed)
        slots = found.expert_bytes // max(budget.slot_bytes, 1)
        hits = None if trace is None else trace(slots)
        speeds = forecast(args, found.budget, machine, found.expert_bytes, found.chunk, hits)
    except MimoError as error:
        return Plan(machine, budget, None, str(error))
    return Plan(machine, found.budget, speeds, "", trace.said if trace else Plan.hits_from)


def advice(
    subject: Subject,
    args: ModelArgs,
    context: int,
    plan: Plan,
    expert_memory: str = "auto",
    trace: TraceHits | None = None,
) -> list[tuple[str, float]]:
    """(what would help, tokens per second with it), the most helpful first."""
    machine, now = plan.machine, plan.forecast.decode_tps.expected if plan.forecast else 0.0
    ideas: list[tuple[str, Subject, int, Machine]] = []
    if subject.recipe in RECIPES:
        place = RECIPES.index(subject.recipe)
        for recipe in RECIPES[place + 1 :]:
            smaller = replace(subject, recipe=recipe, converted=None)
            ideas.append((f"a smaller recipe: --recipe {recipe}", smaller, context, machine))
    if context > 4096:
        ideas.append((f"a shorter context: --context {context // 4}", subject, context // 4, machine))
    for factor in (1.5, 2):
        memory = int(machine.memory * factor)
        more = imagined("", memory, backend=machine.backend).available
        larger = replace(machine, memory=memory, available=max(more, machine.available))
        ideas.append((f"more memory: {format_size(memory)}", subject, context, larger))
    faster = replace(machine, disk=2 * machine.disk)
    ideas.append((f"a faster disk: {format_size(int(faster.disk))}/s", subject, context, faster))
    found: dict[str, tuple[str, float]] = {}
    for text, what, length, where in ideas:
        other = make_plan(what, args, length, where, expert_memory, trace).forecast
        if other is not None and other.decode_tps.expected > WORTH_SAYING * now:
            kind = text.partition(":")[0]
            # The first of a kind is the smallest step; a later one is named only if none before it helps.
            found.setdefault(kind, (text, other.decode_tps.expected))
    return sorted(found.values(), key=lambda row: -row[1])


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
    options = {"expert_memory": args.expert_memory, "trace": trace}
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


def assumptions(plan: Plan) -> list[str]:
    machine, used = plan.machine, bandwidth_used(plan.machine)
    return [
        f"disk {format_size(int(machine.disk))}/s ({machine.disk_from}), "
        f"{DISK_USED.low:.0%}–{DISK_USED.high:.0%} of it reached",
        f"memory bandwidth {format_size(int(machine.bandwidth))}/s ({machine.bandwidth_from}), "
        f"{used.low:.0%}–{used.high:.0%} of it reached while decoding",
        f"{ROUTER_WAIT.high * 1e6:.0f}–{ROUTER_WAIT.low * 1e6:.0f} µs a layer of waiting for the router",
        f"prefill in chunks of {plan.budget.chunk} at {OPERATIONS_PER_BYTE.low:.0f}–{OPERATIONS_PER_BYTE.high:.0f} "
        "operations a byte of bandwidth",
        f"hit rates {plan.hits_from}",
    ]


def report(subject: Subject, context: int, plan: Plan, helps: list[tuple[str, float]]) -> dict:
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
