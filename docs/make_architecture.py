"""Writes the listing in ARCHITECTURE.md from the package itself: `python docs/make_architecture.py`.

A line for every folder and file, made of the first sentence of its docstring. Rooms stand in the order of
import_graph.py's ARROWS; within a folder a file stands above those that it imports. A test holds the page current.
"""

import ast
import re
import runpy
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "ARCHITECTURE.md"
GRAPH = runpy.run_path(str(HERE / "import_graph.py"))
BEGIN, END = "<!-- listing: python docs/make_architecture.py -->", "<!-- end of the listing -->"


def page(text: str) -> str:
    """The page with its listing made anew. Raises ValueError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name}: {BEGIN} … {END} expected")
    return "".join([before, begin, "\n\n", listing(), "\n\n", end, after])


def listing() -> str:
    order = in_order(GRAPH["modules"](), GRAPH["file_arrows"]())
    lines = []
    for room in GRAPH["ARROWS"]:
        names = [name for name in order if GRAPH["room_of"](name) == room]
        if names == [room]:
            lines.append(f"- `{room}.py` {said(room)}")
            continue
        lines.append(f"- **`{room}/`** {said(f'{room}.__init__')}")
        folders = dict.fromkeys(name.rpartition(".")[0] for name in names)
        for folder in folders:
            deep = "  " * folder.count(".")
            if folder != room:
                lines.append(f"{deep}- **`{folder.rpartition('.')[2]}/`** {said(f'{folder}.__init__')}")
            for name in names:
                parent, _, stem = name.rpartition(".")
                if parent == folder and stem != "__init__":
                    lines.append(f"{deep}  - `{stem}.py` {said(name)}")
    return "\n".join(lines)


def in_order(modules: dict[str, Path], arrows: dict[str, set[str]]) -> list[str]:
    """The modules, each above those that it imports; by name where that leaves a choice. There must be no circle."""
    wanted_by = {name: {other for other in modules if name in arrows[other]} for name in modules}
    order: list[str] = []
    while len(order) < len(modules):
        order.append(min(name for name in modules if name not in order and wanted_by[name] <= set(order)))
    return order


def said(name: str) -> str:
    """The first sentence of a module's docstring, without the command line that it may begin with."""
    text = ast.get_docstring(ast.parse(GRAPH["modules"]()[name].read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    paragraph = re.sub(r"^`python -m [^`]*`(?:, [^:]*)?: ", "", paragraph)
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
