"""The generation thread: mlx-lm's, made to outlive a failed step, to stop for clients that left, and to refuse
more work than it can queue.
"""

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from queue import Empty, Queue
from typing import Any

import jinja2
import mlx.core as mx
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    ResponseGenerator,
    _format_top_logprobs,
    _make_logits_processors,
    _make_sampler,
)

from ..errors import MimoError
from ..models.cache import common_length
from ..runtime.steps import prefill, steps
from ..runtime.stream import text_steps
from .batch import Batch, this_thread
from .errors import Disconnected, RequestError
from .grammar import Grammar
from .prompt_cache import Checkpoint, Entry, PromptCache
from .provider import Provider
from .reply import Reply, Steps

POLL_SECONDS = 0.05  # how often a waiting request looks whether its client is still there
RETRY_SECONDS = 5


@dataclass
class Arguments(GenerationArguments):
    """mlx-lm's arguments, and what ours adds. `max_tokens` of 0 is what the context leaves, the default at most."""

    grammar: Grammar | None = None
    limit_name: str = "max_tokens"  # what the request calls it
    begun: str = ""  # text with which the answer begins, said already

    def begin_with(self, text: str) -> None:
        """The answer goes on from a text, which comes after any thoughts."""
        if text:
            self.begun = text
            self.chat_template_kwargs = self.chat_template_kwargs | {"enable_thinking": False}


class Worker(ResponseGenerator):
    """mlx-lm's generation thread. `max_queue` requests may wait; `max_prompt_tokens` is the longest prompt."""

    def __init__(self, provider: Provider, prompt_cache: PromptCache, max_queue: int, max_prompt_tokens: int | None):
        self.max_queue = max_queue
        self.max_prompt_tokens = max_prompt_tokens
        self.load_error: Exception | None = None
        self.draining = False
        self._places = 0
        self._cancelled = False
        self._entry: Entry | None = None  # of the one request that runs alone
        self.batch: Callable[[], Batch | None] = lambda: None
        self._replies: set[Reply] = set()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._own_tokenizer = None  # for `count`, made when it is first asked
        self._actions: Queue[tuple[Callable[[], Any], Future]] = Queue()
        super().__init__(provider, prompt_cache)
        self._time_budget = Steps()

    # For other threads

    @property
    def is_healthy(self) -> bool:
        return self.model_provider.ready and self.generation_available() and not self.draining

    @property
    def outstanding(self) -> int:
        """Requests that run or wait."""
        return self._places

    @property
    def queued(self) -> int:
        return self.requests.qsize()

    @property
    def capacity(self) -> int:
        """Requests that run at a time."""
        return self.cli_args.decode_concurrency if self.model_provider.is_batchable else 1

    @property
    def running_kv_bytes(self) -> int:
        """Bytes of the caches of requests that run."""
        batch, entry = self.batch(), self._entry
        return (0 if batch is None else batch.kv_bytes) + (0 if entry is None else entry.nbytes)

    def cancel_all(self) -> None:
        """For ever: what has a place is answered with an error."""
        self._cancelled = True
        with self._lock:
            for reply in self._replies:
                reply.cancel()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that run and wait, held until one is answered, however many sequences it is made
        of. Raises RequestError when the server is loading, leaving or full.
        """
        if not self.is_healthy:
            state = "shutting down" if self.draining else "loading the model"
            if self._generation_failed:
                state = "broken"
            raise RequestError(503, f"the server is {state}", retry_after_seconds=RETRY_SECONDS)
        with self._lock:
            if self._places >= self.capacity + self.max_queue:
                message = f"{self._places} requests are running or waiting already"
                raise RequestError(503, message, retry_after_seconds=RETRY_SECONDS)
            self._places += 1
        try:
            yield
        finally:
            with self._lock:
                self._places -= 1

    @contextlib.contextmanager
    def generate(
        self,
        request: CompletionRequest,
        generation_args: Arguments,
        progress_callback: Callable[[int, int], None] | None = None,
        connected: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[GenerationContext, Iterator[Response]]]:
        """As mlx-lm's, within a `place`: it stops when it is left. Raises RequestError and Disconnected."""
        reply = Reply(self._time_budget)
        with self._lock:
            if self._cancelled:
                reply.cancel()
            self._replies.add(reply)
            self.requests.put((reply, request, generation_args))
        try:
            context = self._await(reply, connected)
            if isinstance(context, BaseException):
                raise context
            yield context, self._responses(reply, progress_callback, connected)
        finally:
            self._done(reply)

    def _responses(
        self, reply: Reply, progress_callback: Callable[[int, int], None] | None, connected: Callable[[], bool]
    ) -> Iterator[Response]:
        while (item := self._await(reply, connected)) is not None:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, tuple):
                if progress_callback is not None:
                    progress_callback(*item)
            else:
                yield item
        if reply.cancelled:
            raise RequestError(503, "the server is shutting down", retry_after_seconds=RETRY_SECONDS)

    def ask(self, action: Callable[[], Any]) -> Future:
        """Has the generation thread, to which model and caches belong, do something between requests."""
        future: Future = Future()
        self._actions.put((action, future))
        return future

    def count(self, request: CompletionRequest, args: Arguments) -> int:
        """Tokens of a request's prompt, be it too long or not. Raises RequestError."""
        with self._counting:
            # The generation thread's own tokenizer is not for two threads at a time.
            if self._own_tokenizer is None:
                self._own_tokenizer = copy.deepcopy(self.model_provider.tokenizer)
            return len(self._encode(self._own_tokenizer, request, args)[0])

    def _done(self, reply: Reply) -> None:
        """Forgets a reply, and its request where the thread has not come to it: a body can be large."""
        reply.cancel()
        with self._lock, self.requests.mutex:
            self._replies.discard(reply)
            waiting = self.requests.queue
            for place, item in enumerate(waiting):
                if item[0] is reply:
                    del waiting[place]
                    break

    def _await(self, reply: Reply, connected: Callable[[], bool]):
        while True:
            if not connected():
                raise Disconnected
            try:
                return reply.get(timeout=POLL_SECONDS)
            except Empty:
                if reply.cancelled:
                    raise RequestError(503, "the server is shutting down", retry_after_seconds=RETRY_SECONDS) from None
                if not self.generation_available():
                    raise RequestError(503, "the server is shutting down") from None

    # The generation thread

    def _run_generate(self) -> None:
        this_thread.worker = self
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                if not self.model_provider.ready:
                    self.load_error = error
                    self._generation_failed = True
                    return
                logging.exception("a step failed")
                self._fail_running(error)
                self.prompt_cache.clear()
                mx.clear_cache()

    def _fail_running(self, error: Exception) -> None:
        """Tells every request that the thread has taken; those in the queue are still to come."""
        with self._lock, self.requests.mutex:
            waiting = {id(item[0]) for item in self.requests.queue}
            running = [reply for reply in self._replies if id(reply) not in waiting]
        for reply in running:
            reply.put(error)

    def _log_cache_stats(self) -> None:
        pass  # /metrics has them

    def _next_request(self, timeout: float | None = None):
        self._act()
        request = super()._next_request(timeout)
        return None if request is not None and request[0].cancelled else request

    def _act(self) -> None:
        while not self._actions.empty():
            action, future = self._actions.get()
            try:
                future.set_result(action())
            except Exception as error:
                if not isinstance(error, OSError):
                    logging.exception("what was asked of the generation thread failed")
                future.set_exception(error)

    def _is_batchable(self, args: Arguments) -> bool:
        return super()._is_batchable(args) and args.grammar is None and not args.begun

    def _tokenize(self, tokenizer, request: CompletionRequest, args: Arguments):
        """mlx-lm's (prompt, segments, their types, first state, vision), its length checked."""
        found = self._encode(tokenizer, request, args)
        self._check_length(len(found[0]), args, "prompt" if request.request_type == "text" else "messages")
        return found

    def _encode(self, tokenizer, request: CompletionRequest, args: Arguments):
        if request.request_type == "text":
            if isinstance(request.prompt, str):
                return super()._tokenize(tokenizer, request, args)
            return request.prompt, [request.prompt], ["assistant"], "normal", None
        try:
            prompt, segments, kinds, state, vision = super()._tokenize(tokenizer, request, args)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            # A template is a program: what it cannot compute with is the request's doing.
            logging.info("the chat template failed", exc_info=True)
            message = f"messages: the model's chat template refuses them: {type(error).__name__}: {error}"
            raise RequestError(400, message[:1000], param="messages") from error
        if args.begun:
            begun = tokenizer.encode(args.begun, add_special_tokens=False)
            prompt, segments, kinds = prompt + begun, [*segments, begun], [*kinds, "assistant"]
        return prompt, segments, kinds, state, vision

    def _check_length(self, prompt_tokens: int, args: Arguments, name: str) -> None:
        context = self.model_provider.model.args.max_position_embeddings
        most = min(context - 1, self.max_prompt_tokens or context)
        if prompt_tokens == 0 or prompt_tokens > most:
            message = f"{name}: {prompt_tokens:,} tokens found, 1 to {most:,} expected"
            raise RequestError(400, message, param=name, code="context_length_exceeded")
        room = context - prompt_tokens
        if args.max_tokens > room:
            message = f"{args.limit_name}: {room:,} at most after {prompt_tokens:,} tokens of prompt"
            raise RequestError(400, message, param=args.limit_name, code="context_length_exceeded")
        args.max_tokens = args.max_tokens or min(self.cli_args.max_tokens, room)

    def _serve_single(self, request, stream) -> None:
        reply, request, args = request
        reply.raises = True
        try:
            self._answer(reply, request, args)
        except Disconnected:
            mx.clear_cache()
        except (RequestError, MimoError) as error:
            reply.put(error)
        except Exception as error:
            logging.exception("a request failed")
            reply.put(error)

    def _answer(self, reply: Reply, request: CompletionRequest, args: Arguments) -> None:
        """One sequence through our step loop, which hands out a token as soon as it is known."""
        model, tokenizer = self.model_provider.model, self.model_provider.tokenizer
        prompt, segments, _, initial_state, _ = self._tokenize(tokenizer, request, args)
        _, text_machine = self._make_state_machine(self.model_provider.model_key, tokenizer, [])
        entry = self.prompt_cache.take(prompt) or Entry([], model.make_cache())
        reused = len(entry.tokens)
        reply.put(
            GenerationContext(
                has_tool_calling=tokenizer.has_tool_calling,
                has_thinking=tokenizer.has_thinking,
                tool_parser=tokenizer.tool_parser,
                text_sm=text_machine,
                initial_state=initial_state,
                prompt=prompt,
                prompt_cache_count=reused,
            )
        )
        self._entry = entry
        try:
            self._prefill(reply, entry, prompt, list(accumulate(map(len, segments))))
            self._decode(reply, entry, prompt, args)
        except Disconnected:
            self._keep(entry, entry.tokens)
            raise
        finally:
            self._entry = None

    def _prefill(self, reply: Reply, entry: Entry, prompt: list[int], boundaries: list[int]) -> None:
        """Computes all of the prompt but its last token, with a checkpoint at each boundary on the way."""
        model, reused, last = self.model_provider.model, len(entry.tokens), len(prompt) - 1
        for boundary in sorted({b for b in boundaries if reused < b < last} | {last}):
            done = len(entry.tokens)

            def progress(computed: int, total: int, done: int = done) -> None:
                entry.tokens = prompt[: done + computed]
                reply.put((done + computed, len(prompt)))

            if boundary > done:
                piece = mx.array(prompt[done : boundary + 1])
                prefill(model, piece, entry.caches, self.cli_args.prefill_step_size, progress)
            entry.tokens = prompt[:boundary]
            point = Checkpoint.of(entry.caches) if boundary else None
            if point is not None and all(old.length != boundary for old in entry.checkpoints):
                entry.checkpoints.append(point)

    def _decode(self, reply: Reply, entry: Entry, prompt: list[int], args: Arguments) -> None:
        model, tokenizer = self.model_provider.model, self.model_provider.tokenizer
        if args.seed is not None:
            mx.random.seed(args.seed)
        processors = _make_logits_processors(args)
        if args.grammar is not None:
            processors.append(args.grammar.processor(tokenizer, model.args.vocab_size))
        tokens = list(prompt)
        following = steps(
            model,
            mx.array(prompt[-1:]),
            entry.caches,
            max_tokens=args.max_tokens,
            sampler=_make_sampler(args, tokenizer),
            logits_processors=processors,
        )
        with contextlib.closing(text_steps(following, tokenizer, args.max_tokens, said=args.begun)) as answer:
            for step in answer:
                tokens.append(step.token)
                top = _format_top_logprobs(step.logprobs, args.top_logprobs, tokenizer)
                logprob = step.logprobs[step.token].item()
                reply.put(Response(step.text, step.token, logprob, step.finish_reason, top))
                if reply.context._should_stop:
                    break
        reply.put(None)
        # The last token was handed out before it was computed, unless the next forward pass was enqueued ahead.
        self._keep(entry, tokens)

    def _keep(self, entry: Entry, tokens: list[int]) -> None:
        """Puts the caches back, with the tokens that they hold."""
        computed = common_length(entry.caches)
        if computed is None or not 0 < computed <= len(tokens):
            return  # a forward pass was interrupted: the caches are no prompt's beginning
        self._entry = None  # kept now: not to be counted twice
        entry.tokens = list(tokens[:computed])
        self.prompt_cache.give(entry)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
