"""The plan of one model on one machine: its budget, its forecast, and what would make it faster."""

from dataclasses import dataclass, replace
from typing import Protocol

from ..config.model_args import ModelArgs
from ..errors import MimoError
from ..units import format_size, parse_size
from .budget import Budget
from .forecast import (
    DISK_USED,
    OPERATIONS_PER_BYTE,
    ROUTER_WAIT,
    Forecast,
    Range,
    bandwidth_used,
    fit_on,
    forecast,
)
from .machine import Machine, imagined
from .subject import RECIPES, Subject

LEAST_GAIN = 1.10  # how many times as fast a change must make decoding to be named


class HitRates(Protocol):
    """Hit rates by the number of slots, which replace the assumed ones."""

    @property
    def source(self) -> str:
        """Where they come from, to follow "hit rates "."""
        ...

    def __call__(self, slots: int) -> Range: ...


@dataclass(frozen=True)
class Plan:
    machine: Machine
    budget: Budget
    forecast: Forecast | None  # None: the model does not fit
    refusal: str = ""  # why it does not fit
    hits_from: str = "as others measured them on models of this geometry, one sequence, after it has warmed up"


def make_plan(
    subject: Subject,
    args: ModelArgs,
    context: int,
    machine: Machine,
    expert_memory: str = "auto",
    hits: HitRates | None = None,
) -> Plan:
    """The plan of a model at `context` tokens on a machine. `expert_memory` is "auto", "all" or a size such as "24GB".

    A model that does not fit gives a plan with a refusal. Raises FormatError where the files cannot be read.
    """
    budget = subject.budget(args, context, machine)
    size = expert_memory if expert_memory in ("auto", "all") else parse_size(expert_memory)
    try:
        found = fit_on(budget, machine, size, subject.streamed)
        slots = found.expert_bytes // max(budget.slot_bytes, 1)
        known = None if hits is None else hits(slots)
        speeds = forecast(args, found.budget, machine, found.expert_bytes, found.chunk, known)
    except MimoError as error:
        return Plan(machine, budget, None, str(error))
    return Plan(machine, found.budget, speeds, "", hits.source if hits else Plan.hits_from)


def advice(
    subject: Subject,
    args: ModelArgs,
    context: int,
    plan: Plan,
    expert_memory: str = "auto",
    hits: HitRates | None = None,
) -> list[tuple[str, float]]:
    """[(a change that would help, tokens per second with it)], the most helpful first.

    The arguments are those that `plan` was made with.
    """
    now = plan.forecast.decode_tps.expected if plan.forecast else 0.0
    found: dict[str, tuple[str, float]] = {}
    for text, what, length, where in _changes(subject, context, plan.machine):
        other = make_plan(what, args, length, where, expert_memory, hits).forecast
        if other is not None and other.decode_tps.expected > LEAST_GAIN * now:
            kind = text.partition(":")[0]
            # The changes of a kind begin with the smallest; the first that helps is named.
            found.setdefault(kind, (text, other.decode_tps.expected))
    return sorted(found.values(), key=lambda row: -row[1])


def _changes(subject: Subject, context: int, machine: Machine) -> list[tuple[str, Subject, int, Machine]]:
    """[(text, subject, context, machine)]: what could be changed, one thing each."""
    changes: list[tuple[str, Subject, int, Machine]] = []
    if subject.recipe in RECIPES:
        place = RECIPES.index(subject.recipe)
        for recipe in RECIPES[place + 1 :]:
            smaller = replace(subject, recipe=recipe, directory=None)
            changes.append((f"a smaller recipe: --recipe {recipe}", smaller, context, machine))
    if context > 4096:
        changes.append((f"a shorter context: --context {context // 4}", subject, context // 4, machine))
    for factor in (1.5, 2):
        memory = int(machine.memory * factor)
        more = imagined("", memory, backend=machine.backend).available
        larger = replace(machine, memory=memory, available=max(more, machine.available))
        changes.append((f"more memory: {format_size(memory)}", subject, context, larger))
    faster = replace(machine, disk=2 * machine.disk)
    changes.append((f"a faster disk: {format_size(int(faster.disk))}/s", subject, context, faster))
    return changes


def assumptions(plan: Plan) -> list[str]:
    """The constants that a plan's forecast depends on, one line each."""
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
