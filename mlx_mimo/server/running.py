"""A server that runs: its worker, its socket, and how both end."""

import argparse
import logging
import socket
import threading
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.server import get_system_fingerprint
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..errors import MimoError
from ..runtime.sampling import generation_defaults
from ..runtime.source import find
from .access import Access
from .connection import Server
from .handler import Handler, Site
from .metrics import Metrics
from .prompt_cache import PromptCache
from .provider import Provider
from .worker import Worker, wait_until

STEP_SECONDS = 5.0  # what a cancelled generation is given to notice


class Running:
    """`start` returns at once, the model loads in the generation thread; `stop` ends both within a deadline."""

    def __init__(self, args: argparse.Namespace, load_options: dict):
        path = find(args.model).path  # what --model names is checked, fetched and converted before anything listens
        self.model_name = args.served_model_name or (Path(args.model).name if args.model else "demo")
        defaults = generation_defaults(path)
        for name in ("temp", "top_p", "top_k"):
            if getattr(args, name) is None:
                setattr(args, name, defaults[name])
        args.model = str(path)
        self.args = args
        if args.wired:
            maybe_set_recommended_wired_limit()  # does nothing where there is no Metal
        load_options = {name: value for name, value in load_options.items() if name != "progress"}
        access = Access(args.host, args.api_key, frozenset(args.allowed_hosts), frozenset(args.allowed_origins))
        self.httpd = _listen(args.host, args.port, lambda *rest: self.handler(self.site, *rest))
        self.handler = type(
            "BoundHandler", (Handler,), {"most_body_bytes": args.max_body, "body_seconds": args.body_seconds}
        )
        cache = PromptCache(args.prompt_cache_size, args.prompt_cache_bytes)
        self.worker = Worker(Provider(args, load_options), cache, args.max_queue, args.max_prompt_tokens)
        metrics = Metrics(self.worker)
        self.site = Site(self.worker, access, metrics, self.model_name, get_system_fingerprint(), int(time.time()))
        self._http = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def url(self) -> str:
        host, port = self.httpd.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        self._http.start()

    def stop(self, seconds: float, hurry: threading.Event) -> None:
        """Takes no more requests, lets the present ones finish for `seconds` or until `hurry`, cancels the rest."""
        self.worker.draining = True
        wait_until(lambda: self.worker.outstanding == 0 or hurry.is_set(), seconds)
        if self.worker.outstanding:
            logging.warning("%d requests are cancelled", self.worker.outstanding)
            self.worker.cancel_all()
            wait_until(lambda: self.worker.outstanding == 0, STEP_SECONDS)
        self.worker._stop = True
        self.worker._generation_thread.join(STEP_SECONDS)
        if self._http.is_alive():
            self.httpd.shutdown()
        self.httpd.server_close()
        mx.clear_cache()


def _listen(host: str, port: int, handler) -> Server:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return Server(address, handler, family)
    except OSError as error:
        raise MimoError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from None
