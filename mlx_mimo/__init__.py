"""mlx-mimo: MiMo-V2-Flash for MLX, with experts that need not all be in memory.

Importing this package loads nothing heavy: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .errors import FormatError, MimoError, UsageError
    from .experts.residency import Residency
    from .runtime.load import load
    from .runtime.stream import Response, stream_generate

__version__ = "0.1.0"
__all__ = [
    "FormatError",
    "MimoError",
    "Residency",
    "Response",
    "UsageError",
    "__version__",
    "convert_checkpoint",
    "load",
    "stream_generate",
]

# {name: the module it lives in}; the imports above tell type checkers the same
_HOMES = {
    "FormatError": "errors",
    "MimoError": "errors",
    "Residency": "experts.residency",
    "Response": "runtime.stream",
    "UsageError": "errors",
    "convert_checkpoint": "convert",
    "load": "runtime.load",
    "stream_generate": "runtime.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
