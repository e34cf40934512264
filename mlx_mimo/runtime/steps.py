"""The stream of steps: the tokens that follow a prompt, each handed out as soon as it is known.

`generate`, `chat`, `bench` and the server read the same stream. `steps` needs no tokenizer; text, end tokens and counts
come in one floor up, in `text_steps`. How a step is computed is decided in one place, `one_by_one`: a way of decoding
that emits several tokens from one forward pass goes beside it, and nothing else changes.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError
from .loaded import loaded_of
from .sampling import Sampler

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens so far (L,), logits (1, vocab_size) → logits
Progress = Callable[[int, int], None]  # prompt tokens computed, prompt tokens in all


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token that the model chose."""

    token: int
    logprobs: mx.array  # (vocab_size,), float32: the model's own, also where a draft proposed the token
    from_draft: bool = False


def steps(
    model: nn.Module,
    prompt: mx.array,
    cache: list | None = None,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
) -> Generator[Step, None, None]:
    """Yields a Step for each token that follows a prompt (L,); `max_tokens` of them, without end where it is -1.

    Args:
        cache: One KV cache for each layer, updated in place; new ones where it is None. When the generator ends or is
            closed, they hold the first `cache[0].offset` of the prompt's and the yielded tokens. After an exception
            from the model or a processor, the layers may hold different numbers of tokens.
        sampler: Chooses a token from log-probabilities; greedy where it is None.
        logits_processors: Called in order before the sampler, with the prompt and all tokens so far.
        prefill_step_size: Prompt tokens of one forward pass; None takes what `load` found to fit.
        prompt_progress_callback: Called before the first chunk of the prompt and after each. An exception from it
            leaves the caches consistent.

    Where the model waits for the host in each layer (streamed experts, the CPU kernels), the next forward pass begins
    when the next token is asked for: begun earlier, it would hold back the token that is already known. Otherwise it
    is enqueued before the token is handed out, so that the GPU never waits for Python.

    Raises UsageError for an empty prompt.
    """
    if prompt.size == 0:
        raise UsageError("the prompt is empty: at least one token expected")
    if max_tokens == 0:
        return
    cache = model.make_cache() if cache is None else cache
    loaded = loaded_of(model)
    chunk = prefill_step_size or loaded.prefill_chunk
    prefill(model, prompt, cache, chunk, prompt_progress_callback or (lambda *_: None))
    forward = Forward(model, cache, prompt[:-1], sampler or greedy, logits_processors or ())
    ahead = not loaded.synchronous and not logits_processors
    yield from one_by_one(forward, prompt[-1:], max_tokens, ahead)


def greedy(logprobs: mx.array) -> mx.array:
    """The most likely token (1,) of log-probabilities (1, vocab_size)."""
    return mx.argmax(logprobs, axis=-1)


def prefill(model: nn.Module, tokens: mx.array, cache: list, chunk: int, progress: Progress) -> None:
    """Computes all of `tokens` (L,) but the last into the caches, `chunk` tokens at a time. `progress` is called with
    (0, L) before the first chunk and with (computed, L) after each."""
    total, done = tokens.size, 0
    progress(0, total)
    while total - done > 1:
        length = min(chunk, total - 1 - done)
        piece = tokens[None, done : done + length]
        # These logits are not needed: our model then leaves out the head and the last layer's experts.
        (model.prefill if hasattr(model, "prefill") else model)(piece, cache=cache)
        mx.eval([entry.state for entry in cache])
        done += length
        progress(done, total)
        mx.clear_cache()


class Forward:
    """A forward pass of one token: its logits, what the processors make of them, and the token that is sampled."""

    def __init__(
        self,
        model: nn.Module,
        cache: list,
        history: mx.array,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
    ):
        """`history` (L,) holds the tokens before the first one that is to be computed, for the processors."""
        self.model, self.cache = model, cache
        self.history = history
        self.sampler, self.processors = sampler, processors

    def __call__(self, token: mx.array) -> tuple[mx.array, mx.array]:
        """(the token (1,) that follows `token` (1,), the log-probabilities (vocab_size,) it was sampled from); both
        are lazy arrays."""
        logits = self.model(token[None], cache=self.cache)[:, -1, :].astype(mx.float32)
        if self.processors:
            self.history = mx.concatenate([self.history, token])
        for processor in self.processors:
            logits = processor(self.history, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.sampler(logprobs), logprobs[0]


def one_by_one(forward: Forward, token: mx.array, max_tokens: int, ahead: bool) -> Generator[Step, None, None]:
    """Yields one Step for each forward pass, beginning with `token` (1,), the last of the prompt. `ahead` enqueues the
    next pass before a token is handed out. No pass is begun after the last token."""
    following = forward(token)
    count = 0
    while True:
        token, logprobs = following
        count += 1
        last = count == max_tokens
        if ahead and not last:
            mx.async_eval(token, logprobs)
            following = forward(token)
            mx.async_eval(*following)
        yield Step(token=cast(int, token.item()), logprobs=logprobs)
        if last:
            return
        if not ahead:
            following = forward(token)
        if count % 256 == 0:
            mx.clear_cache()
