"""The one model that is served. No request can name another: a path or repo from outside is never loaded."""

import gc
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import MimoError
from ...runtime.load import load


@dataclass(frozen=True)
class ModelSource:
    """What is loaded, and how. `options` are those of `runtime.load`."""

    path: Path
    adapter_path: str | None = None
    trust_remote_code: bool = False
    use_default_chat_template: bool = False  # where the model has none
    chunk: int | None = None  # prompt tokens computed at a time; None: what fits beside the model
    options: dict[str, Any] = field(default_factory=dict)


class EngineModel:
    """Belongs to the thread that loads it, which must use and close it as well."""

    def __init__(self, source: ModelSource):
        """Loads. Raises MimoError."""
        model, tokenizer = load(
            str(source.path),
            adapter_path=source.adapter_path,
            tokenizer_config={"trust_remote_code": source.trust_remote_code},
            **source.options,
        )
        if tokenizer.chat_template is None and source.use_default_chat_template:
            tokenizer.chat_template = tokenizer.default_chat_template
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.chunk: int = source.chunk or model.loaded.prefill_chunk
        self.residency = model.residency
        # Streamed experts want one sequence at a time: two would evict each other's.
        self.is_batchable: bool = self.residency is None or self.residency.all_resident
        self._profile = source.options.get("profile")

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.args.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        return self.model.args.vocab_size

    def close(self) -> None:
        """Saves the profile of uses where one is asked for, and gives the experts' memory and files back."""
        if self.residency is not None:
            if self._profile is not None:
                try:
                    self.residency.save_profile(self._profile)
                except MimoError as error:
                    logging.warning("--profile: %s", error)
            self.residency.close()
            self.residency = None
        self.model = self.tokenizer = None
        gc.collect()
