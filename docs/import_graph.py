"""The import graph of the package: `python docs/import_graph.py` prints its floors, undeclared arrows and circles.

A room is a folder of the package, or a module that lies beside the folders. ARROWS declares which rooms a room may
import; tests/test_docs.py holds the package to it, and refuses circles between rooms and between files. Imports inside
functions count.
"""

import ast
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_mimo"
BASE = frozenset({"device", "errors", "units"})  # any room may import these

# From the top down: a room imports only what stands in its line, and BASE.
ARROWS: Mapping[str, frozenset[str]] = {
    room: frozenset(below.split())
    for room, below in {
        "__main__": "",
        "chat": "arguments console runtime",
        "bench": "arguments checkpoint config convert experts planning runtime",
        "bridge": "arguments checkpoint config cpu experts models planning runtime",
        "compare": "arguments config runtime",
        "doctor": "arguments checkpoint config convert cpu planning",
        "generate": "arguments console runtime",
        "plan": "arguments checkpoint config demo experts planning",
        "replay": "arguments experts",
        "server": "arguments checkpoint config models planning runtime",
        "arguments": "planning",
        "runtime": "checkpoint config convert cpu demo experts models planning",
        "experts": "checkpoint cpu",
        "cpu": "checkpoint models planning",
        "models": "config",
        "planning": "checkpoint config",
        "convert": "checkpoint config",
        "config": "",
        "checkpoint": "",
        "console": "",
        "device": "",
        "demo": "",
        "units": "",
        "errors": "",
    }.items()
}


@cache
def modules() -> dict[str, Path]:
    """{name without the package: file} of every module; the package's own `__init__`, a facade, is left out."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            path = Path(folder, file)
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            if path.suffix == ".py" and parts != ("__init__",):
                found[".".join(parts)] = path
    return found


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, also inside its functions."""
    package = ["mlx_mimo", *name.split(".")][:-1]
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            found |= {_module(full) or _module(source) for full in names}
        elif isinstance(node, ast.Import):
            found |= {_module(alias.name) for alias in node.names}
    return {module for module in found if module is not None and module != name}


def _module(full: str) -> str | None:
    """`experts.pool` for mlx_mimo.experts.pool, `cpu.__init__` for a folder, None for what is not the package's."""
    if not full.startswith("mlx_mimo."):
        return None
    name = full.removeprefix("mlx_mimo.")
    return next((found for found in (name, f"{name}.__init__") if found in modules()), None)


def room_of(module: str) -> str:
    return module.partition(".")[0]


@cache
def file_arrows() -> dict[str, set[str]]:
    return {name: imports_of(name) for name in modules()}


def room_arrows() -> dict[str, set[str]]:
    """{room: the other rooms that its files import}"""
    arrows: dict[str, set[str]] = {room_of(name): set() for name in modules()}
    for name, targets in file_arrows().items():
        arrows[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    return arrows


def undeclared() -> list[tuple[str, str]]:
    """(file, file) of every import between rooms that ARROWS does not declare."""
    return [
        (name, target)
        for name, targets in sorted(file_arrows().items())
        for target in sorted(targets)
        if room_of(target) not in {room_of(name)} | BASE | ARROWS.get(room_of(name), frozenset())
    ]


def circles(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(arrows[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            place = stack.index(node)
            component = set(stack[place:])
            del stack[place:]
            if len(component) > 1:
                found.append(component)

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """{room: how many rooms lie below it at the most, in a chain}; without circles only."""

    @cache
    def floor(room: str) -> int:
        return max((floor(below) + 1 for below in arrows[room]), default=0)

    return {room: floor(room) for room in arrows}


def main() -> None:
    arrows = room_arrows()
    between, within = circles(arrows), circles(file_arrows())
    if not between:
        height = floors(arrows)
        for level in sorted(set(height.values()), reverse=True):
            print(f"floor {level}: {', '.join(sorted(room for room in height if height[room] == level))}")
    print(f"{len(arrows)} rooms, {sum(map(len, arrows.values()))} arrows between them")
    print(f"undeclared arrows: {len(undeclared())}")
    for name, target in undeclared():
        print(f"  {name} → {target}")
    print(f"circles between rooms: {len(between)}, between files: {len(within)}")
    for circle in between + within:
        print(f"  {', '.join(sorted(circle))}")


if __name__ == "__main__":
    main()
