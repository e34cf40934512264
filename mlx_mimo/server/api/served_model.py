"""What the APIs must know of the model that is served."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..engine.request import Sampling
from .template import template_variables


@dataclass(frozen=True)
class ServedModel:
    name: str
    tokenizer: TokenizerWrapper
    vocab_size: int
    sampling: Sampling = field(default_factory=Sampling)  # of requests that name none
    variables: Mapping[str, Any] = field(default_factory=dict)  # the server's defaults for the chat template

    def template_variables(self) -> frozenset[str]:
        """The names that the chat template looks at; none where there is no template."""
        return template_variables(self.tokenizer)

    def decode(self, token: int) -> str:
        return self.tokenizer.decode([token])
