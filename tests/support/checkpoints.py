"""Tiny checkpoints in the released format of MiMo-V2-Flash, written with NumPy alone.

`write_checkpoint` stores what the release stores: the same names, files and dtypes, FP8 e4m3 codes with one scale a
128×128 block, and in global layers the K/V scale chain. It returns the weights a correct reader must see.

Every processor must make the same bits, for golden files hold what a reference computes from them. So a value comes
from drawn integers and from what IEEE 754 rounds in one way: sums of two, products, quotients, square roots, powers of
two by ldexp. A power, an exponential or a logarithm has other last bits with other instructions.
"""

import json
import math
from pathlib import Path

import numpy as np

BLOCK = 128
HEAD_DIM, V_HEAD_DIM = 192, 128
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
END_TOKENS = slice(256, 259, 2)  # <|endoftext|> and <|im_end|>, which end an answer
VOCAB_SIZE = 320  # 256 bytes, the special tokens, and rows without a token as the release has them
MTP_LAYERS = 3


def tiny_config(**overrides) -> dict:
    """A config.json with the released file's fields: 4 layers, both attention kinds, layer 0 dense, 8 experts."""
    config = {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "v_head_dim": V_HEAD_DIM,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": HEAD_DIM,
        "swa_v_head_dim": V_HEAD_DIM,
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "sliding_window": 16,
        "sliding_window_size": 16,
        "attention_chunk_size": 16,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.707,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5000000,
        "swa_rope_theta": 10000,
        "n_routed_experts": 8,
        "n_shared_experts": None,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "layernorm_epsilon": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    config |= overrides
    ignored = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(config["num_hidden_layers"])]
    config.setdefault(
        "quantization_config",
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "ignored_layers": [*ignored, "model.decoder.self_attn.o_proj"],
        },
    )
    return config


# FP8 and bfloat16


def _e4m3_table() -> np.ndarray:
    """The value of each of the 256 codes; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    magnitude[code & 0x7F == 0x7F] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


E4M3 = _e4m3_table()


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest code of each value, ties to even, beyond ±448 saturated."""
    positive = E4M3[:127]
    magnitude = np.minimum(np.abs(values), 448).astype(np.float32)
    low = np.clip(np.searchsorted(positive, magnitude, side="right") - 1, 0, 125)
    below, above = magnitude - positive[low], positive[low + 1] - magnitude
    up = (above < below) | ((above == below) & (low & 1 == 1))
    return ((low + up) | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def plain_rows(rows: int) -> np.ndarray:
    """(rows,) row of the scale for each row of the weight, as every aligned tensor has it."""
    return np.arange(rows) // BLOCK


def chain_rows(kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale rows of K and V in a global layer: per head the 320 rows [K | V] are one chain of 128-row blocks, whose
    scales are K's two and V's one. The returned V rows below 0 stand for row ~r of K's scale.
    """
    k_rows, v_rows = [], []
    for head in range(kv_heads):
        cells = [2 * head, 2 * head + 1, head]
        for row in range(HEAD_DIM + V_HEAD_DIM):
            block = row // BLOCK
            if row < HEAD_DIM:
                k_rows.append(cells[block])
            else:
                v_rows.append(~cells[1] if block == 1 else cells[2])
    return np.array(k_rows), np.array(v_rows)


def quantise(weight: np.ndarray, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix, each cell scaled so that its largest magnitude becomes 448."""
    rows = plain_rows(len(weight)) if rows is None else rows
    columns = np.arange(weight.shape[1]) // BLOCK
    amax = np.zeros((rows.max() + 1, columns.max() + 1), np.float32)
    np.maximum.at(amax, (rows[:, None], columns[None, :]), np.abs(weight))
    scale = (np.where(amax == 0, 1, amax) / 448).astype(np.float32)
    return encode_e4m3(weight / scale[rows][:, columns]), scale


def _quantise_chain(k: np.ndarray, v: np.ndarray, kv_heads: int):
    """((codes, scale) of K, (codes, scale) of V) as the export wrote global layers."""
    k_rows, v_rows = chain_rows(kv_heads)
    # One matrix holds both, its scale rows being K's and then V's.
    rows = np.concatenate([k_rows, np.where(v_rows < 0, ~v_rows, v_rows + 2 * kv_heads)])
    codes, scale = quantise(np.concatenate([k, v]), rows)
    return (codes[: len(k)], scale[: 2 * kv_heads]), (codes[len(k) :], scale[2 * kv_heads :]), scale[rows]


def dequantise(codes: np.ndarray, scale: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    rows = plain_rows(len(codes)) if rows is None else rows
    return E4M3[codes] * scale[rows][:, np.arange(codes.shape[1]) // BLOCK]


# Tensors


class _Tensors:
    """Collects tensors as stored, {name: (dtype, array)}, and the weights they stand for."""

    def __init__(self, seed: int, hidden: int):
        self.rng = np.random.default_rng(seed)
        self.hidden = hidden
        self.stored: dict[str, tuple[str, np.ndarray]] = {}
        self.weights: dict[str, np.ndarray] = {}

    def normal(self, *shape: int, std: float | None = None) -> np.ndarray:
        """Random weights; a matrix keeps the size of what it multiplies unless `std` says."""
        std = 1 / math.sqrt(shape[-1]) if std is None else std
        # Twelve integers over a width of 4096, each with a mean of -0.5: their sum is nearly normal and its standard
        # deviation that width.
        total = self.rng.integers(-2048, 2048, (12, *shape), np.int16).sum(0, np.int32) + 6
        return (np.ldexp(total, -12) * std).astype(np.float32)

    def sizes(self, rows: int, each: int) -> np.ndarray:
        """(rows, 1) factors from 1/2 to 15/8, one for every `each` rows."""
        shape = rows // each, 1
        factors = np.ldexp(self.rng.integers(8, 16, shape), self.rng.integers(-4, -2, shape))
        return factors.repeat(each, 0).astype(np.float32)

    def f32(self, name: str, values: np.ndarray) -> None:
        self.stored[name] = ("F32", values)
        self.weights[name] = values

    def bf16(self, name: str, values: np.ndarray) -> None:
        bits = bfloat16_bits(values)
        self.stored[name] = ("BF16", bits)
        self.weights[name] = bfloat16_values(bits)

    def norm(self, name: str) -> None:
        self.bf16(name, 1 + self.normal(self.hidden, std=0.1))

    def fp8(self, name: str, values: np.ndarray) -> None:
        codes, scale = quantise(values)
        self._store_fp8(name, codes, scale)
        self.weights[name] = dequantise(codes, scale)

    def _store_fp8(self, name: str, codes: np.ndarray, scale: np.ndarray) -> None:
        self.stored[name] = ("F8_E4M3", codes)
        self.stored[f"{name}_scale_inv"] = ("F32", scale)

    def attention(self, prefix: str, heads: int, kv_heads: int, sinks: bool, chain: bool) -> None:
        hidden = self.hidden
        # Queries large enough that attention is far from uniform; V six times smaller than K, so that a misread
        # scale shows.
        self.fp8(f"{prefix}.q_proj.weight", self.normal(heads * HEAD_DIM, hidden) * 2)
        k = self.normal(kv_heads * HEAD_DIM, hidden)
        v = self.normal(kv_heads * V_HEAD_DIM, hidden) / 6
        # Rows of different sizes: without them neighbouring scales are nearly equal and a wrong map hardly shows.
        k *= self.sizes(len(k), each=64)
        if chain:
            (k_codes, k_scale), (v_codes, v_scale), scales = _quantise_chain(k, v, kv_heads)
            self._store_fp8(f"{prefix}.k_proj.weight", k_codes, k_scale)
            self._store_fp8(f"{prefix}.v_proj.weight", v_codes, v_scale)
            scales = scales[:, np.arange(hidden) // BLOCK]
            self.weights[f"{prefix}.k_proj.weight"] = E4M3[k_codes] * scales[: len(k)]
            self.weights[f"{prefix}.v_proj.weight"] = E4M3[v_codes] * scales[len(k) :]
        else:
            self.fp8(f"{prefix}.k_proj.weight", k)
            self.fp8(f"{prefix}.v_proj.weight", v)
        self.bf16(f"{prefix}.o_proj.weight", self.normal(hidden, heads * V_HEAD_DIM) * 3)
        if sinks:
            self.bf16(f"{prefix}.attention_sink_bias", self.normal(heads, std=1.0))

    def mlp(self, prefix: str, intermediate: int) -> None:
        self.fp8(f"{prefix}.gate_proj.weight", self.normal(intermediate, self.hidden))
        self.fp8(f"{prefix}.up_proj.weight", self.normal(intermediate, self.hidden))
        self.fp8(f"{prefix}.down_proj.weight", self.normal(self.hidden, intermediate))


def make_tensors(config: dict, seed: int = 0, mtp: bool = True, kv_scales: str = "chain"):
    """({name: (dtype, array as stored)}, {name: float32 weight}) of a random model; codes are uint8, BF16 uint16."""
    if kv_scales not in ("chain", "flat"):
        raise ValueError(f"kv_scales {kv_scales!r}: chain or flat expected")
    if (config["head_dim"], config["v_head_dim"]) != (HEAD_DIM, V_HEAD_DIM):
        raise ValueError("the released format is one of heads of 192 and 128")
    hidden = config["hidden_size"]
    tensors = _Tensors(seed, hidden)
    tensors.bf16("model.embed_tokens.weight", tensors.normal(config["vocab_size"], hidden, std=1.0))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sliding = config["hybrid_layer_pattern"][layer] == 1
        tensors.norm(f"{prefix}.input_layernorm.weight")
        tensors.norm(f"{prefix}.post_attention_layernorm.weight")
        tensors.attention(
            f"{prefix}.self_attn",
            config["swa_num_attention_heads" if sliding else "num_attention_heads"],
            config["swa_num_key_value_heads" if sliding else "num_key_value_heads"],
            sinks=config["add_swa_attention_sink_bias" if sliding else "add_full_attention_sink_bias"],
            chain=not sliding and kv_scales == "chain",
        )
        if config["moe_layer_freq"][layer] == 0:
            tensors.mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        experts = config["n_routed_experts"]
        tensors.f32(f"{prefix}.mlp.gate.weight", tensors.normal(experts, hidden))
        tensors.f32(f"{prefix}.mlp.gate.e_score_correction_bias", tensors.normal(experts, std=0.1))
        for expert in range(experts):
            tensors.mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
    tensors.norm("model.norm.weight")
    head = tensors.normal(config["vocab_size"], hidden)
    head[END_TOKENS] /= 64  # else it would be chance which answers end at once
    tensors.bf16("lm_head.weight", head)
    for layer in range(MTP_LAYERS if mtp else 0):
        prefix = f"model.mtp.layers.{layer}"
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            tensors.norm(f"{prefix}.{norm}.weight")
        tensors.bf16(f"{prefix}.eh_proj.weight", tensors.normal(hidden, 2 * hidden))
        heads, kv_heads = config["swa_num_attention_heads"], config["swa_num_key_value_heads"]
        sinks = config["add_swa_attention_sink_bias"]
        tensors.attention(f"{prefix}.self_attn", heads, kv_heads, sinks=sinks, chain=False)
        tensors.mlp(f"{prefix}.mlp", config["intermediate_size"])
    return tensors.stored, tensors.weights


def random_weights(config: dict, seed: int = 0, **options) -> dict[str, np.ndarray]:
    """{HF name: float32 weight} of the checkpoint that `write_checkpoint` would write."""
    return make_tensors(config, seed, **options)[1]


# Files


def file_of(name: str) -> str:
    """The released file that holds a tensor."""
    parts = name.split(".")
    if name.startswith("model.mtp."):
        stem = "model_mtp"
    elif name.startswith("model.layers."):
        stem = f"model_{parts[2]}"
        if ".experts." in name:
            stem += "_linear_fc2" if ".down_proj." in name else "_linear_fc1"
    else:
        stem = "model_embedding" if "embed_tokens" in name else "model_final"
    return f"{stem}.safetensors"


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Writes {name: (dtype, array)}; by hand, since NumPy has neither F8 nor BF16."""
    header, offset = {}, 0
    for name, (dtype, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_checkpoint(
    directory: Path,
    config: dict,
    seed: int = 0,
    mtp: bool = True,
    kv_scales: str = "chain",
    scattered_scales: bool = False,
) -> dict[str, np.ndarray]:
    """Writes an FP8 checkpoint with tokenizer into `directory`; returns {HF name: float32 weight}.

    With `scattered_scales` the scales of model_1 lie in model_final: a weight and its scale may lie apart.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored, weights = make_tensors(config, seed, mtp, kv_scales)
    files: dict[str, dict] = {}
    for name, tensor in stored.items():
        file = file_of(name)
        if scattered_scales and file == "model_1.safetensors" and name.endswith("_scale_inv"):
            file = "model_final.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, tensors in files.items():
        write_safetensors(directory / file, tensors)
    index = {
        "metadata": {"total_size": sum(array.nbytes for _, array in stored.values())},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory)
    return weights


# Tokenizer

CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\n"
    "You are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>{%- endif -%}"
    "{%- for message in messages -%}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n"
    "{%- if not enable_thinking -%}<think></think>{%- endif -%}{%- endif -%}"
)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges, MiMo's special tokens, and a chat template of its plain turns."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=t.startswith("<|"), normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    pad = tokenizer.token_to_id("<|endoftext|>")
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [pad, end]}, indent=2))
