"""The model against transformers' logits (golden files), and the mistakes that comparison must catch."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mimo_v2_flash as stock
from models.model_cases import CASES, TOLERANCE, difference, mlx_model, run
from support import checkpoints

from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError
from mlx_mimo.models.mimo_v2_flash import Model, Router

ALL_CASES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def models():
    """{(case, window or None): Model}, each built once."""
    built = {}

    def get(name: str, window: int | None = None) -> Model:
        if (name, window) not in built:
            built[name, window] = mlx_model(CASES[name].config, CASES[name].weights(), window)
        return built[name, window]

    return get


# Equal to transformers


@ALL_CASES
def test_a_whole_prompt_without_cache_equals_the_golden_logits(models, name):
    case = CASES[name]
    assert difference(run(models(name), case.tokens()), case.golden()) < TOLERANCE


@ALL_CASES
@pytest.mark.parametrize(
    "chunks",
    [[330], [16, 1, 17, 33, 63, 200], [127, 1, 1, 1, 2, 198]],
    ids=lambda chunks: "-".join(map(str, chunks[:6])),
)
def test_chunks_across_the_window_equal_the_golden_logits(models, name, chunks):
    case = CASES[name]
    assert difference(run(models(name), case.tokens(), chunks), case.golden()) < TOLERANCE


@ALL_CASES
def test_single_tokens_equal_the_golden_logits(models, name):
    case = CASES[name]
    assert difference(run(models(name), case.tokens(), [1] * case.length), case.golden()) < TOLERANCE


@pytest.mark.parametrize("length", [127, 128, 129, 130])
@pytest.mark.parametrize("border", [1, 126])
def test_prompts_about_as_long_as_the_released_window(models, length, border):
    case = CASES["released_window"]
    model, tokens, golden = models(case.name), case.tokens(), case.golden()
    # The prompt in two chunks, then four tokens one at a time.
    chunks = [border, length - border, 1, 1, 1, 1]
    assert difference(run(model, tokens[:, : length + 4], chunks), golden[:, : length + 4]) < TOLERANCE


@ALL_CASES
def test_both_readings_of_the_window_equal_the_golden_logits(models, name):
    case = CASES[name]
    tokens = case.tokens()
    small, large = case.windows
    for window in case.windows:
        model, golden = models(name, window), case.golden(window)
        assert difference(run(model, tokens), golden) < TOLERANCE
        assert difference(run(model, tokens, [31, 1, 1, 97, 200]), golden) < TOLERANCE
    apart = np.abs(case.golden(small) - case.golden(large)).max(axis=(0, 2))
    assert apart[:small].max() == 0  # up to there, both see everything
    assert apart[small] > 10 * TOLERANCE


def test_the_larger_window_is_the_default(models):
    assert ModelArgs.from_dict(checkpoints.tiny_config(sliding_window_size=128, sliding_window=128)).window == 129


def test_prefill_leaves_the_same_cache_as_a_call(models):
    case = CASES["short_window"]
    model, tokens = models(case.name), case.tokens()
    cache = model.make_cache()
    model.prefill(mx.array(tokens[:, :100]), cache)
    model.prefill(mx.array(tokens[:, 100:200]), cache)
    assert difference(run(model, tokens[:, 200:], [1, 129], cache), case.golden()[:, 200:]) < TOLERANCE


def test_input_embeddings_replace_tokens(models):
    case = CASES["short_window"]
    model, tokens = models(case.name), mx.array(case.tokens())
    embeddings = model.model.embed_tokens(tokens)
    assert difference(np.array(model(tokens, input_embeddings=embeddings)), case.golden()) < TOLERANCE


def test_mlx_lms_own_model_equals_ours_at_its_window():
    case = CASES["short_window"]
    config, weights = case.config, case.weights()
    theirs = stock.Model(stock.ModelArgs.from_dict(config))
    ours = mlx_model(config, weights, window=config["sliding_window_size"])
    theirs.load_weights(list(theirs.sanitize({k: mx.array(v) for k, v in weights.items()}).items()), strict=True)
    tokens = mx.array(case.tokens())
    assert difference(np.array(theirs(tokens)), np.array(ours(tokens))) < TOLERANCE


# What the comparison catches


def flat_map_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """The weights after a wrong dequantisation, which takes the K/V chain of global layers for plain blocks."""
    stored, weights = checkpoints.make_tensors(config, seed, mtp=False)
    for name in stored:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = checkpoints.dequantise(stored[name][1], stored[f"{name}_scale_inv"][1])
    return weights


def bfloat16_router(self: Router, x: mx.array):
    low = Router(ModelArgs.from_dict(checkpoints.tiny_config()))
    low.top_k, low.norm_topk_prob, low.scale = self.top_k, self.norm_topk_prob, self.scale
    low.e_score_correction_bias = self.e_score_correction_bias
    low.weight = self.weight.astype(mx.bfloat16)
    return Router.__call__(low, x.astype(mx.bfloat16))


class BFloat16Router(Router):
    __call__ = bfloat16_router


@ALL_CASES
def test_a_wrong_scale_map_is_caught(name):
    case = CASES[name]
    model = mlx_model(case.config, flat_map_weights(case.config, case.seed))
    assert difference(run(model, case.tokens()), case.golden()) > 100 * TOLERANCE


@ALL_CASES
def test_a_missing_value_scale_is_caught(name):
    case = CASES[name]
    model = mlx_model(case.config | {"attention_value_scale": None}, case.weights())
    assert difference(run(model, case.tokens()), case.golden()) > 100 * TOLERANCE


@ALL_CASES
def test_a_bfloat16_router_is_caught(name):
    case = CASES[name]
    model = mlx_model(case.config, case.weights())
    for layer in model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.__class__ = BFloat16Router
    assert difference(run(model, case.tokens()), case.golden()) > 10 * TOLERANCE


@ALL_CASES
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_is_caught(models, name, off):
    case = CASES[name]
    model = models(name, case.windows[1] + off)
    assert difference(run(model, case.tokens()), case.golden()) > 10 * TOLERANCE
    few = case.windows[1] + 10
    assert difference(run(model, case.tokens()[:, :few], [1] * few), case.golden()[:, :few]) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 10_000}, {"swa_rope_theta": 10_100}, {"partial_rotary_factor": 0.345}, {"layernorm_epsilon": 1e-3}],
    ids=lambda change: next(iter(change)),
)
def test_a_wrong_field_is_caught(change):
    case = CASES["short_window"]
    model = mlx_model(case.config | change, case.weights())
    assert difference(run(model, case.tokens()), case.golden()) > 10 * TOLERANCE


# Parts


def test_the_bias_changes_the_choice_of_experts_and_not_their_weights():
    router = Router(ModelArgs.from_dict(checkpoints.tiny_config(n_routed_experts=4, num_experts_per_tok=2)))
    logits = mx.array([2.0, 1.0, 0.0, -1.0])
    router.weight = mx.concatenate([logits[:, None], mx.zeros((4, 127))], axis=1)
    router.e_score_correction_bias = mx.array([0.0, 0.0, 0.0, 9.0])
    indices, weights = router(mx.concatenate([mx.ones((1, 1)), mx.zeros((1, 127))], axis=1))
    found = dict(zip(indices[0].tolist(), weights[0].tolist()))
    raw = {0: 1 / (1 + np.exp(-2.0)), 3: 1 / (1 + np.exp(1.0))}
    assert found == pytest.approx({expert: value / sum(raw.values()) for expert, value in raw.items()}, abs=1e-6)


def test_the_router_works_in_float32_whatever_it_is_given():
    args = ModelArgs.from_dict(checkpoints.tiny_config())
    router = Router(args)
    router.weight = mx.random.normal((8, 128), key=mx.random.key(0))
    x = mx.random.normal((50, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    (_, low), (_, full) = router(x), router(x.astype(mx.float32))
    assert low.dtype == mx.float32
    assert mx.array_equal(low, full)


def test_another_module_can_replace_the_experts(models):
    case = CASES["short_window"]
    model = mlx_model(case.config, case.weights())
    calls = []

    class Elsewhere(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._inner = inner

        def __call__(self, x, indices, scores=None):
            calls.append(indices.shape)
            return self._inner(x, indices)

    for layer in model.layers[1:]:
        layer.mlp.switch_mlp = Elsewhere(layer.mlp.switch_mlp)
    assert difference(run(model, case.tokens()), case.golden()) < TOLERANCE
    assert calls == [(1, 330, 2)] * 3
    calls.clear()
    model.prefill(mx.array(case.tokens()), model.make_cache())
    assert calls == [(1, 330, 2)] * 2  # the last layer's experts were spared


# Weights


def test_parameters_are_named_as_in_mlx_lm():
    config = checkpoints.tiny_config()
    ours = Model(ModelArgs.from_dict(config))
    theirs = stock.Model(stock.ModelArgs.from_dict(config))
    shapes = [{name: value.shape for name, value in tree_flatten(model.parameters())} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_stacked_and_separate_experts_load_the_same_and_mtp_is_left_out():
    config = checkpoints.tiny_config(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1])
    weights = {k: mx.array(v) for k, v in checkpoints.random_weights(config, mtp=True).items()}
    model = Model(ModelArgs.from_dict(config))
    stacked = model.sanitize(weights)
    again = model.sanitize(stacked)
    assert stacked.keys() == again.keys() == {name for name, _ in tree_flatten(model.parameters())}
    third = weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert mx.array_equal(stacked["model.layers.1.mlp.switch_mlp.up_proj.weight"][3], third)


def test_sanitize_names_a_missing_expert():
    config = checkpoints.tiny_config(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1])
    weights = {k: mx.array(v) for k, v in checkpoints.random_weights(config, mtp=False).items()}
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(FormatError, match=r"layers\.1\.mlp.*up_proj.*7 experts found, 8 expected"):
        Model(ModelArgs.from_dict(config)).sanitize(weights)


def test_sanitize_rejects_an_fp8_checkpoint():
    with pytest.raises(FormatError, match=r"mlx_mimo\.convert"):
        Model(ModelArgs.from_dict(checkpoints.tiny_config())).sanitize({"a.weight_scale_inv": mx.zeros(1)})


def test_casting_spares_the_router():
    model = Model(ModelArgs.from_dict(checkpoints.tiny_config()))
    spared = {n.split("mlp.")[1] for n, _ in tree_flatten(model.parameters()) if not model.cast_predicate(n)}
    assert spared == {"gate.weight", "gate.e_score_correction_bias"}


def test_quantised_by_its_predicate_it_equals_mlx_lms_own_model():
    case = CASES["short_window"]
    config, weights = case.config, case.weights()
    ours = mlx_model(config, weights, window=config["sliding_window_size"])
    nn.quantize(ours, 64, 4, class_predicate=ours.quant_predicate)
    assert ours.layers[1].mlp.switch_mlp.up_proj.bits == 4
    assert ours.layers[0].mlp.up_proj.bits == ours.lm_head.bits == ours.layers[1].self_attn.o_proj.bits == 8
    assert ours.layers[1].mlp.gate.weight.dtype == mx.float32
    theirs = stock.Model(stock.ModelArgs.from_dict(config))
    nn.quantize(theirs, 64, 4, class_predicate=ours.quant_predicate)
    theirs.load_weights(tree_flatten(ours.parameters()), strict=True)
    tokens = mx.array(case.tokens())
    assert difference(np.array(ours(tokens)), np.array(theirs(tokens))) < TOLERANCE
