"""`python -m mlx_mimo.bridge DIR on|off`: unmodified mlx-lm commands run our model and residency on a directory."""

import argparse
import json
import os
import sys
from pathlib import Path

from ..arguments import run
from ..checkpoint.bridge_line import FILE, LINE, without
from ..errors import FormatError, UsageError

CONTENT = '''"""Written by `mlx_mimo bridge`; config.json names it as `model_file`. Settings: MLX_MIMO_* variables."""

from pathlib import Path

from mlx_mimo.bridge import classes

Model, ModelArgs = classes(Path(__file__).parent)
'''


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo bridge",
        description="Let unmodified mlx-lm commands, given --trust-remote-code, run a converted directory with our "
        "model and expert residency. Settings come from environment variables (docs/SERVER.md has the table).",
    )
    parser.add_argument("directory", type=Path, help="converted directory")
    parser.add_argument("state", choices=("on", "off", "status"), nargs="?", default="status", help="default: status")
    return parser


def is_on(directory: Path) -> bool:
    """Whether config.json names the bridge file. Raises FormatError where it names another."""
    from ..checkpoint.directory import read_config

    named = read_config(directory).get("model_file")
    if named not in (None, FILE):
        raise FormatError(f"config.json: model_file is {named!r}, not ours; remove that key first")
    return named == FILE


def is_current(directory: Path) -> bool:
    """Whether the directory's bridge file is the one that this version of mlx-mimo writes."""
    file = directory / FILE
    return file.is_file() and file.read_bytes() == CONTENT.encode()


def switch(directory: Path, on: bool) -> None:
    """Adds the bridge, or writes its file anew where it is on already; or removes it. Raises FormatError or
    UsageError; the directory is then as it was."""
    from ..checkpoint.directory import Directory

    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory")
    if Directory(directory).is_fp8:
        raise UsageError(f"{directory} is an FP8 checkpoint; convert it first with mlx_mimo convert")
    config = directory / "config.json"
    if on:
        _replace(directory / FILE, CONTENT.encode())
        if not is_on(directory):
            _replace(config, ("{" + LINE).encode() + config.read_bytes().lstrip()[1:])
    else:
        if is_on(directory):
            before = without(config.read_bytes())
            # mlx-lm's commands write config.json anew, in another form, into what they save.
            _replace(config, before if "model_file" not in json.loads(before) else _without_key(before))
        (directory / FILE).unlink(missing_ok=True)


def _without_key(config: bytes) -> bytes:
    fields = json.loads(config)
    del fields["model_file"]
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old bytes or the new ones, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def bridge(args: argparse.Namespace) -> int:
    """Switches the bridge or says whether it is on. Returns 1 where its file has to be written anew, else 0."""
    if args.state != "status":
        switch(args.directory, args.state == "on")
    on = is_on(args.directory)
    if on and not is_current(args.directory):
        found = "was written by another version of mlx-mimo" if (args.directory / FILE).exists() else "is missing"
        print(f"{args.directory}: bridge on, but {FILE} {found}; run mlx_mimo bridge {args.directory} on again")
        return 1
    print(f"{args.directory}: bridge {'on' if on else 'off'}")
    if on and args.state == "on":
        print("mlx_lm commands run it with --trust-remote-code; without that flag they now refuse this directory")
    return 0


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: bridge(args), computes=False)


if __name__ == "__main__":
    sys.exit(main())
