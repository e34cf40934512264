"""A server that runs: its worker, its listener, and how both end."""

import argparse
import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..runtime.sampling import generation_defaults
from ..runtime.source import find
from .api.served_model import ServedModel
from .api.service import Service
from .engine.engine_model import EngineModel, ModelSource
from .engine.fingerprint import fingerprint
from .engine.mlx_lm_private import get_system_fingerprint, maybe_set_recommended_wired_limit
from .engine.prompt_cache import PromptCache
from .engine.prompt_cache_file import PromptCacheFile, Saved
from .engine.request import Sampling
from .engine.worker import Limits, Worker
from .http.access import Access
from .http.app import App, Site
from .http.body import BodyLimits
from .http.listener import Listener
from .waiting import wait_until
from .watch.metrics import MeasuredEngine, Metrics
from .watch.pressure import Pressure

STEP_SECONDS = 5.0  # what a cancelled generation is given to notice


class Running:
    """`start` returns at once, the model loads in the generation thread; `stop` ends both within a deadline.

    `load_options` are those of `runtime.load`.
    """

    def __init__(self, args: argparse.Namespace, load_options: dict[str, Any]):
        path = find(args.model).path  # what --model names is checked, fetched and converted before anything listens
        self.model_name = args.served_model_name or (Path(args.model).name if args.model else "demo")
        self.path = path
        self.args = args
        self.sampling = _sampling(args, path)
        if args.wired:
            maybe_set_recommended_wired_limit()  # does nothing where there is no Metal
        cache = PromptCache(args.prompt_cache_size, args.prompt_cache_bytes)
        source = model_source(args, path, load_options)
        self.worker = Worker(lambda: EngineModel(source), cache, _limits(args), args.chat_template_args)
        save = None
        if args.prompt_cache_file is not None:
            self.worker.ask(self._restore_prompt_cache)
            save = self.save_prompt_cache
        metrics = Metrics(self.worker)
        service = Service(MeasuredEngine(self.worker, metrics), self._served)
        system = get_system_fingerprint()
        self.site = Site(service, self.worker, metrics, self.model_name, system, int(time.time()), save)
        access = Access(args.host, args.api_key, frozenset(args.allowed_hosts), frozenset(args.allowed_origins))
        self.app = App(self.site, access, BodyLimits(args.max_body, args.body_seconds))
        self.listener = Listener(args.host, args.port, self.app)
        self._pressure = Pressure(self.worker, args.memory_floor)

    @property
    def url(self) -> str:
        return self.listener.url

    def _served(self) -> ServedModel:
        loaded = self.worker.loaded
        assert loaded is not None
        variables = self.args.chat_template_args
        return ServedModel(self.model_name, loaded.tokenizer, loaded.vocab_size, self.sampling, variables)

    def _model(self) -> Any:
        assert self.worker.loaded is not None
        return self.worker.loaded.model

    def _fingerprint(self) -> str:
        adapter = Path(self.args.adapter_path) if self.args.adapter_path else None
        return fingerprint(self.path, self._model().args, adapter)

    def _restore_prompt_cache(self) -> None:
        file = PromptCacheFile(self.args.prompt_cache_file)
        file.restore(self.worker.prompt_cache, self._model(), self._fingerprint())

    def save_prompt_cache(self) -> "Future[Saved]":
        """Writes the file once the step that runs is done, or the request where it runs alone."""
        file = PromptCacheFile(self.args.prompt_cache_file)
        return self.worker.ask(lambda: file.save(self.worker.prompt_cache, self._fingerprint()))

    def start(self) -> None:
        self.listener.start()
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
        if self.args.prompt_cache_file is not None and self.worker.loaded is not None:
            self._save_before_the_end(hurry)
        self.worker.stop(STEP_SECONDS)
        self.listener.stop(STEP_SECONDS)
        mx.clear_cache()

    def _save_before_the_end(self, hurry: threading.Event) -> None:
        """However long it takes, unless somebody is in a hurry or a step does not end."""
        saving = self.save_prompt_cache()
        while not (saving.done() or hurry.is_set() or self.worker.outstanding) and self.worker.is_alive:
            time.sleep(0.02)
        if not saving.done():
            logging.warning("--prompt-cache-file: not saved")
        elif (error := saving.exception()) is not None:
            logging.warning("--prompt-cache-file: %s: not saved: %s", self.args.prompt_cache_file, error)
        else:
            logging.info("%d KV caches in %s", saving.result().entries, self.args.prompt_cache_file)


def model_source(args: argparse.Namespace, path: Path, load_options: dict[str, Any]) -> ModelSource:
    """What the command's flags say about loading."""
    options = {name: value for name, value in load_options.items() if name != "progress"}
    return ModelSource(
        path=path,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
        use_default_chat_template=args.use_default_chat_template,
        chunk=args.prefill_step_size,
        options=options,
    )


def _sampling(args: argparse.Namespace, path: Path) -> Sampling:
    """The flags' values over the model's own."""
    own = generation_defaults(path)
    return Sampling(
        temperature=own["temp"] if args.temp is None else args.temp,
        top_p=own["top_p"] if args.top_p is None else args.top_p,
        top_k=own["top_k"] if args.top_k is None else args.top_k,
        min_p=args.min_p,
    )


def _limits(args: argparse.Namespace) -> Limits:
    return Limits(
        max_queue=args.max_queue,
        max_prompt_tokens=args.max_prompt_tokens,
        default_max_tokens=args.max_tokens,
        decode_concurrency=args.decode_concurrency,
        prompt_concurrency=args.prompt_concurrency,
        cache_bytes=args.prompt_cache_bytes,
    )
