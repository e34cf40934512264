"""What surrounds the package: the wheel's list, CI's sum of tests, one version of ruff."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
WHEEL = runpy.run_path(str(CI / "check_wheel.py"))
SUM = runpy.run_path(str(CI / "sum.py"))


def patterns() -> list[str]:
    lines = WHEEL["LIST"].read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a clone")
def test_the_wheels_list_names_every_file_of_the_package_and_nothing_else():
    files = WHEEL["tracked"]()
    assert "mlx_mimo/convert/__init__.py" in files
    metadata = {line.replace("*", "0") for line in patterns() if ".dist-info" in line}
    assert WHEEL["differences"](files | metadata, patterns(), files) == []


def test_a_file_that_is_not_listed_or_missing_and_a_line_without_a_file_are_found():
    found = WHEEL["differences"]({"a/x.py", "b/y.py"}, ["a/*.py", "c/*.py"], {"a/x.py", "a/z.py"})
    assert found == [
        "b/y.py: in the wheel, not in wheel_contents.txt",
        "a/z.py: in the repository, not in the wheel",
        "c/*.py: in wheel_contents.txt, nothing in the wheel",
    ]


@pytest.mark.parametrize(("name", "pattern"), [("a/b/x.py", "a/*.py"), ("c/a/x.py", "a/*.py"), ("a/x.pyc", "a/*.py")])
def test_a_pattern_of_the_wheels_list_matches_one_folder(name, pattern):
    assert not WHEEL["fits"](name, pattern)


def test_the_sum_counts_errors_as_failures(tmp_path, capsys):
    for name, counts in {"a": (10, 0, 0, 2), "b": (5, 1, 1, 0)}.items():
        tests, failures, errors, skipped = counts
        suite = f'<testsuite tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"/>'
        (tmp_path / f"{name}.xml").write_text(f"<testsuites>{suite}</testsuites>")
    assert SUM["main"]([tmp_path / "a.xml"]) == 0
    assert SUM["main"]([tmp_path / "a.xml", tmp_path / "b.xml"]) == 1
    assert capsys.readouterr().out.splitlines() == ["8 passed, 0 failed, 2 skipped", "11 passed, 2 failed, 2 skipped"]


def test_no_results_are_not_a_success():
    assert SUM["main"]([]) == 1


def test_the_commit_hooks_run_the_ruff_that_ci_runs():
    (wanted,) = re.findall(r'"(ruff==[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = re.findall(r'"(ruff==[\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks == [wanted, wanted]
