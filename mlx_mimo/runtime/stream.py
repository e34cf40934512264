"""Steps with text: detokenised, stopped at end tokens, counted; and `stream_generate`, the public form of them."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

from ..errors import UsageError
from .steps import Step, steps

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class TextStep(Step):
    """A step, and the text that it completes."""

    text: str  # may be empty: a character can take several tokens
    count: int  # tokens generated so far, this one included
    finish_reason: FinishReason | None = None  # "stop" at an end token, "length" at max_tokens, else None


def text_steps(
    tokens: Generator[Step, None, None], tokenizer: TokenizerWrapper, max_tokens: int, said: str = ""
) -> Generator[TextStep, None, None]:
    """Yields the steps of `tokens` with their text, up to the first end token or the `max_tokens`-th token; the last
    one has a finish_reason and all the text that was held back. An end token has no text of its own.

    `said` is text that the answer goes on from: the detokenizer leaves out a space at the start of a text only.
    Closes `tokens` when it ends or is closed.
    """
    detokenizer = detokenizer_after(tokenizer, said)
    with closing(tokens):
        for count, step in enumerate(tokens, 1):
            ended = step.token in tokenizer.eos_token_ids
            if not ended:
                detokenizer.add_token(step.token)
            reason: FinishReason | None = "stop" if ended else "length" if count == max_tokens else None
            if reason:
                detokenizer.finalize()
            yield TextStep(
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                text=detokenizer.last_segment,
                count=count,
                finish_reason=reason,
            )
            if reason:
                return


def detokenizer_after(tokenizer: TokenizerWrapper, said: str) -> StreamingDetokenizer:
    """A new detokenizer whose next segment follows the text `said`."""
    detokenizer = tokenizer.detokenizer
    for token in tokenizer.encode(said, add_special_tokens=False) if said else ():
        detokenizer.add_token(token)
    _ = detokenizer.last_segment  # reading it takes it away
    return detokenizer


@dataclass
class Response:
    """One token. Fields that mlx_lm's GenerationResponse has keep their names and meaning."""

    text: str
    token: int
    logprobs: mx.array  # (vocab_size,)
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft_s: float  # from the call to the first token
    peak_memory: float  # GB, as MLX counts
    finish_reason: FinishReason | None = None  # None before the last token
    from_draft: bool = False


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper | Any,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    prompt_cache: list | None = None,
    **options: Any,
) -> Generator[Response, None, None]:
    """Generates from a prompt (text, token ids or an (L,) array) and yields one Response a token.

    Args:
        tokenizer: What `load` returns, or a transformers tokenizer.
        max_tokens: At most so many tokens; -1 is without limit.
        prompt_cache: As `cache` of `steps`.
        options: The remaining arguments of `steps`: sampler, logits_processors, prefill_step_size,
            prompt_progress_callback.

    Raises UsageError for an empty prompt or one longer than the model's context.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    prompt = check_prompt(encode_prompt(tokenizer, prompt), model)
    start = time.perf_counter()
    first = None
    tokens = steps(model, prompt, prompt_cache, max_tokens=max_tokens, **options)
    with closing(text_steps(tokens, tokenizer, max_tokens)) as answer:
        for step in answer:
            now = time.perf_counter()
            first = first or now
            yield Response(
                text=step.text,
                token=step.token,
                logprobs=step.logprobs,
                prompt_tokens=prompt.size,
                prompt_tps=prompt.size / max(first - start, 1e-9),
                generation_tokens=step.count,
                generation_tps=(step.count - 1) / (now - first) if step.count > 1 else 0.0,
                ttft_s=first - start,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=step.finish_reason,
                from_draft=step.from_draft,
            )


def encode_prompt(tokenizer: TokenizerWrapper, prompt: str | Sequence[int] | mx.array) -> mx.array:
    """Token ids (L,) of a prompt; text that begins with the BOS token gets no second one."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        prompt = tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
    return prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), dtype=mx.int32)


def check_prompt(prompt: mx.array, model: nn.Module) -> mx.array:
    """The prompt (L,). Raises UsageError where it is empty or leaves no room in the model's context."""
    if prompt.size == 0:
        raise UsageError("the prompt is empty: at least one token expected")
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if limit is not None and prompt.size >= limit:
        raise UsageError(f"prompt of {prompt.size:,} tokens: fewer than max_position_embeddings = {limit:,} expected")
    return prompt
