"""The package as a whole: what importing it loads, and the names it offers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_mimo

PACKAGE = Path(mlx_mimo.__file__).parent


def test_importing_the_package_imports_neither_mlx_nor_numpy():
    code = "import sys, mlx_mimo; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "mlx_mimo" in loaded
    assert not loaded & {"mlx", "numpy", "mlx_lm", "transformers", "numba"}
    assert "importlib.metadata" not in result.stdout.split()


@pytest.mark.parametrize("name", mlx_mimo.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(mlx_mimo)
    found = getattr(mlx_mimo, name)
    assert name == "__version__" or found.__name__ == name


def test_type_checkers_are_told_the_same_names_from_the_same_modules():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert told == mlx_mimo._HOMES
    assert {*told, "__version__"} == set(mlx_mimo.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlx_mimo' has no attribute 'loud'"):
        _ = mlx_mimo.loud
