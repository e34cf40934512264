"""Names of mlx-lm's that it does not document: their signatures are those that the package was written against.

A failure here says what another version of mlx-lm changed. Read what changed, mend what uses it, and move the bounds of
mlx-lm in pyproject.toml and in `doctor` together with the table below.
"""

import ast
import importlib
import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper
from packaging.requirements import Requirement

from mlx_mimo.doctor.machine_checks import MLX_LM_BELOW, MLX_LM_LEAST
from mlx_mimo.models.cache import BatchSlidingKVCache, SlidingKVCache

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlx_mimo"

SIGNATURES = {
    "generate.BatchGenerator.__init__": "(self, model, *, max_tokens, stop_tokens, sampler, logits_processors, "
    "completion_batch_size, prefill_batch_size, prefill_step_size, max_kv_size, stream)",
    "generate.BatchGenerator.insert_segments": "(self, segments, max_tokens, caches, all_tokens, samplers, "
    "logits_processors, stop_sequences)",
    "generate.BatchGenerator.next": "(self)",
    "generate.BatchGenerator.extract_cache": "(self, uids)",
    "generate.BatchGenerator.remove": "(self, uids, return_prompt_caches)",
    "generate.BatchGenerator.close": "(self)",
    "generate.GenerationBatch.Response": "(uid, token, logprobs, finish_reason, prompt_cache, all_tokens)",
    "generate.PromptProcessingBatch.Response": "(uid, progress, end_of_segment, end_of_prompt)",
    "generate.StopSequences.__init__": "(self, stop_sequences)",
    "generate.TextStateMachine.make_state": "(self, initial)",
    "generate.TextStateMachine.split": "(state, text)",
    "generate.TextStateMachine.flush": "(state)",
    "generate.make_text_state_machine": "(tokenizer, stop_words)",
    "sample_utils.make_sampler": "(temp, top_p, min_p, min_tokens_to_keep, top_k, xtc_probability, xtc_threshold, "
    "xtc_special_tokens)",
    "sample_utils.make_logits_processors": "(logit_bias, repetition_penalty, repetition_context_size, "
    "presence_penalty, presence_context_size, frequency_penalty, frequency_context_size)",
    "server.convert_chat": "(messages, role_mapping)",
    "server.get_system_fingerprint": "()",
    "tokenizer_utils.TokenizerWrapper.rfind_think_start": "(self, tokens, start, end)",
    "tokenizer_utils.TokenizerWrapper.rfind_think_end": "(self, tokens, start, end)",
    "tokenizer_utils.TokenizerWrapper.apply_chat_template": "(self, *args, tokenize, **kwargs)",
    "utils.maybe_set_recommended_wired_limit": "()",
    # What models/cache.py overrides, and what it has in the manner of mlx-lm's sliding cache.
    "models.cache._BaseCache.is_trimmable": "(self)",
    "models.cache._BaseCache.size": "(self)",
    "models.cache._BaseCache.empty": "(self)",
    "models.cache.BatchRotatingKVCache.extract": "(self, idx)",
    "models.cache.BatchRotatingKVCache.merge": "(caches)",
    "models.cache.RotatingKVCache.make_mask": "(self, N, window_size, return_array)",
    "models.cache.RotatingKVCache.trim": "(self, n)",
    "models.cache.RotatingKVCache._temporal_order": "(self, v)",
}


def found(name: str):
    """What stands at a name: a module, then attributes."""
    parts = name.split(".")
    modules = 2 if parts[0] == "models" else 1
    value = importlib.import_module(".".join(["mlx_lm", *parts[:modules]]))
    for part in parts[modules:]:
        value = getattr(value, part)
    return value


def names_of(function) -> str:
    """Its signature without defaults and annotations, the star of keywords included."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(default=p.empty, annotation=p.empty) for p in parameters]
    return str(inspect.Signature(bare))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_expected_one(name):
    assert names_of(found(name)) == SIGNATURES[name], f"mlx-lm {version('mlx-lm')}"


def test_the_attributes_that_are_read_exist():
    for name in ("has_thinking", "has_tool_calling", "response_initial_state", "tool_parser", "detokenizer"):
        assert isinstance(getattr(TokenizerWrapper, name), property), name
    assert "_tokenizer" in inspect.getsource(TokenizerWrapper.__init__)
    assert isinstance(BatchGenerator.prompt_cache_nbytes, property)


@pytest.mark.parametrize("ours", [SlidingKVCache, BatchSlidingKVCache])
def test_every_method_that_a_cache_overrides_has_its_signature_here(ours):
    for base in ours.__mro__[1:-1]:
        for name, value in vars(base).items():
            if name in vars(ours) and (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))):
                assert f"models.cache.{base.__name__}.{name}" in SIGNATURES


def test_no_other_file_of_the_server_imports_private_names_of_mlx_lm():
    """models/cache.py derives from a private base class, and is covered above."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                internal = node.module in ("mlx_lm.server", "mlx_lm.generate") and "server" in path.parts
                where = path.relative_to(PACKAGE).as_posix()
                assert not private or where == "models/cache.py", f"{where}: {private}"
                assert not internal or path.name == "mlx_lm_private.py", f"{where}: {node.module}"


def test_the_project_and_doctor_want_the_versions_that_these_signatures_are_of():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [Requirement(text) for text in project["dependencies"] if Requirement(text).name == "mlx-lm"]
    assert str(wanted.specifier) == f"<{MLX_LM_BELOW},>={MLX_LM_LEAST}"
    assert version("mlx-lm") in wanted.specifier
