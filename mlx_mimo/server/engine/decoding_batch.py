"""Several sequences decoded together, by mlx-lm's BatchGenerator."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import samplers
from .engine_model import EngineModel
from .mlx_lm_private import BatchGenerator, stop_sequences
from .prompt import EncodedPrompt
from .prompt_cache import Entry, PromptCache
from .request import GenerationRequest
from .results import Progress, Results, Started, Token


@dataclass
class _Sequence:
    results: Results
    detokenizer: Any
    top_logprobs: int


class DecodingBatch:
    """Requests join with `add` and leave when they are answered or cancelled. For the generation thread alone.

    `decode_concurrency` sequences are decoded and `prompt_concurrency` prompts computed at a time; more wait within.
    `max_bytes` bounds running and kept KV caches together, at the cost of those kept.
    """

    def __init__(
        self,
        loaded: EngineModel,
        prompt_cache: PromptCache,
        decode_concurrency: int = 32,
        prompt_concurrency: int = 8,
        max_bytes: int | None = None,
    ):
        self.loaded = loaded
        self.prompt_cache = prompt_cache
        self.decode_concurrency = decode_concurrency
        self.prompt_concurrency = prompt_concurrency
        self.max_bytes = max_bytes
        self.kv_bytes = 0  # of the running sequences' caches, as of the last step
        self._sequences: dict[int, _Sequence] = {}
        self._generator: BatchGenerator | None = None
        self._stop_sequences = stop_sequences(loaded.tokenizer)

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, results: Results, request: GenerationRequest, prompt: EncodedPrompt, max_tokens: int) -> None:
        """Its tokens come with later steps."""
        if self._generator is None:
            self._generator = BatchGenerator(
                self.loaded.model,
                completion_batch_size=self.decode_concurrency,
                prefill_batch_size=self.prompt_concurrency,
                prefill_step_size=self.loaded.chunk,
                stream=mx.default_stream(mx.default_device()),
            )
        entry = self.prompt_cache.take(prompt.tokens, keep=True)
        reused = 0 if entry is None else len(entry.tokens)
        results.put(Started(len(prompt.tokens), reused, prompt.state))
        (uid,) = self._generator.insert_segments(
            segments=[prompt.parts_after(reused)],
            max_tokens=[max_tokens],
            caches=None if entry is None else [entry.caches],
            all_tokens=[prompt.tokens[:reused]],
            samplers=[samplers.sampler_of(request, self.loaded.tokenizer)],
            logits_processors=[samplers.processors_of(request)],
            stop_sequences=[self._stop_sequences],
        )
        self._sequences[uid] = _Sequence(results, self.loaded.tokenizer.detokenizer, request.top_logprobs)
        if self.max_bytes is not None:
            self.prompt_cache.trim_to(n_bytes=self.max_bytes - self._generator.prompt_cache_nbytes)

    def step(self) -> None:
        """Computes the next token of each sequence that decodes, and the next chunk of prompts. Cancelled sequences
        leave first. Raises what the model raises; the batch is then good for `fail` only.
        """
        assert self._generator is not None
        self._remove_cancelled()
        if not self._sequences:
            return
        prompts, tokens = self._generator.next()
        for response in prompts:
            self._sequences[response.uid].results.put(Progress(*response.progress))
        ended = [r.uid for r in prompts if r.end_of_segment and not r.end_of_prompt]
        for caches, computed in self._generator.extract_cache(ended).values():
            self.prompt_cache.give(Entry(list(computed), caches))
        for response in tokens:
            self._put(response)
        self.kv_bytes = self._generator.prompt_cache_nbytes

    def fail(self, error: BaseException) -> None:
        """Every sequence ends with an error."""
        for sequence in self._sequences.values():
            sequence.results.fail(error)
        self._sequences.clear()
        self.close()

    def close(self) -> None:
        """Gives the caches back; `add` may follow."""
        generator, self._generator, self.kv_bytes = self._generator, None, 0
        if generator is not None:
            generator.close()

    def _remove_cancelled(self) -> None:
        left = [uid for uid, sequence in self._sequences.items() if sequence.results.cancelled]
        if left and self._generator is not None:
            self._generator.remove(left)
            for uid in left:
                del self._sequences[uid]
            self.kv_bytes = self._generator.prompt_cache_nbytes

    def _put(self, response: Any) -> None:
        sequence = self._sequences[response.uid]
        detokenizer = sequence.detokenizer
        if response.finish_reason != "stop":  # the token that ends an answer is no text
            detokenizer.add_token(response.token)
        if response.finish_reason is not None:
            detokenizer.finalize()
        logprob = samplers.logprob_of(response.logprobs, response.token)
        top = samplers.top_tokens(response.logprobs, sequence.top_logprobs)
        token = Token(detokenizer.last_segment, response.token, logprob, response.finish_reason, top)
        sequence.results.put(token)
        if response.finish_reason is not None:
            sequence.results.end()
            self.prompt_cache.give(Entry(list(response.all_tokens), response.prompt_cache))
            del self._sequences[response.uid]
