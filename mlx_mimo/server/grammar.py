"""`response_format`: the answer is made to fit a JSON schema by masking tokens, with llguidance."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from .fields import refuse


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's form."""

    text: str

    def processor(self, tokenizer, vocab_size: int) -> "Masking":
        return Masking(self.text, _lexer(tokenizer._tokenizer, vocab_size), vocab_size)


def read(value: Any) -> Grammar | None:
    """The grammar of a request's response_format; None for plain text. Raises RequestError."""
    from llguidance import LLMatcher

    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if not isinstance(schema, dict):
            raise refuse("response_format.json_schema.schema", "a JSON schema expected")
    else:
        raise refuse("response_format.type", "text, json_object or json_schema expected")
    try:
        text = json.dumps(schema)
        if len(text) > 100_000:
            raise refuse("response_format", "a schema of at most 100,000 characters expected")
        # White space between tokens would let a model go on for ever.
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
    except (ValueError, RecursionError) as error:
        raise refuse("response_format", f"not a schema that can be followed: {error}") from None
    fault = LLMatcher.validate_grammar(grammar, None)
    if fault:
        raise refuse("response_format", f"not a schema that can be followed: {fault}")
    return Grammar(grammar)


class Masking:
    """A logits processor for one answer."""

    def __init__(self, grammar: str, lexer, vocab_size: int):
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask

        self.matcher = LLMatcher(lexer, grammar)
        self.mask = allocate_token_bitmask(1, vocab_size)
        self.vocab_size = vocab_size
        self.started = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens (L,): the prompt's end and the answer so far; logits (1, vocab) → masked."""
        from llguidance.numpy import fill_next_token_bitmask

        if self.started:
            self.matcher.consume_token(tokens[-1].item())
        self.started = True
        fill_next_token_bitmask(self.matcher, self.mask)
        fault = self.matcher.get_error()
        if fault:
            raise ValueError(f"response_format: {fault}")
        allowed = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[: self.vocab_size].astype(bool)
        return mx.where(mx.array(allowed), logits, -mx.inf)


@lru_cache(maxsize=1)
def _lexer(tokenizer, vocab_size: int):
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)
