"""The one model that is served. No request can name another: a path or repo from outside is never loaded."""

import argparse
import logging

from mlx_lm.server import ModelProvider

from ..errors import MimoError
from ..runtime.load import load


class Provider(ModelProvider):
    """mlx-lm's provider with our loader. Its model is loaded, used and freed in the generation thread."""

    def __init__(self, cli_args: argparse.Namespace, load_options: dict):
        super().__init__(cli_args)
        self.load_options = load_options
        self._chunk = cli_args.prefill_step_size  # None: what fits beside the model
        self.residency = None

    @property
    def ready(self) -> bool:
        return self.model_key is not None

    def load_default(self) -> None:
        # mlx-lm loads nothing where no model is named; ours is then the demo.
        self.load("default_model", None, "default_model")

    def _load(self, model_path, adapter_path=None, draft_model_path=None) -> None:
        self.reset()
        model, tokenizer = load(
            model_path,
            adapter_path=adapter_path,
            tokenizer_config={"trust_remote_code": self.cli_args.trust_remote_code},
            **self.load_options,
        )
        if tokenizer.chat_template is None and self.cli_args.use_default_chat_template:
            tokenizer.chat_template = tokenizer.default_chat_template
        self.model, self.tokenizer = model, tokenizer
        self.cli_args.prefill_step_size = self._chunk or model.loaded.prefill_chunk
        self.residency = model.residency
        # Streamed experts want one sequence at a time: two would evict each other's.
        self.is_batchable = self.residency is None or self.residency.all_resident
        self.model_key = (model_path, adapter_path, draft_model_path)

    def reset(self) -> None:
        if getattr(self, "residency", None) is not None:
            profile = self.load_options.get("profile")
            if profile is not None:
                try:
                    self.residency.save_profile(profile)
                except MimoError as error:
                    logging.warning("--profile: %s", error)
            self.residency.close()
            self.residency = None
        super().reset()
