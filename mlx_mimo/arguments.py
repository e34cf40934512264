"""The flags that commands share, their types, and how a command ends."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from . import device
from .errors import MimoError, UsageError
from .planning.machine import Given
from .units import parse_size, parse_speed


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every command that loads a model; `load_options` turns them into keywords of `load`."""
    parser.add_argument("--model", metavar="DIR_OR_REPO", help="converted directory or Hub repo (default: the demo)")
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        default="auto",
        type=expert_memory,
        help="bytes for experts, such as 24GB (GB = 10⁹), auto, or all = everything resident (default: auto)",
    )
    parser.add_argument("--expert-policy", choices=("lfu", "lru"), default="lfu", help="who leaves (default: lfu)")
    parser.add_argument(
        "--sliding-window",
        metavar="N",
        type=positive_int,
        help="keys a query sees in sliding layers, itself included (default: sliding_window_size + 1)",
    )
    parser.add_argument("--profile", metavar="FILE", help="usage counts: loaded at the start, saved at the end")
    parser.add_argument("--lookahead", action="store_true", help="read the next layer's likely experts ahead")
    parser.add_argument("--trace", metavar="FILE", help="record which experts the router chose")
    add_thread_arguments(parser)
    parser.add_argument("--wired", action="store_true", help="raise Metal's wired memory limit as mlx-lm does")


def add_thread_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the numbers of threads that compute and read: keywords of `load`."""
    parser.add_argument("--threads", metavar="N", type=positive_int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--reader-threads",
        metavar="N",
        type=positive_int,
        default=8,
        help="experts read at a time, 1 to 64 (default: 8)",
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that take an adapter: a keyword of `load` that `load_options` does not include."""
    parser.add_argument("--adapter-path", metavar="DIR", help="LoRA adapter that mlx_lm.lora trained")


def load_options(args: argparse.Namespace) -> dict:
    """The keywords of `mlx_mimo.load` that the shared flags set."""
    return {
        "expert_memory": args.expert_memory,
        "expert_policy": args.expert_policy,
        "sliding_window": args.sliding_window,
        "profile": args.profile,
        "lookahead": args.lookahead,
        "trace": args.trace,
        "threads": args.threads,
        "reader_threads": args.reader_threads,
        "progress": sys.stderr.isatty(),
    }


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds mlx-lm's sampling flags. Where one is not given, generation_config.json decides, else greedy."""
    parser.add_argument("--temp", type=non_negative_float, help="sampling temperature; 0 is greedy")
    parser.add_argument("--top-p", type=share, help="nucleus sampling: share of probability kept")
    parser.add_argument("--top-k", type=non_negative_int, help="keep the k most likely tokens; 0 keeps all")
    parser.add_argument("--min-p", type=share, help="least probability, as a share of the best token's")
    parser.add_argument("--seed", type=int, help="seed of the random numbers")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds flags that describe another machine; `given` reads them."""
    machine = parser.add_argument_group("another machine than this one")
    machine.add_argument("--memory", "--sim-memory", dest="memory", metavar="SIZE", help="such as 64GB")
    machine.add_argument("--available", "--sim-available", dest="available", metavar="SIZE", help="what of it is free")
    machine.add_argument("--ssd", "--sim-ssd", dest="ssd", metavar="SPEED", help="such as 6GB/s")
    machine.add_argument("--bandwidth", "--sim-bandwidth", dest="bandwidth", metavar="SPEED", help="such as 400GB/s")
    machine.add_argument(
        "--backend",
        "--sim-backend",
        dest="backend",
        choices=("metal", "cpu"),
        help="what it computes on (default with --memory: metal)",
    )


def given(args: argparse.Namespace) -> Given:
    """The machine that the flags describe, None where one is not given. Raises UsageError for a wrong size or speed."""
    return Given(
        parse_size(args.memory) if args.memory else None,
        parse_size(args.available) if args.available else None,
        parse_speed(args.ssd) if args.ssd else None,
        parse_speed(args.bandwidth) if args.bandwidth else None,
        args.backend,
    )


def expert_memory(text: str) -> str | int:
    """argparse type: "auto", "all", or a size in bytes."""
    return text if text in ("auto", "all") else _typed(parse_size, text)


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    return _at_least(int, text, 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return _at_least(int, text, 0, "a whole number of at least 0")


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    return _at_least(float, text, 0, "a number of at least 0")


def readable(text: str) -> str:
    """argparse type: text; bytes of the command line that are not UTF-8 become U+FFFD."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def take_any_bytes(stdin: TextIO) -> None:
    """Makes `stdin` read bytes that are not UTF-8 as U+FFFD instead of raising an error."""
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(errors="replace")


def share(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 expected, {text!r} found")
    return value


def _at_least(kind: type, text: str, least: int, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not value >= least or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{wanted} expected, {text!r} found")
    return value


def _typed(parse: Callable, text: str):
    try:
        return parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def json_object(text: str) -> dict:
    """argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object expected")
    return value


def run(command: Callable[[], int | None], computes: bool = True) -> int:
    """Runs a command and returns its exit code. A MimoError becomes one line on stderr; Ctrl-C and a closed pipe end
    the command quietly. A command that `computes` does so where MLX_MIMO_DEVICE says; others do not load MLX for it."""
    name = Path(sys.argv[0]).stem if sys.argv[0].endswith(".py") else sys.argv[0]
    try:
        device.choose() if computes else device.asked()
        code = command() or 0
        sys.stdout.flush()
        return code
    except MimoError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Nothing reads our output any more; without this Python would raise the same error while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
