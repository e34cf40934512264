"""`python -m mlx_mimo COMMAND …`, also installed as `mlx_mimo`."""

import importlib
import sys
from types import ModuleType

COMMANDS = {
    "generate": "one prompt in, text out",
    "chat": "an interactive conversation",
    "server": "an OpenAI-compatible HTTP server",
    "bridge": "let unmodified mlx-lm commands run a directory with our model and residency",
    "convert": "a Hugging Face FP8 checkpoint → an MLX directory; also verify, inspect, repack, repair",
    "plan": "does it fit, and how fast: before any download",
    "doctor": "checks the machine and a model directory",
    "bench": "times prefill and decode; writes JSON and a plot",
    "replay": "a routing trace × policies × budgets → hit rates",
    "compare": "two directories: KL divergence, agreement, perplexity",
}


def module_of(command: str) -> ModuleType:
    """The module of a command: a file, or the `__main__` of a folder."""
    module = importlib.import_module(f"mlx_mimo.{command}")
    return importlib.import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "usage: mlx_mimo COMMAND [options]\n\n" + "\n".join(lines) + "\n\nmlx_mimo COMMAND --help lists its options."


def main() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        from . import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"mlx_mimo: error: unknown command {command!r}\n{usage()}", file=sys.stderr)
        return 2
    del sys.argv[1]
    sys.argv[0] = f"mlx_mimo {command}"
    return module_of(command).main() or 0


if __name__ == "__main__":
    sys.exit(main())
