"""`mlx_mimo bridge`: unmodified mlx-lm commands run our model and residency on a directory.

`from mlx_mimo.bridge import classes` is what the bridge file of a directory says: that import must go on working.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import classes

__all__ = ["classes"]


def __getattr__(name: str) -> Any:
    if name == "classes":
        from .model import classes

        return classes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
