"""The generation thread: it owns model and KV caches, outlives a failed step, stops for clients that left, and
refuses more work than may wait.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from ...errors import MimoError
from ..cancellation import Cancellation
from ..errors import Disconnected, RequestError
from .decoding_batch import DecodingBatch
from .engine_model import EngineModel
from .prompt import EncodedPrompt, PromptEncoder
from .prompt_cache import PromptCache
from .request import Chat, GenerationRequest
from .results import Generation, Results, Started
from .single import SingleSequence

RETRY_SECONDS = 5
IDLE_SECONDS = 0.1  # between two looks of an idle thread at whether it is to end

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What the engine takes on. None: as much as the model's context holds."""

    max_queue: int = 32  # requests that may wait
    max_prompt_tokens: int | None = None
    default_max_tokens: int = 4096  # for requests that name none
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    cache_bytes: int | None = None  # of KV caches, running and kept


@dataclass
class _Job:
    results: Results
    request: GenerationRequest


class Worker:
    """Starts its thread at once, which loads the model and then generates. `load` runs there."""

    def __init__(
        self,
        load: Callable[[], EngineModel],
        prompt_cache: PromptCache,
        limits: Limits = Limits(),
        variables: Mapping[str, Any] | None = None,
    ):
        """`variables` are defaults for the chat template."""
        self.prompt_cache = prompt_cache
        self.limits = limits
        self.variables = dict(variables or {})
        self.loaded: EngineModel | None = None  # from when it is loaded
        self.load_error: Exception | None = None
        self.draining = False  # set to let nothing new in
        self._load = load
        self._places = 0
        self._leaving = False  # everything is cancelled, for ever
        self._stopping = threading.Event()
        self._ended = False
        self._lock = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._actions: deque[tuple[Callable[[], Any], Future]] = deque()
        self._results: set[Results] = set()
        self._counting = threading.Lock()
        self._counter: PromptEncoder | None = None  # for `count_tokens`, made when it is first asked
        self._encoder: PromptEncoder | None = None  # these three belong to the generation thread
        self._single: SingleSequence | None = None
        self._batch: DecodingBatch | None = None
        self._alone: _Job | None = None  # waits for the batch to end, since it cannot join it
        self._thread = threading.Thread(target=self._run, name="generation")
        self._thread.start()

    # For other threads

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, be it still loading."""
        return self._thread.is_alive() and not self._ended

    @property
    def is_healthy(self) -> bool:
        """Whether it would take a request on if there were room."""
        return self.loaded is not None and self.is_alive and not self.draining

    @property
    def outstanding(self) -> int:
        """Requests that run or wait."""
        return self._places

    @property
    def queued(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        """Requests that run at a time."""
        batches = self.loaded is not None and self.loaded.is_batchable
        return self.limits.decode_concurrency if batches else 1

    @property
    def running_kv_bytes(self) -> int:
        """Bytes of the caches of requests that run."""
        single, batch = self._single, self._batch
        return (0 if single is None else single.kv_bytes) + (0 if batch is None else batch.kv_bytes)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that run and wait, held until one is answered, however many sequences it is made
        of. Raises RequestError when the server is loading, leaving or full.
        """
        if not self.is_healthy:
            state = "shutting down" if self.draining else "loading the model" if self.is_alive else "broken"
            raise _unavailable(f"the server is {state}")
        with self._lock:
            if self._places >= self.capacity + self.limits.max_queue:
                raise _unavailable(f"{self._places} requests are running or waiting already")
            self._places += 1
        try:
            yield
        finally:
            with self._lock:
                self._places -= 1

    @contextmanager
    def generate(self, request: GenerationRequest, cancellation: Cancellation) -> Iterator[Generation]:
        """Context manager: waits until the request's turn has come, and cancels it on exit; requires `place()`.

        Raises RequestError, here and while the results are read, and Disconnected once `cancellation` is cancelled.
        """
        results = Results()
        with self._lock:
            if self._leaving or not self.is_alive:
                raise _unavailable("the server is shutting down")
            self._results.add(results)
            self._waiting.append(_Job(results, request))
            self._lock.notify()
        try:
            with cancellation.calling(lambda: results.cancel(Disconnected())):
                started = results.get()
                assert isinstance(started, Started)
                yield Generation(started, iter(results))
        finally:
            self._forget(results)

    def count_tokens(self, prompt: Chat) -> int:
        """Tokens of a prompt, be it too long or not. Raises RequestError."""
        loaded = self.loaded
        if loaded is None:
            raise _unavailable("the server is loading or shutting down")
        with self._counting:
            # The generation thread's own tokenizer is not for two threads at a time.
            if self._counter is None:
                self._counter = PromptEncoder(copy.deepcopy(loaded.tokenizer), self.variables)
            return len(self._counter.encode(prompt).tokens)

    def ask(self, action: Callable[[], T]) -> "Future[T]":
        """Has the generation thread, to which model and caches belong, do something between two steps."""
        future: Future[T] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(_unavailable("the server is shutting down"))
            else:
                self._actions.append((action, future))
                self._lock.notify()
        return future

    def cancel_all(self) -> None:
        """For ever: what runs or waits is answered with an error, and so is what comes."""
        with self._lock:
            self._leaving = True
            for results in self._results:
                results.cancel(_unavailable("the server is shutting down"))

    def stop(self, seconds: float) -> None:
        """Ends the thread after its present step, and waits for that so many seconds at most."""
        self._stopping.set()
        with self._lock:
            self._lock.notify()
        self._thread.join(seconds)

    def _forget(self, results: Results) -> None:
        """Stops a request, and takes it from the queue where it still waits: its body can be large."""
        results.cancel(Disconnected())
        with self._lock:
            self._results.discard(results)
            for job in self._waiting:
                if job.results is results:
                    self._waiting.remove(job)
                    break

    # The generation thread

    def _run(self) -> None:
        try:
            try:
                loaded = self._load()
            except Exception as error:
                self.load_error = error
                return
            self._encoder = PromptEncoder(loaded.tokenizer, self.variables)
            self._single = SingleSequence(loaded, self.prompt_cache)
            limits = self.limits
            self._batch = DecodingBatch(
                loaded, self.prompt_cache, limits.decode_concurrency, limits.prompt_concurrency, limits.cache_bytes
            )
            self.loaded = loaded
            while not self._stopping.is_set():
                try:
                    self._turn(self._batch)
                except Exception as error:
                    logging.exception("a step failed")
                    self._batch.fail(error)
                    self.prompt_cache.clear()
                    mx.clear_cache()
        finally:
            self._end()

    def _turn(self, batch: DecodingBatch) -> None:
        """Takes the next request on, or computes a step of the batch where none waits."""
        self._act()
        if self._alone is None and (job := self._next_job(wait=not batch)) is not None:
            if self._joins(job.request):
                self._add(job, batch)
            else:
                self._alone = job  # nothing joins the batch any more, and it comes to its end
        elif batch:
            batch.step()
        if self._alone is not None and not batch:
            batch.close()
            job, self._alone = self._alone, None
            self._serve_alone(job)

    def _joins(self, request: GenerationRequest) -> bool:
        return self.loaded is not None and self.loaded.is_batchable and request.batchable

    def _add(self, job: _Job, batch: DecodingBatch) -> None:
        try:
            batch.add(job.results, job.request, *self._encode(job.request))
        except Exception as error:
            self._refuse(job, error)

    def _serve_alone(self, job: _Job) -> None:
        try:
            self._answer(job)
        except Exception as error:
            self._refuse(job, error)

    def _answer(self, job: _Job) -> None:
        assert self._single is not None
        self._single.answer(job.results, job.request, *self._encode(job.request))

    def _refuse(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, (RequestError, MimoError)):
            logging.error("a request failed", exc_info=error)
        job.results.fail(error)

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            left = list(self._results)
            actions, self._actions = self._actions, deque()
        for results in left:
            results.cancel(RequestError(503, "the server is shutting down"))
        for _, future in actions:
            future.set_exception(RequestError(503, "the server is shutting down"))
        # What MLX allocated is given back in the thread that allocated it.
        if self._batch is not None:
            self._batch.close()
        self.prompt_cache.clear()
        if self.loaded is not None:
            self.loaded.close()
        mx.clear_cache()

    def _act(self) -> None:
        while self._actions:
            action, future = self._actions.popleft()
            try:
                future.set_result(action())
            except Exception as error:
                if not isinstance(error, OSError):
                    logging.exception("what was asked of the generation thread failed")
                future.set_exception(error)

    def _next_job(self, wait: bool) -> _Job | None:
        """The one that has waited longest; None where none does, after a while with `wait`."""
        with self._lock:
            if wait and not self._waiting and not self._actions:
                self._lock.wait(IDLE_SECONDS)
            job = self._waiting.popleft() if self._waiting else None
        return None if job is not None and job.results.cancelled else job

    def _encode(self, request: GenerationRequest) -> tuple[EncodedPrompt, int]:
        """The prompt, and how many tokens its answer may have. Raises RequestError where it is too long."""
        assert self.loaded is not None
        assert self._encoder is not None
        prompt = self._encoder.encode(request.prompt)
        count, context = len(prompt.tokens), self.loaded.context
        most = min(context - 1, self.limits.max_prompt_tokens or context)
        if count == 0 or count > most:
            name = "messages" if isinstance(request.prompt, Chat) else "prompt"
            message = f"{name}: {count:,} tokens found, 1 to {most:,} expected"
            raise RequestError(400, message, param=name, code="context_length_exceeded")
        room = context - count
        if request.max_tokens is not None and request.max_tokens > room:
            message = f"{request.limit_name}: {room:,} at most after {count:,} tokens of prompt"
            raise RequestError(400, message, param=request.limit_name, code="context_length_exceeded")
        return prompt, request.max_tokens or min(self.limits.default_max_tokens, room)


def _unavailable(message: str) -> RequestError:
    """For a client that may come again."""
    return RequestError(503, message, retry_after_seconds=RETRY_SECONDS)
