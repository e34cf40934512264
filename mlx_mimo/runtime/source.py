"""Finds the converted directory that a `--model` argument names, fetching or converting it where needed."""

import json
import sys
from pathlib import Path

from ..checkpoint.directory import WEIGHTS, Directory
from ..demo import CHECKPOINT
from ..errors import MimoError, UsageError
from ..units import format_size


def find(model: str | Path | None) -> Directory:
    """The converted directory that `model` names: None names the demo, else it is a directory or a Hub repo.

    A Hugging Face FP8 directory is offered for conversion in a terminal; elsewhere the command is named.
    Raises FormatError, MimoError or UsageError.
    """
    path = demo_directory() if model is None else _local(model)
    directory = Directory(path)
    if directory.is_fp8:
        from ..config.model_args import ModelArgs

        ModelArgs.from_dict(directory.config)  # another model is refused by its name, not offered for conversion
        target = _convert_beside(directory)
        directory = Directory(target)
        _ = directory.config  # which must be readable
    return directory


def demo_directory() -> Path:
    """The embedded demo, converted to 4 bits in the user's cache folder the first time it is asked for.

    The folder's name carries a digest of the demo's files, so that a new release converts anew. Two processes at
    once are safe: the second waits for the first.
    """
    import hashlib

    import platformdirs

    if not (CHECKPOINT / "config.json").exists():
        raise MimoError(f"the demo checkpoint is missing from this installation ({CHECKPOINT}); install mlx-mimo again")
    from .. import __version__

    digest = hashlib.sha256(__version__.encode())
    for file in sorted(CHECKPOINT.iterdir()):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    cache = Path(platformdirs.user_cache_dir("mlx-mimo", appauthor=False))
    target = cache / f"demo-4bit-{digest.hexdigest()[:12]}"
    if not (target / "config.json").exists():
        from filelock import FileLock

        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "demo.lock"):
            if not (target / "config.json").exists():
                print(f"converting the demo model, once, into {target}", file=sys.stderr)
                _convert(CHECKPOINT, target)
    return target


def _local(model: str | Path) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path}: a directory or a Hub repo expected, a file found")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"{name}: no such directory, and not the name of a Hub repo (owner/name)")
    return _fetch(name)


def _fetch(repo: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        config = json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
        if Directory(Path(repo), config).is_fp8:
            raise MimoError(
                f"{repo} is an FP8 checkpoint, which must be converted first: "
                f"mlx_mimo convert --hf-path {repo} --mlx-path {repo.split('/')[-1]}-4bit"
            )
        patterns = ["*.json", WEIGHTS, "*.jinja", "*.txt", "tokenizer.model"]
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except MimoError:
        raise
    except Exception as error:  # the Hub's client raises its own, httpx's and OS errors
        raise MimoError(f"{repo}: cannot be fetched from the Hub: {type(error).__name__}: {error}") from error


def _convert_beside(directory: Directory) -> Path:
    target = directory.path.resolve().with_name(directory.path.resolve().name + "-4bit")
    if (target / "config.json").exists():
        print(f"using {target}, converted before", file=sys.stderr)
        return target
    command = f"mlx_mimo convert --hf-path {directory.path} --mlx-path {target}"
    size = sum(file.stat().st_size for file in directory.path.glob("*.safetensors"))
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise MimoError(f"{directory.path} is an FP8 checkpoint, which must be converted first: {command}")
    print(
        f"{directory.path} is an FP8 checkpoint of {format_size(size)}.\n"
        f"Converted to 4 bits it takes about {format_size(int(size * 0.57))}, in {target}.",
        file=sys.stderr,
    )
    print("Convert it now? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        answer = input()
    except EOFError:
        print(file=sys.stderr)
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise MimoError(f"not converted; to do it later: {command}")
    _convert(directory.path, target)
    return target


def _convert(source: Path, target: Path) -> None:
    from ..convert import convert_checkpoint

    convert_checkpoint(source=source, target=target, recipe="4bit", progress=sys.stderr.isatty())
