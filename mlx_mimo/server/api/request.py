"""What a client asks for, whichever protocol it speaks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..engine.request import Chat, GenerationRequest, Penalties, Sampling
from . import grammar
from .fields import refuse
from .served_model import ServedModel
from .tool_choice import NO_TOOLS, ToolChoice


@dataclass(frozen=True)
class CompletionRequest:
    """An answer of one choice or several: each is a sequence of its own, with a seed of its own."""

    model: str
    generation: GenerationRequest
    tools: ToolChoice = NO_TOOLS
    stop: tuple[str, ...] = ()
    choices: int = 1
    stream: bool = False
    include_usage: bool = False  # at the end of a stream
    logprobs: bool = False

    @property
    def is_chat(self) -> bool:
        return isinstance(self.generation.prompt, Chat)

    def choice(self, index: int) -> GenerationRequest:
        """What the engine is asked for choice number `index`."""
        seed = self.generation.seed
        if index == 0 or seed is None:
            return self.generation
        return replace(self.generation, seed=(seed + index) % 2**63)


def check_model(name: str, served: ServedModel) -> None:
    """Raises RequestError where a request names another model than the one that is served."""
    if name != served.name:
        message = f"this server has {served.name!r} alone"
        raise refuse("model", message, status=404, code="model_not_found")


def sampling(values: Mapping[str, Any], served: ServedModel) -> Sampling:
    """Of a request's checked fields, the served model's own where a field is absent."""
    names = ("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold")
    chosen = replace(served.sampling, **{name: values[name] for name in names if name in values})
    # Probabilities are sorted up to the k-th: more than there are would be an error deep inside.
    if chosen.top_k >= served.vocab_size:
        chosen = replace(chosen, top_k=0)
    if values.get("top_p") == 0:  # mlx-lm takes 0 for no limit; the fewest tokens to sample from is the likeliest one
        chosen = replace(chosen, temperature=0.0)
    return chosen


def penalties(values: Mapping[str, Any], served: ServedModel) -> Penalties:
    """Of a request's checked fields. Raises RequestError for a token that there is not."""
    if any(token >= served.vocab_size for token in values.get("logit_bias", ())):
        raise refuse("logit_bias", f"token ids below {served.vocab_size} expected")
    names = Penalties.__dataclass_fields__
    return Penalties(**{name: values[name] for name in names if name in values})


def variables(asked: Mapping[str, Any], effort: str | None, effort_name: str, served: ServedModel) -> dict[str, Any]:
    """What a request sets for the chat template: `asked`, and whether it thinks as `effort` says, a field that the
    client calls `effort_name`. Raises RequestError where the template has no such variable.
    """
    chosen = dict(asked)
    names = {name: f"chat_template_kwargs.{name}" for name in chosen}
    if effort is not None and "enable_thinking" not in chosen:
        chosen["enable_thinking"] = effort != "none"
        if chosen["enable_thinking"]:
            names["enable_thinking"] = effort_name
    known = served.template_variables() if names else frozenset()
    for name in names.keys() - known:
        raise refuse(names[name], "the model's chat template has no such variable")
    return chosen


def answer_grammar(
    schema: dict[str, Any] | None, tools: ToolChoice, chosen: Mapping[str, Any], served: ServedModel
) -> grammar.Grammar | None:
    """The grammar that an answer has to follow, None where anything goes; `chosen` are the template's variables.

    Raises RequestError naming the field that cannot be followed.
    """
    thinking = bool({**served.variables, **chosen}.get("enable_thinking"))
    return grammar.build(schema, tools, thinking, served.tokenizer)
