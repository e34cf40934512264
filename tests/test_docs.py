"""The docs' links lead somewhere, their commands exist, their diagrams can be read; imports are as declared."""

import argparse
import ast
import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlx_mimo.__main__ import COMMANDS, module_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
CARDS = [ROOT / "mlx_mimo" / "demo" / "README.md", EXAMPLES / "README.md", EXAMPLES / "demo_model" / "README.md"]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *CARDS]
DRAWN = [DOCS / f"{name}.svg" for name in ("record_to_slot", "decode_step", "prefill_waves", "layout")]
SUBCOMMANDS = ("verify", "inspect", "repack", "repair")
SVG = "{http://www.w3.org/2000/svg}"


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file.resolve()), f"{page.name}: no heading for {target}"


def typed_in(page: Path) -> list[str]:
    """Returns the lines of a page's code blocks, and its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return lines + [" ".join(code.split()) for code in inline]


def words_of(line: str) -> list[str]:
    return shlex.split(line.replace("…", "x"), comments=True)


def commands_in(page: Path) -> list[tuple[str, list[str]]]:
    """Returns (command, its words) for each `mlx_mimo NAME …` or `python -m mlx_mimo.NAME …`."""
    found = []
    for line in typed_in(page):
        match = re.search(rf"(?:^|\s)mlx_mimo[ .]({'|'.join(COMMANDS)})(?=\s|$)(.*)", line)
        if match:
            found.append((match[1], words_of(match[2])))
    return found


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


@cache
def known_flags(command: str, sub: str | None) -> set[str]:
    if sub is not None:
        source = (ROOT / "convert" / f"{sub}.py").read_text(encoding="utf-8")
        return set(re.findall(r'"(--[a-z0-9-]+)"', source))
    return flags_of(module_of(command).build_parser())


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CLI.md"], ids=name_of)
def test_every_command_in_the_docs_has_the_flags_it_is_given(page):
    for command, words in commands_in(page):
        sub = words[0] if command == "convert" and words and words[0] in SUBCOMMANDS else None
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known_flags(command, sub), f"{page.name}: mlx_mimo {command} {' '.join(words)}"


def scripts_in(text: str) -> list[tuple[str, list[str]]]:
    """Returns (path, its words) for each `python FOLDER/NAME.py …`; a bare `FOLDER/NAME.py` has no words."""
    found = []
    for line in text.splitlines():
        match = re.search(r"(?:^|\s)((?:examples|tests|docs)/[\w/]+\.py)(?=\s|$)(.*)", line)
        if match:
            found.append((match[1], words_of(match[2])))
    return found


def own_flags(script: Path) -> set[str]:
    return set(re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', script.read_text(encoding="utf-8")))


def check_scripts(text: str) -> None:
    for name, words in scripts_in(text):
        assert (ROOT / name).is_file(), f"no {name}"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= own_flags(ROOT / name), f"{name} {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_script_in_the_docs_is_there_and_has_the_flags_it_is_given(page):
    check_scripts("\n".join(typed_in(page)))


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.py")), ids=name_of)
def test_a_scripts_docstring_names_its_path_and_flags(script):
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"python ([^`\n]+)", text.replace("[", " ").replace("]", " ").replace("|", " "))
    check_scripts("\n".join(lines))


@pytest.mark.parametrize(
    "line", ["examples/none.py", "python examples/measure/cpu_step.py --model DIR --no-such-flag 3"]
)
def test_a_script_or_flag_that_is_not_there_is_found(line):
    with pytest.raises(AssertionError):
        check_scripts(line)


def test_the_docs_name_scripts_with_flags():
    """Otherwise the tests above would check nothing."""
    found = [(name, words) for page in PAGES for line in typed_in(page) for name, words in scripts_in(line)]
    assert len({name for name, _ in found}) > 10
    assert sum(any(word.startswith("--") for word in words) for _, words in found) > 5


def test_the_faq_names_every_command():
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


GRAPH = runpy.run_path(str(DOCS / "import_graph.py"))


def test_imports_go_only_where_an_arrow_is_declared():
    assert GRAPH["undeclared"]() == []


def test_no_circle_ties_rooms_or_files():
    assert GRAPH["circles"](GRAPH["room_arrows"]()) == []
    assert GRAPH["circles"](GRAPH["file_arrows"]()) == []


def test_the_declared_arrows_run_down_and_are_used():
    rooms, used = list(GRAPH["ARROWS"]), GRAPH["room_arrows"]()
    assert set(rooms) == set(used)
    for place, room in enumerate(rooms):
        assert GRAPH["ARROWS"][room] <= set(rooms[place + 1 :]), room
        assert GRAPH["ARROWS"][room] <= used[room], f"{room}: an arrow that no import uses"


def test_a_circle_is_found():
    assert GRAPH["circles"]({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def test_imports_within_functions_and_of_folders_are_seen():
    assert {"runtime.load", "runtime.stream"} <= GRAPH["imports_of"]("generate")
    assert "cpu.__init__" in GRAPH["imports_of"]("runtime.compute")
    assert "checkpoint.header" in GRAPH["imports_of"]("convert.source")


ARCHITECTURE = runpy.run_path(str(DOCS / "make_architecture.py"))


def test_the_architecture_page_lists_every_folder_and_file():
    text = (DOCS / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert text == ARCHITECTURE["page"](text), "run: python docs/make_architecture.py"


def test_every_file_says_what_it_is():
    assert [name for name in GRAPH["modules"]() if len(ARCHITECTURE["said"](name)) < 15] == []


def test_files_are_listed_above_those_that_they_import():
    arrows = {"a": {"c"}, "b": set(), "c": {"b"}}
    assert ARCHITECTURE["in_order"](dict.fromkeys("abc", Path()), arrows) == ["a", "c", "b"]
