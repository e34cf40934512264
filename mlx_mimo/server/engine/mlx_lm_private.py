"""Every name of mlx-lm's that the server uses and mlx-lm does not document: all of them are in this file.

tests/server/test_mlx_lm_private.py compares their signatures with what is expected here. mlx-lm is bounded in
pyproject.toml to the versions that pass.
"""

from typing import Any

from mlx_lm.generate import BatchGenerator, StopSequences, TextStateMachine, make_text_state_machine
from mlx_lm.server import convert_chat, get_system_fingerprint
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import maybe_set_recommended_wired_limit

__all__ = [
    "BatchGenerator",
    "StopSequences",
    "TextStateMachine",
    "convert_chat",
    "get_system_fingerprint",
    "make_text_state_machine",
    "maybe_set_recommended_wired_limit",
    "state_after",
    "stop_sequences",
    "think_start",
    "wrapped_tokenizer",
]


def wrapped_tokenizer(tokenizer: TokenizerWrapper) -> Any:
    """The tokenizer of transformers within mlx-lm's."""
    return tokenizer._tokenizer


def stop_sequences(tokenizer: TokenizerWrapper) -> StopSequences:
    """Ends a sequence of a batch at any token that ends an answer."""
    return StopSequences([(token,) for token in sorted(tokenizer.eos_token_ids)])


def think_start(tokenizer: TokenizerWrapper, tokens: list[int], last: int) -> int | None:
    """Where thoughts begin among the `last` tokens; None where they do not."""
    if not tokenizer.has_thinking:
        return None
    place = tokenizer.rfind_think_start(tokens, start=len(tokens) - last)
    return None if place < 0 else place


def state_after(tokenizer: TokenizerWrapper, tokens: list[int]) -> str:
    """The state in which an answer to `tokens` begins: "reasoning" or "normal"."""
    if tokenizer.response_initial_state:
        return tokenizer.response_initial_state
    if not tokenizer.has_thinking:
        return "normal"
    begin, end = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(tokens)
    return "reasoning" if begin > end else "normal"
