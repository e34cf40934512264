"""A server that runs: its worker, its socket, and how both end."""

import argparse
import logging
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import mlx.core as mx
from mlx_lm.server import get_system_fingerprint
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..errors import MimoError
from ..runtime.sampling import generation_defaults
from ..runtime.source import find
from .access import Access
from .connection import Server
from .fingerprint import fingerprint
from .handler import Handler, Site
from .metrics import Metrics
from .pressure import Pressure
from .prompt_cache import PromptCache
from .prompt_cache_file import PromptCacheFile
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
        save = None
        if args.prompt_cache_file is not None:
            self.worker.ask(self._restore_prompt_cache)
            save = self.save_prompt_cache
        metrics = Metrics(self.worker)
        system = get_system_fingerprint()
        self.site = Site(self.worker, access, metrics, self.model_name, system, int(time.time()), save)
        self._pressure = Pressure(self.worker, args.memory_floor)
        self._http = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def url(self) -> str:
        host, port = self.httpd.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _fingerprint(self) -> str:
        adapter = Path(self.args.adapter_path) if self.args.adapter_path else None
        return fingerprint(Path(self.args.model), self.worker.model_provider.model.args, adapter)

    def _restore_prompt_cache(self) -> None:
        file = PromptCacheFile(self.args.prompt_cache_file)
        file.restore(self.worker.prompt_cache, self.worker.model_provider.model, self._fingerprint())

    def save_prompt_cache(self) -> Future:
        """Written once the request that runs is done; the future's result is what was."""
        file = PromptCacheFile(self.args.prompt_cache_file)
        return self.worker.ask(lambda: file.save(self.worker.prompt_cache, self._fingerprint()))

    def start(self) -> None:
        self._http.start()
        self._pressure.start()

    def stop(self, seconds: float, hurry: threading.Event) -> None:
        """Takes no more requests, lets the present ones finish for `seconds` or until `hurry`, cancels the rest."""
        self.worker.draining = True
        self._pressure.stop()
        wait_until(lambda: self.worker.outstanding == 0 or hurry.is_set(), seconds)
        if self.worker.outstanding:
            logging.warning("%d requests are cancelled", self.worker.outstanding)
            self.worker.cancel_all()
            wait_until(lambda: self.worker.outstanding == 0, STEP_SECONDS)
        if self.args.prompt_cache_file is not None and self.worker.model_provider.ready:
            self._save_before_the_end(hurry)
        self.worker._stop = True
        self.worker._generation_thread.join(STEP_SECONDS)
        if self._http.is_alive():
            self.httpd.shutdown()
        self.httpd.server_close()
        mx.clear_cache()

    def _save_before_the_end(self, hurry: threading.Event) -> None:
        """However long it takes, unless somebody is in a hurry or a step does not end."""
        saving = self.save_prompt_cache()
        while not (saving.done() or hurry.is_set() or self.worker.outstanding) and self.worker.generation_available():
            time.sleep(0.02)
        if not saving.done():
            logging.warning("--prompt-cache-file: not saved")
        elif (error := saving.exception()) is not None:
            logging.warning("--prompt-cache-file: %s: not saved: %s", self.args.prompt_cache_file, error)
        else:
            logging.info("%d KV caches in %s", saving.result().entries, self.args.prompt_cache_file)


def _listen(host: str, port: int, handler) -> Server:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return Server(address, handler, family)
    except OSError as error:
        raise MimoError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from None
