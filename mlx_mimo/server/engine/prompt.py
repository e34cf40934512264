"""From a request's prompt to tokens, and the places in them where later prompts are likely to branch off."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import RequestError
from .mlx_lm_private import convert_chat, state_after, think_start
from .request import Chat, Prompt

MOST_TAIL_TOKENS = 11  # of the chat template's beginning of an answer, thinking marks included
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class EncodedPrompt:
    tokens: list[int]
    boundaries: tuple[int, ...] = ()  # ascending, each within the prompt: the ends of its parts
    state: str = "normal"  # "reasoning" where the answer begins within thoughts

    def parts_after(self, reused: int) -> list[list[int]]:
        """The tokens from the `reused`th on, cut at the boundaries."""
        ends = [end for end in self.boundaries if reused < end < len(self.tokens)] + [len(self.tokens)]
        return [self.tokens[begin:end] for begin, end in zip([reused, *ends], ends)]


class PromptEncoder:
    """For one thread at a time. `variables` are the server's defaults for the chat template."""

    def __init__(self, tokenizer: TokenizerWrapper, variables: Mapping[str, Any]):
        self.tokenizer = tokenizer
        self.variables = variables

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Raises RequestError where the chat template does not take the messages."""
        if isinstance(prompt, list):
            return EncodedPrompt(prompt)
        if isinstance(prompt, str):
            return EncodedPrompt(self.tokenizer.encode(prompt))
        try:
            encoded = self._chat(prompt)
        except _TEMPLATE_ERRORS as error:
            # A template is a program: what it cannot compute with is the request's doing.
            logging.info("the chat template failed", exc_info=True)
            message = f"messages: the model's chat template refuses them: {type(error).__name__}: {error}"
            raise RequestError(400, message[:1000], param="messages") from error
        if not prompt.continued:
            return encoded
        begun = self.tokenizer.encode(prompt.continued, add_special_tokens=False)
        boundaries = (*encoded.boundaries, len(encoded.tokens))
        return EncodedPrompt(encoded.tokens + begun, boundaries, encoded.state)

    def _chat(self, chat: Chat) -> EncodedPrompt:
        if not self.tokenizer.has_chat_template:
            return EncodedPrompt(self.tokenizer.encode(convert_chat(chat.messages)))
        tokens = self._render(chat, chat.messages, add_generation_prompt=True)
        state = state_after(self.tokenizer, tokens)
        if chat.messages[-1]["role"] != "user":
            return EncodedPrompt(tokens, (), state)
        tail = think_start(self.tokenizer, tokens, MOST_TAIL_TOKENS)
        boundaries = {self._end_of_system(chat, tokens), len(tokens) if tail is None else tail}
        return EncodedPrompt(tokens, tuple(sorted(end for end in boundaries if 0 < end < len(tokens))), state)

    def _end_of_system(self, chat: Chat, tokens: list[int]) -> int:
        """How many of the prompt's first tokens its system messages alone decide; 0 where it has none."""
        roles = [message["role"] for message in chat.messages]
        count = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
        if count == 0:
            return 0
        alone = self._render(chat, [*chat.messages[:count], {"role": "user", "content": ""}])
        pairs = enumerate(zip(alone, tokens))
        return next((i for i, (one, other) in pairs if one != other), 0)

    def _render(self, chat: Chat, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
        variables = {**self.variables, **chat.variables}
        return self.tokenizer.apply_chat_template(
            messages, tools=chat.tools, add_generation_prompt=add_generation_prompt, tokenize=True, **variables
        )
