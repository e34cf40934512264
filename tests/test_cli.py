"""Every command is listed and documented, and exits with 2 for a wrong command line."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mimo.__main__ import COMMANDS, module_of

DOCS = Path(__file__).parents[1] / "docs"
MAKE = runpy.run_path(str(DOCS / "make_cli.py"))


def test_cli_md_is_what_make_cli_generates():
    assert (DOCS / "CLI.md").read_text(encoding="utf-8") == MAKE["page"](), "run: python docs/make_cli.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    module = module_of(name)
    parser = module.build_parser()
    assert parser.prog == f"mlx_mimo {name}"
    unexplained = [a.dest for a in parser._actions if a.option_strings and not a.help and not a.choices]
    assert not unexplained


def test_the_page_shows_values_choices_and_defaults():
    text = MAKE["page"]()
    assert "| `--expert-policy lfu\\|lru` |" in text
    assert "| `-m MAX_TOKENS`, `--max-tokens MAX_TOKENS` |" in text
    assert re.search(r"`--context TOKENS` \| such as 32k \(default: 32k, ", text)
    assert "%(default)s" not in text
    assert "%%" not in text


@pytest.mark.parametrize("command", [["plan", "--context", "0"], ["doctor", "--deep"], ["nonsense"]])
def test_a_wrong_command_line_exits_with_2(command):
    result = subprocess.run([sys.executable, "-m", "mlx_mimo", *command], capture_output=True, text=True)
    assert result.returncode == 2
    assert "error" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_the_commands():
    result = subprocess.run([sys.executable, "-m", "mlx_mimo", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
