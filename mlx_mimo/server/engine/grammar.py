"""An answer is made to fit a grammar by masking tokens, with llguidance."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .mlx_lm_private import wrapped_tokenizer


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's form, which llguidance has accepted."""

    text: str

    def processor(self, tokenizer: TokenizerWrapper, vocab_size: int) -> "Masking":
        return Masking(self.text, lexer(tokenizer, vocab_size), vocab_size)


class Masking:
    """A logits processor for one answer."""

    def __init__(self, grammar: str, lexer: Any, vocab_size: int):
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask

        self.matcher = LLMatcher(lexer, grammar)
        self.mask = allocate_token_bitmask(1, vocab_size)
        self.vocab_size = vocab_size
        self.started = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens (L,): the prompt's end and the answer so far; logits (1, vocab) → masked. Raises ValueError where the
        grammar has come to an end.
        """
        from llguidance.numpy import fill_next_token_bitmask

        if self.started:
            self.matcher.consume_token(int(np.array(tokens[-1])))
        self.started = True
        fill_next_token_bitmask(self.matcher, self.mask)
        fault = self.matcher.get_error()
        if fault:
            raise ValueError(f"the answer's grammar: {fault}")
        allowed = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[: self.vocab_size].astype(bool)
        return mx.where(mx.array(allowed), logits, -mx.inf)


def lexer(tokenizer: TokenizerWrapper, vocab_size: int) -> Any:
    """llguidance's view of a tokenizer; made once for each."""
    return _lexer(wrapped_tokenizer(tokenizer), vocab_size)


@lru_cache(maxsize=1)
def _lexer(tokenizer: Any, vocab_size: int) -> Any:
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)
