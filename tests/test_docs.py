"""The documentation: links lead somewhere, commands can be typed, diagrams can be read, the layout is as drawn."""

import argparse
import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlx_mimo.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
DRAWN = [DOCS / f"{name}.svg" for name in ("record_to_slot", "decode_step", "prefill_waves", "layout")]
MODULES = {"convert": "mlx_mimo.convert.__main__", "server": "mlx_mimo.server.__main__"}
SUBCOMMANDS = ("verify", "inspect", "repack", "repair")
SVG = "{http://www.w3.org/2000/svg}"


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file.resolve()), f"{page.name}: no heading for {target}"


def commands_in(page: Path) -> list[tuple[str, list[str]]]:
    """(command, its words) for what is written as `mlx_mimo NAME …` or `python -m mlx_mimo.NAME …`."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = []
    for line in lines:
        match = re.search(rf"(?:^|\s)mlx_mimo[ .]({'|'.join(COMMANDS)})(?=\s|$)(.*)", line)
        if match:
            found.append((match[1], shlex.split(match[2].replace("…", "x"), comments=True)))
    return found


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


@cache
def known_flags(command: str, sub: str | None) -> set[str]:
    if sub is not None:
        source = (ROOT / "convert" / f"{sub}.py").read_text(encoding="utf-8")
        return set(re.findall(r'"(--[a-z-]+)"', source))
    return flags_of(importlib.import_module(MODULES.get(command, f"mlx_mimo.{command}")).build_parser())


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CLI.md"], ids=lambda page: page.name)
def test_every_command_in_the_docs_has_the_flags_it_is_given(page):
    for command, words in commands_in(page):
        sub = words[0] if command == "convert" and words and words[0] in SUBCOMMANDS else None
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known_flags(command, sub), f"{page.name}: mlx_mimo {command} {' '.join(words)}"


def test_the_questions_name_their_commands():
    named = {command for command, _ in commands_in(DOCS / "FAQ.md")}
    assert named >= {"plan", "doctor", "bench", "compare", "convert", "generate", "chat", "server", "replay", "bridge"}


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_a_diagram_is_text_with_a_title_in_light_and_dark(path):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text
    assert len(root.findall(f".//{SVG}text")) > 10
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<(image|script|foreignObject)|href=", text)
    style = root.find(f"{SVG}style").text
    light, dark = style.split("@media")
    used = {name for e in root.iter() for name in (e.get("class") or "").split()}
    coloured = {name for name in used if re.search(rf"\.{name} \{{[^}}]*(fill|stroke): #", light)}
    assert coloured == {name for name in coloured if re.search(rf"\.{name} \{{[^}}]*#", dark)}
    width, height = (float(root.get(name)) for name in ("width", "height"))
    for element in root.iter(f"{SVG}text"):
        assert 0 < float(element.get("x")) < width
        assert 0 < float(element.get("y")) < height


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_a_diagram_is_shown_by_a_page(path):
    assert any(f"({path.name})" in page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))


# Who may import whom, as docs/layout.svg draws it.
ARROWS = {
    "commands": {"commands", "server", "runtime", "experts", "convert", "config", "record"},
    "server": {"commands", "runtime", "models", "config", "record"},
    "runtime": {"models", "experts", "cpu", "convert", "config", "record"},
    "models": {"config"},
    "experts": {"cpu", "record"},
    "cpu": {"models", "experts", "record"},
    "convert": {"config", "record"},
    "config": set(),
    "record": set(),
}


def part_of(module: str) -> str:
    names = module.split(".")[1:]
    if names[:2] == ["models", "config"]:
        return "config"
    if names[:2] in (["experts", "record"], ["experts", "header"]):
        return "record"
    return names[0] if names and names[0] in ARROWS else "commands"


def imports_of(path: Path, module: str) -> set[str]:
    """Our own modules that a file imports, also inside its functions."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} if node.module else {f"{name}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "mlx_mimo"}


def test_imports_go_only_where_the_layout_draws_an_arrow():
    roots = {"mlx_mimo": ROOT / "mlx_mimo", "mlx_mimo.convert": ROOT / "convert"}
    free = {"mlx_mimo", "mlx_mimo.errors", "mlx_mimo.__version__"}
    for package, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])
            part = part_of(module)
            for target in imports_of(path, module) - free:
                other = part_of(target)
                assert other == part or other in ARROWS[part], f"{module} imports {target}: no arrow {part} → {other}"
