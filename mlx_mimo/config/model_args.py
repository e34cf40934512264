"""ModelArgs: the checked values of config.json.

Every field that the computation depends on is checked before anything is allocated; a value that this model does not
implement raises FormatError with the field's name. No MLX, so that `plan` and `doctor` start at once.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..errors import FormatError

MODEL_TYPE = "mimo_v2_flash"
ARCHITECTURE = "MiMoV2FlashForCausalLM"
SUPPORTED = f"supported: {MODEL_TYPE} ({ARCHITECTURE}: MiMo-V2-Flash, MiMo-V2-Flash-Base)"
SIZE_LIMIT = 1 << 31
SLACK = 64  # tokens that can be trimmed from a sliding layer's cache at any time: 12.5 MB in all at full size, bfloat16

# {field that changes what is computed: the values that this model implements}
FIXED_FIELDS: dict[str, tuple[str | int | bool | None, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "n_shared_experts": (None, 0),
    "n_group": (1,),
    "topk_group": (1,),
    "attention_projection_layout": (None, "split"),
    "moe_router_dtype": (None, "float32"),
}


@dataclass(frozen=True)
class ModelArgs:
    """A checked config.json; the fields have its names. See `from_dict`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    swa_num_attention_heads: int
    swa_num_key_value_heads: int
    swa_head_dim: int
    swa_v_head_dim: int
    hybrid_layer_pattern: tuple[int, ...]  # 1 = sliding, 0 = global
    moe_layer_freq: tuple[int, ...]  # 1 = experts, 0 = dense
    sliding_window_size: int
    partial_rotary_factor: float
    rope_theta: float
    swa_rope_theta: float
    n_routed_experts: int
    num_experts_per_tok: int
    layernorm_epsilon: float
    max_position_embeddings: int
    add_swa_attention_sink_bias: bool
    add_full_attention_sink_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float | None = None  # None means 1
    attention_value_scale: float | None = None  # None means 1
    window_keys: int | None = None  # ours: keys a sliding query sees, itself included; None: sliding_window_size + 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """The arguments of a config.json; keys that do not change the computation are ignored.

        Raises FormatError naming the field, what was found and what is expected.
        """
        if not isinstance(config, Mapping):
            raise FormatError(f"config.json: a JSON object expected, {type(config).__name__} found")
        _check_architecture(config)
        _check_fixed_fields(config)
        values = {}
        for field in fields(cls):
            if field.name in config:
                values[field.name] = _checked(field.name, field.type, config[field.name])
            elif field.default is MISSING:
                raise FormatError(f"config.json: {field.name} is missing; fetch the file again")
        args = cls(**values)
        _check_geometry(args)
        _check_window(args, config.get("sliding_window"))
        _check_rope(args, config)
        return args

    # Per-layer geometry

    def is_sliding(self, layer: int) -> bool:
        return self.hybrid_layer_pattern[layer] == 1

    def is_moe(self, layer: int) -> bool:
        return self.moe_layer_freq[layer] == 1

    def heads(self, layer: int) -> int:
        return self.swa_num_attention_heads if self.is_sliding(layer) else self.num_attention_heads

    def kv_heads(self, layer: int) -> int:
        return self.swa_num_key_value_heads if self.is_sliding(layer) else self.num_key_value_heads

    def head_dims(self, layer: int) -> tuple[int, int]:
        """(head dimension of queries and keys, of values)"""
        return (self.swa_head_dim, self.swa_v_head_dim) if self.is_sliding(layer) else (self.head_dim, self.v_head_dim)

    def rotary_dims(self, layer: int) -> int:
        """The number of a head's first dimensions that are rotated."""
        return int(self.partial_rotary_factor * self.head_dims(layer)[0])

    def theta(self, layer: int) -> float:
        return self.swa_rope_theta if self.is_sliding(layer) else self.rope_theta

    def has_sinks(self, layer: int) -> bool:
        return self.add_swa_attention_sink_bias if self.is_sliding(layer) else self.add_full_attention_sink_bias

    @property
    def window(self) -> int:
        """Keys that a query of a sliding layer sees, itself included.

        SGLang and transformers let it see `sliding_window_size` previous keys and its own.
        """
        return self.sliding_window_size + 1 if self.window_keys is None else self.window_keys

    @property
    def value_scale(self) -> float:
        return 1.0 if self.attention_value_scale is None else self.attention_value_scale

    @property
    def router_scale(self) -> float:
        return 1.0 if self.routed_scaling_factor is None else self.routed_scaling_factor

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe(layer))


def _check_architecture(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        raise FormatError(f"config.json: model_type {model_type!r} is another model; {SUPPORTED}")
    architectures = config.get("architectures")
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise FormatError(f"config.json: architectures {architectures!r} is another model; {SUPPORTED}")


def _check_fixed_fields(config: Mapping[str, Any]) -> None:
    for name, known in FIXED_FIELDS.items():
        # `in` would accept 1 for True and 0 for False.
        if name in config and not any(config[name] == value and type(config[name]) is type(value) for value in known):
            expected = " or ".join("null" if value is None else repr(value) for value in known)
            raise FormatError(f"config.json: {name} is {config[name]!r}, {expected} expected: it changes the model")


def _checked(name: str, kind: Any, value: Any) -> Any:
    """The value of one field, converted to its annotation. Raises FormatError where the annotation excludes it."""
    kind = str(getattr(kind, "__name__", kind)) if isinstance(kind, type) else str(kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None and kind.endswith("None"):
        return None
    if kind == "str":
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise FormatError(f"config.json: {name} is {value!r}, true or false expected")
        return value
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple) or any(isinstance(v, bool) or v not in (0, 1) for v in value):
            raise FormatError(f"config.json: {name} is not a list of 0 and 1")
        return tuple(int(v) for v in value)
    if kind.startswith("int"):
        if not number or int(value) != value or not 1 <= value < SIZE_LIMIT:
            raise FormatError(f"config.json: {name} is {value!r}, a whole number from 1 to {SIZE_LIMIT - 1} expected")
        return int(value)
    if not number or not 0 < value < float("inf"):
        raise FormatError(f"config.json: {name} is {value!r}, a positive number expected")
    return float(value)


def _check_geometry(args: ModelArgs) -> None:
    for name in ("hybrid_layer_pattern", "moe_layer_freq"):
        length = len(getattr(args, name))
        if length != args.num_hidden_layers:
            raise FormatError(
                f"config.json: {name} has {length} entries, one for each of num_hidden_layers = "
                f"{args.num_hidden_layers} expected"
            )
    if args.num_experts_per_tok > args.n_routed_experts:
        raise FormatError(
            f"config.json: num_experts_per_tok is {args.num_experts_per_tok}, "
            f"at most n_routed_experts = {args.n_routed_experts} expected"
        )
    for prefix in ("", "swa_"):
        heads, kv_heads = getattr(args, f"{prefix}num_attention_heads"), getattr(args, f"{prefix}num_key_value_heads")
        if heads % kv_heads:
            raise FormatError(
                f"config.json: {prefix}num_attention_heads {heads} is no multiple of "
                f"{prefix}num_key_value_heads {kv_heads}"
            )
        head_dim = getattr(args, f"{prefix}head_dim")
        rotary = int(args.partial_rotary_factor * head_dim)
        if not 2 <= rotary <= head_dim or rotary % 2:
            raise FormatError(
                f"config.json: partial_rotary_factor {args.partial_rotary_factor} of {prefix}head_dim {head_dim} "
                f"rotates {rotary} dimensions, an even number from 2 to {head_dim} expected"
            )


def _check_window(args: ModelArgs, sliding_window: Any) -> None:
    size = args.sliding_window_size
    # transformers writes the number of keys seen, the query's own included, under this name.
    if sliding_window not in (None, size, size + 1):
        raise FormatError(
            f"config.json: sliding_window is {sliding_window!r}, sliding_window_size is {size}: they disagree"
        )


def _check_rope(args: ModelArgs, config: Mapping[str, Any]) -> None:
    """Raises FormatError for scaled rope, in `rope_scaling` or in transformers' `rope_parameters`."""
    scaling = config.get("rope_scaling")
    if not _is_default_rope(scaling):
        raise FormatError(f"config.json: rope_scaling is {scaling!r}, null expected: it changes the model")
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise FormatError(f"config.json: rope_parameters is {parameters!r}, an object expected")
    wanted = {"full_attention": args.rope_theta, "sliding_attention": args.swa_rope_theta}
    for kind, theta in wanted.items():
        found = parameters.get(kind)
        if found is None:
            continue
        if not _is_default_rope(found) or found.get("rope_theta", theta) != theta:
            raise FormatError(f"config.json: rope_parameters.{kind} is {found!r}, unscaled with theta {theta} expected")


def _is_default_rope(value: Any) -> bool:
    if value is None or value == {}:
        return True
    return isinstance(value, Mapping) and value.get("rope_type", value.get("type", "default")) == "default"
