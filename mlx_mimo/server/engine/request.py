"""What the engine is asked for: one sequence of tokens."""

from dataclasses import dataclass, field
from typing import Any

from .grammar import Grammar


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1


@dataclass(frozen=True)
class Penalties:
    """What is added to logits, or taken off, before a token is drawn. Context sizes are in tokens."""

    logit_bias: dict[int, float] | None = None
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template, in its own form."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)  # of the template, over the server's defaults
    continued: str = ""  # text with which the answer begins; the model goes on from it


Prompt = Chat | str | list[int]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, and how its answer is to be generated."""

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    penalties: Penalties = field(default_factory=Penalties)
    max_tokens: int | None = None  # None: what the context leaves, the server's default at most
    limit_name: str = "max_tokens"  # what the client calls it
    seed: int | None = None
    top_logprobs: int = 0
    grammar: Grammar | None = None

    @property
    def batchable(self) -> bool:
        """Whether it may be computed together with other sequences."""
        continued = isinstance(self.prompt, Chat) and self.prompt.continued
        return self.seed is None and self.grammar is None and not continued
