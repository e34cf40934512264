"""The step loop: a token is handed out as soon as it is known."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import UsageError
from ..planning.budget import CHUNK


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
    finish_reason: str | None = None  # "stop", "length", or None while it goes on
    from_draft: bool = False


def prefill_chunk(model) -> int:
    """Prompt tokens that a model computes at a time: what `load` found to fit, else the usual number."""
    return getattr(model, "prefill_chunk", CHUNK)


def prefill(model, tokens: mx.array, cache: list, chunk: int, progress: Callable[[int, int], None]) -> None:
    """Runs all tokens (L,) but the last through the caches, chunk by chunk."""
    total, done = tokens.size, 0
    progress(0, total)
    while total - done > 1:
        step = min(chunk, total - 1 - done)
        piece = tokens[None, done : done + step]
        # Nobody needs these logits: our model then leaves out the head and the last layer's experts.
        (model.prefill if hasattr(model, "prefill") else model)(piece, cache=cache)
        mx.eval([entry.state for entry in cache])
        done += step
        progress(done, total)
        mx.clear_cache()


def generate_step(
    prompt: mx.array,
    model,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: Sequence[Callable] | None = None,
    prompt_cache: list | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Yields (token, logprobs (vocab_size,)) for a prompt (L,), at most max_tokens of them; -1 is without end.

    Where layers synchronise with the host (streamed experts, the CPU kernels), the next forward begins only when
    the next token is asked for: begun earlier, it would hold back the token that is already known. Otherwise it
    is enqueued first, so that the GPU never waits for Python. `prefill_step_size` is what fits, as `load` found.
    """
    if prompt.size == 0:
        raise UsageError("the prompt is empty: at least one token expected")
    if prompt_cache is None:
        prompt_cache = model.make_cache()
    sampler = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
    history = prompt if logits_processors else None
    chunk = prefill_step_size or prefill_chunk(model)
    prefill(model, prompt, prompt_cache, chunk, prompt_progress_callback or (lambda *_: None))

    def forward(token: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(token[None], cache=prompt_cache)[:, -1, :].astype(mx.float32)
        for processor in logits_processors or ():
            logits = processor(history, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return sampler(logprobs), logprobs[0]

    ahead = not getattr(model, "synchronous", False) and not logits_processors
    token, logprobs = forward(prompt[-1:])
    produced = 0
    while produced != max_tokens:
        if ahead and produced + 1 != max_tokens:
            mx.async_eval(token, logprobs)
            following = forward(token)
            mx.async_eval(*following)
        produced += 1
        yield token.item(), logprobs
        if produced == max_tokens:
            return
        if not ahead:
            if history is not None:
                history = mx.concatenate([history, token])
            following = forward(token)
        token, logprobs = following
        if produced % 256 == 0:
            mx.clear_cache()


def stream_generate(
    model,
    tokenizer,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    **options,
) -> Iterator[Response]:
    """Generates from a prompt (text, token ids or (L,) array), one Response a token; options as `generate_step`.

    Raises UsageError for an empty prompt or one longer than the model's context.
    """
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    prompt = check_prompt(encode_prompt(tokenizer, prompt), model)
    if max_tokens == 0:
        return
    detokenizer = tokenizer.detokenizer
    start = time.perf_counter()
    first = None
    for count, (token, logprobs) in enumerate(generate_step(prompt, model, max_tokens=max_tokens, **options), 1):
        now = time.perf_counter()
        first = first or now
        ended = token in tokenizer.eos_token_ids
        if not ended:
            detokenizer.add_token(token)
        reason = "stop" if ended else "length" if count == max_tokens else None
        if reason:
            detokenizer.finalize()
        yield Response(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            prompt_tokens=prompt.size,
            prompt_tps=prompt.size / max(first - start, 1e-9),
            generation_tokens=count,
            generation_tps=(count - 1) / (now - first) if count > 1 else 0.0,
            ttft_s=first - start,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
        )
        if reason:
            return


def encode_prompt(tokenizer, prompt: str | Sequence[int] | mx.array) -> mx.array:
    """Token ids (L,) of a prompt; text that begins with the BOS token gets no second one."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        prompt = tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
    return prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), dtype=mx.int32)


def check_prompt(prompt: mx.array, model) -> mx.array:
    """The prompt, if the model can take it."""
    if prompt.size == 0:
        raise UsageError("the prompt is empty: at least one token expected")
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if limit is not None and prompt.size >= limit:
        raise UsageError(f"prompt of {prompt.size:,} tokens: fewer than max_position_embeddings = {limit:,} expected")
    return prompt
