"""One sequence at a time through our step loop, which hands out a token as soon as it is known."""

from contextlib import closing
from itertools import pairwise

import mlx.core as mx

from ...runtime.steps import prefill, steps
from ...runtime.stream import text_steps
from . import samplers
from .engine_model import EngineModel
from .prompt import EncodedPrompt
from .prompt_cache import Checkpoint, Entry, PromptCache
from .request import Chat, GenerationRequest
from .results import Progress, Results, Started, Token


class _Cancelled(Exception):
    """Ends a prompt that is being computed for a reader who has left."""


class SingleSequence:
    """Answers requests one after another. Takes KV caches from the prompt cache and puts them back."""

    def __init__(self, loaded: EngineModel, prompt_cache: PromptCache):
        self.loaded = loaded
        self.prompt_cache = prompt_cache
        self._entry: Entry | None = None  # of the request that runs

    @property
    def kv_bytes(self) -> int:
        """Bytes of the running request's caches; 0 while none runs. May be called from any thread."""
        entry = self._entry
        return 0 if entry is None else entry.nbytes

    def answer(self, results: Results, request: GenerationRequest, prompt: EncodedPrompt, max_tokens: int) -> None:
        """Puts the answer into `results`, and ends them. Returns early once they are cancelled."""
        entry = self.prompt_cache.take(prompt.tokens) or Entry([], self.loaded.model.make_cache())
        results.put(Started(len(prompt.tokens), len(entry.tokens), prompt.state))
        self._entry = entry
        try:
            self._prefill(results, entry, prompt)
            tokens = self._decode(results, entry, request, prompt.tokens, max_tokens)
            results.end()
        except _Cancelled:
            tokens = entry.tokens
        finally:
            self._entry = None
        self._keep(entry, tokens)

    def _prefill(self, results: Results, entry: Entry, prompt: EncodedPrompt) -> None:
        """Computes all of the prompt but its last token, with a checkpoint at each boundary on the way."""
        tokens, reused = prompt.tokens, len(entry.tokens)
        last = len(tokens) - 1
        ends = sorted({end for end in prompt.boundaries if reused < end < last} | {last})
        for begin, end in pairwise([reused, *ends]):

            def progress(computed: int, total: int, begin: int = begin) -> None:
                entry.tokens = tokens[: begin + computed]
                if results.cancelled:
                    raise _Cancelled
                results.put(Progress(begin + computed, len(tokens)))

            if end > begin:
                piece = mx.array(tokens[begin : end + 1])
                prefill(self.loaded.model, piece, entry.caches, self.loaded.chunk, progress)
            entry.tokens = tokens[:end]
            point = Checkpoint.of(entry.caches) if end else None
            if point is not None and all(old.length != end for old in entry.checkpoints):
                entry.checkpoints.append(point)

    def _decode(
        self, results: Results, entry: Entry, request: GenerationRequest, prompt: list[int], max_tokens: int
    ) -> list[int]:
        """Returns the tokens of prompt and answer."""
        tokenizer = self.loaded.tokenizer
        if request.seed is not None:
            mx.random.seed(request.seed)
        processors = samplers.processors_of(request)
        if request.grammar is not None:
            processors.append(request.grammar.processor(tokenizer, self.loaded.vocab_size))
        tokens = list(prompt)
        following = steps(
            self.loaded.model,
            mx.array(prompt[-1:]),
            entry.caches,
            max_tokens=max_tokens,
            sampler=samplers.sampler_of(request, tokenizer),
            logits_processors=processors,
        )
        continued = request.prompt.continued if isinstance(request.prompt, Chat) else ""
        with closing(text_steps(following, tokenizer, max_tokens, continued)) as answer:
            for step in answer:
                tokens.append(step.token)
                top = samplers.top_tokens(step.logprobs, request.top_logprobs)
                logprob = samplers.logprob_of(step.logprobs, step.token)
                results.put(Token(step.text, step.token, logprob, step.finish_reason, top))
                if results.cancelled:
                    break
        return tokens

    def _keep(self, entry: Entry, tokens: list[int]) -> None:
        """Puts the caches back, with those of `tokens` that they hold."""
        offsets = {cache.offset for cache in entry.caches}
        computed = offsets.pop()
        # Else a forward pass was broken off, or one token more than was handed out was computed.
        if not offsets and 0 < computed <= len(tokens):
            entry.tokens = list(tokens[:computed])
            self.prompt_cache.give(entry)
