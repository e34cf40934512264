"""What a model's chat template looks at."""

from functools import lru_cache

import jinja2
import jinja2.meta
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..engine.mlx_lm_private import wrapped_tokenizer


def template_variables(tokenizer: TokenizerWrapper) -> frozenset[str]:
    """The names that a request may give values to; none where there is no template."""
    templates = wrapped_tokenizer(tokenizer).chat_template or {}
    texts = [templates] if isinstance(templates, str) else templates.values()
    return frozenset().union(*map(_variables, texts))


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    try:
        # The environment in which transformers renders, since a template may use its extensions.
        environment = _compile_jinja_template(template).environment
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError:
        return frozenset()  # rendering it will tell
