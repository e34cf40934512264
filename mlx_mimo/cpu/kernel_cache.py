"""Where numba keeps the kernels' compiled code."""

import os
import tempfile
from pathlib import Path

import numba

_FOLDERS = (Path(__file__).parent, Path(__file__).parent / "codegen")  # of the files with functions that numba caches


def choose() -> None:
    """Beside the source files where that can be written, else in the user's cache, else for this process only.

    Leaves NUMBA_CACHE_DIR as it is where it is set. Must be called before numba makes a function with a cache.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or all(writable(folder / "__pycache__") for folder in _FOLDERS):
        return
    import platformdirs

    user = Path(platformdirs.user_cache_dir("mlx-mimo")) / "numba"
    # numba's cache is pickled, so a folder that others can write to is not safe.
    numba.config.CACHE_DIR = str(user if writable(user) else tempfile.mkdtemp(prefix="mlx-mimo-"))


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is created where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
