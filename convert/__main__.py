"""`python -m mlx_mimo.convert`: converts a checkpoint into a directory; and the subcommands."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_mimo import device
from mlx_mimo.errors import MimoError, UsageError

if TYPE_CHECKING:
    from mlx_mimo.checkpoint.recipe import Recipe

    from .source import Source

SUBCOMMANDS = ("verify", "inspect", "repack", "repair")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mimo convert",
        description="Converts an FP8 MiMo-V2-Flash checkpoint for MLX.",
        epilog=f"subcommands: {', '.join(SUBCOMMANDS)}; each has its own --help",
    )
    add = parser.add_argument
    add("--hf-path", "--model", required=True, metavar="DIR_OR_REPO", help="the checkpoint")
    add("--mlx-path", default="mlx_model", metavar="DIR", help="where to write (default: mlx_model)")
    add("--revision", help="of the Hub repository: branch, tag or commit")
    add("--recipe", default="4bit", metavar="NAME|FILE.toml", help="what is stored how (default: 4bit)")
    add("--q-bits", type=int, help="bits of the experts, instead of the recipe's")
    add("--q-group-size", type=int, help="32, 64 or 128")
    add("--q-mode", choices=("affine", "mxfp4"))
    add("--dtype", choices=("bfloat16",), default="bfloat16", help="of what is not quantised")
    add("--kv-scales", choices=("chain", "flat"), help="do not test how K/V scales are to be read")
    add("--dry-run", action="store_true", help="show what would be written; reads config and index only")
    add("--stream", action="store_true", help="fetch a file, convert it, delete it: for small disks")
    add("--upload-repo", metavar="REPO", help="upload the result to this Hub repository")
    add("--threads", type=int, help="default: one a core")
    add("--quiet", action="store_true", help="no progress")
    return parser


def run(argv: list[str]) -> int:
    if argv and argv[0] in SUBCOMMANDS:
        return import_module(f".{argv[0]}", __package__).run(argv[1:])
    from mlx_mimo.checkpoint.recipe import named

    from .convert import convert_checkpoint
    from .source import open_source

    arguments = build_parser().parse_args(argv)
    recipe = named(arguments.recipe, arguments.q_bits, arguments.q_group_size, arguments.q_mode)
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads}: at least 1 expected")
    if arguments.dry_run:
        return dry_run(open_source(arguments.hf_path, arguments.revision, weights=False), recipe)
    if arguments.stream:
        source = streamed(arguments.hf_path, arguments.revision, Path(arguments.mlx_path))
    else:
        source = open_source(arguments.hf_path, arguments.revision)
    convert_checkpoint(
        source,
        arguments.mlx_path,
        recipe=recipe,
        kv_scales=arguments.kv_scales,
        progress=not arguments.quiet,
        threads=arguments.threads,
    )
    if arguments.upload_repo:
        upload(arguments.mlx_path, arguments.upload_repo)
    return 0


def streamed(path_or_repo: str, revision: str | None, staging: Path) -> "Source":
    from .remote import RemoteSource
    from .source import is_repo

    if not is_repo(path_or_repo):
        raise UsageError(f"--stream fetches from the Hub; {path_or_repo} is not a repository there")
    return RemoteSource(path_or_repo, revision, staging)


def upload(directory: str, repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory)
    except (HfHubHTTPError, OSError) as error:
        raise MimoError(f"{repo}: not uploaded: {str(error).strip().splitlines()[0]}; {directory} is whole") from error


def dry_run(source: "Source", recipe: "Recipe") -> int:
    from mlx_mimo.checkpoint.layout import layout_of

    from .table import layout_rows, render

    print(render(layout_rows(layout_of(source.config, source.weight_map, recipe))))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        device.asked()  # refused before anything is read, should it be wrong
        return run(sys.argv[1:] if argv is None else argv)
    except MimoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
