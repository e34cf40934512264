"""The server's rooms: http uses api and engine, api uses engine, and watch looks on the engine alone."""

import ast
from pathlib import Path

import pytest

import mlx_mimo.server

SERVER = Path(mlx_mimo.server.__file__).parent
# What each room may import of the others, and what of the outside it must not know.
ROOMS = {
    "http": ({"api", "engine", "watch"}, set()),
    "api": ({"engine"}, {"starlette", "uvicorn", "h11", "socket", "asyncio", "http", "mlx"}),
    "engine": (set(), {"starlette", "uvicorn", "h11", "socket", "asyncio", "http"}),
    "watch": ({"engine"}, {"starlette", "uvicorn", "h11", "socket", "asyncio", "http"}),
}
SHARED = {"errors", "cancellation"}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """(rooms and shared files of the server, packages of the outside)"""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            inside |= {name.partition(".")[0] for name in names}
    return inside, outside


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    below, foreign = ROOMS[room]
    files = sorted((SERVER / room).glob("*.py"))
    assert len(files) > 3
    for path in files:
        inside, outside = imports_of(path)
        assert inside <= below | SHARED, path.name
        assert not outside & foreign, path.name
