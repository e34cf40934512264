"""Samplers, logits processors and log probabilities of a request, from mlx-lm's parts."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .request import GenerationRequest
from .results import TopToken

Processor = Callable[[mx.array, mx.array], mx.array]


def sampler_of(request: GenerationRequest, tokenizer: TokenizerWrapper) -> Callable[[mx.array], mx.array]:
    """Draws tokens (B,) from log probabilities (B, vocab)."""
    sampling = request.sampling
    return make_sampler(
        sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        xtc_probability=sampling.xtc_probability,
        xtc_threshold=sampling.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def processors_of(request: GenerationRequest) -> list[Processor]:
    """What changes logits (1, vocab), given the tokens (L,) before them."""
    penalties = request.penalties
    return make_logits_processors(
        penalties.logit_bias,
        penalties.repetition_penalty,
        penalties.repetition_context_size,
        penalties.presence_penalty,
        penalties.presence_context_size,
        penalties.frequency_penalty,
        penalties.frequency_context_size,
    )


def logprob_of(logprobs: mx.array, token: int) -> float:
    """A token's, of (vocab,)."""
    return float(np.array(logprobs[token].astype(mx.float32)))  # NumPy has no bfloat16


def top_tokens(logprobs: mx.array, count: int) -> tuple[TopToken, ...]:
    """The `count` most likely tokens of (vocab,), the likeliest first."""
    if count <= 0:
        return ()
    places = mx.argpartition(-logprobs, kth=count - 1)[:count]
    places = places[mx.argsort(-logprobs[places])]
    ids, values = np.array(places), np.array(logprobs[places].astype(mx.float32))
    return tuple(TopToken(int(token), float(value)) for token, value in zip(ids, values))
