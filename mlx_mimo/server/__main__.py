"""`python -m mlx_mimo.server`: an OpenAI-compatible HTTP server."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ..arguments import (
    add_adapter_argument,
    add_model_arguments,
    json_object,
    load_options,
    non_negative_float,
    non_negative_int,
    positive_int,
    run,
)
from ..errors import MimoError, UsageError
from ..units import parse_size
from .http.access import host_name, is_loopback, page_origin


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_mimo server", description="Serve a model over HTTP, as OpenAI does.")
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=non_negative_int, default=8080, help="0 takes a free one (default: 8080)")
    parser.add_argument("--api-key", help="what clients must send; also MLX_MIMO_API_KEY")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the directory's or the repo's name")
    parser.add_argument("--allowed-origins", type=_origins, default=(), metavar="URL,…", help="pages that may ask")
    parser.add_argument("--allowed-hosts", type=_hosts, default=(), metavar="NAME,…", help="more names of this server")
    add_adapter_argument(parser)
    parser.add_argument("--temp", type=non_negative_float, help="default temperature (default: the model's own)")
    parser.add_argument("--top-p", type=non_negative_float, help="default top_p (default: the model's own)")
    parser.add_argument("--top-k", type=non_negative_int, help="default top_k (default: the model's own)")
    parser.add_argument("--min-p", type=non_negative_float, default=0.0, help="default min_p (default: 0)")
    parser.add_argument("-m", "--max-tokens", type=positive_int, default=4096, help="for requests that name none")
    parser.add_argument("--max-prompt-tokens", type=positive_int, metavar="N", help="default: the model's context")
    parser.add_argument("--max-queue", type=non_negative_int, default=32, metavar="N", help="requests that may wait")
    parser.add_argument("--max-body", type=_size, default=32 * 10**6, metavar="SIZE", help="default: 32MB")
    parser.add_argument("--body-seconds", type=non_negative_float, default=60.0, metavar="S", help="to send it in")
    parser.add_argument("--decode-concurrency", type=positive_int, default=32, help="when every expert is resident")
    parser.add_argument("--prompt-concurrency", type=positive_int, default=8, help="when every expert is resident")
    parser.add_argument(
        "--memory-floor",
        type=_floor,
        default=2 * 10**9,
        metavar="SIZE",
        help="where less is free, streamed experts give memory back until it no longer is; 0: never (default: 2GB)",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=positive_int,
        metavar="N",
        help="prompt tokens a chunk (default: what fits, 2048 as a rule)",
    )
    parser.add_argument("--prompt-cache-size", type=positive_int, default=10, metavar="N", help="KV caches kept")
    parser.add_argument("--prompt-cache-bytes", type=_size, metavar="SIZE", help="memory for them (default: no limit)")
    parser.add_argument(
        "--prompt-cache-file",
        type=Path,
        metavar="FILE",
        help="KV caches: loaded at the start, saved at the end and on POST /prompt-cache/save",
    )
    parser.add_argument(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="defaults for the chat template, such as '{\"enable_thinking\": true}'",
    )
    parser.add_argument("--use-default-chat-template", action="store_true", help="where the model has none")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer bring code")
    parser.add_argument("--shutdown-seconds", type=non_negative_float, default=10.0, metavar="S", help="to finish in")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser


def _list(text: str) -> tuple[str, ...]:
    values = tuple(part.strip() for part in text.split(",") if part.strip())
    if "*" in values:
        raise argparse.ArgumentTypeError("name them: * would let every page on the web in")
    return values


def _hosts(text: str) -> tuple[str, ...]:
    return _each(host_name, text)


def _origins(text: str) -> tuple[str, ...]:
    return _each(page_origin, text)


def _each(read: Callable[[str], str], text: str) -> tuple[str, ...]:
    try:
        return tuple(map(read, _list(text)))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _floor(text: str) -> int:
    return 0 if text == "0" else _size(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def complete(args: argparse.Namespace) -> None:
    """Checks flags against each other and fills in their defaults. Raises UsageError."""
    args.api_key = args.api_key or os.environ.get("MLX_MIMO_API_KEY") or None
    if not is_loopback(args.host) and args.api_key is None:
        raise UsageError(f"--host {args.host}: others could reach it; give an --api-key (or MLX_MIMO_API_KEY) as well")
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.isprintable()):
        raise UsageError("--api-key: printable ASCII expected: clients could not send anything else in a header")
    if args.api_key is not None and args.api_key != args.api_key.strip():
        raise UsageError("--api-key: no space at its ends expected: a header loses it")
    if args.port > 65535:
        raise UsageError(f"--port: 0 to 65535 expected, {args.port} found")
    if args.prompt_cache_file is not None:
        folder = args.prompt_cache_file.absolute().parent
        if args.prompt_cache_file.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--prompt-cache-file {args.prompt_cache_file}: a file in a folder to write to expected")
    # mlx-lm turns thinking on unless told; the model's own default is off.
    args.chat_template_args = {"enable_thinking": False} | args.chat_template_args


def serve(args: argparse.Namespace) -> int:
    complete(args)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    from .running import Running

    running = Running(args, load_options(args))
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(*_) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    running.start()
    print(f"listening on {running.url}, loading {running.model_name}", file=sys.stderr, flush=True)
    announced = False
    while not stop.wait(0.1):
        if running.worker.load_error is not None:
            running.stop(0, hurry)
            error = running.worker.load_error
            raise (
                error if isinstance(error, MimoError) else MimoError(f"the model cannot be loaded: {error}")
            ) from error
        if not announced and running.worker.is_healthy:
            announced = True
            print(f"ready: {running.url}/v1", file=sys.stderr, flush=True)
    print("finishing what runs; once more stops at once", file=sys.stderr, flush=True)
    running.stop(args.shutdown_seconds, hurry)
    return 0


def main() -> int:
    args = build_parser().parse_args()
    code = run(lambda: serve(args))
    sys.stderr.flush()
    # A generation thread amid a long step would otherwise hold the process up.
    if threading.active_count() > 1:
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
