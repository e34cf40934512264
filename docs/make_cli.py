"""Builds CLI.md from the commands' own parsers: `python docs/make_cli.py`. A test holds the page current.

Argparse's help differs between versions of Python, so the tables are made from its actions.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from mlx_mimo.__main__ import COMMANDS, module_of

PAGE = Path(__file__).with_name("CLI.md")
HEAD = """# The command line

Made from the commands' parsers by `python docs/make_cli.py`; change the parser, not this page.

Every command exists as `mlx_mimo NAME` and as `python -m mlx_mimo.NAME`. Sizes are written as `24GB` or `800MB`, with
GB = 10⁹ bytes; GiB and MiB mean powers of two. Exit codes: 0 done, 1 something in a file, a model or the machine is
wrong, 2 the command line is wrong, 130 interrupted.
"""


def page() -> str:
    parts = [HEAD, "| command | for |\n|---|---|"]
    parts[-1] += "".join(f"\n| [{name}](#{name}) | {_cell(what)} |" for name, what in COMMANDS.items())
    for name in COMMANDS:
        module = module_of(name)
        parts += _section(module.build_parser(), name, 2)
        for sub in getattr(module, "SUBCOMMANDS", ()):
            found = importlib.import_module(f"{module.__package__}.{sub}")
            parts += _section(_parser_in(found.run), f"{name} {sub}", 3)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


class _Found(Exception):
    pass


def _parser_in(run: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser that a subcommand makes for itself when it runs."""

    def caught(parser: argparse.ArgumentParser, *_, **__):
        raise _Found(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", caught):
        try:
            run([])
        except _Found as found:
            return found.args[0]
    raise TypeError(f"{run.__module__}: no parser seen")


def _section(parser: argparse.ArgumentParser, title: str, level: int) -> list[str]:
    parts = [f"{'#' * level} {title}"]
    if parser.description:
        parts.append(" ".join(parser.description.split()))
    rows, nested = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            nested += [(f"{title} {name}", sub) for name, sub in action.choices.items()]
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            rows.append(f"| {_cell(_flags(action))} | {_cell(_help(action, parser))} |")
    if rows:
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    for name, sub in nested:
        parts += _section(sub, name, level + 1)
    return parts


def _flags(action: argparse.Action) -> str:
    """`-m N`, `--max-tokens N`; a positional by its name."""
    value = _value(action)
    if not action.option_strings:
        return f"`{value}`" if action.nargs not in ("?", "*") else f"`[{value}]`"
    return ", ".join(f"`{flag} {value}`" if value else f"`{flag}`" for flag in action.option_strings)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None and not action.metavar:
        return "|".join(map(str, action.choices))
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    name = " ".join(name) if isinstance(name, tuple) else name
    return f"{name} …" if action.nargs in ("+", "*") else name


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = " ".join((action.help or "").split())
    if text:
        text = parser._get_formatter()._expand_help(action)
    if action.required and action.option_strings:
        text += " (required)"
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
