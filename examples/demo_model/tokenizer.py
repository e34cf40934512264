"""Builds the tokenizer: byte-level BPE in Qwen2's form, whose tokens are single bytes and whole frequent pieces.

A piece that is no token as a whole is spelt out byte by byte: BPE looks pieces up first (`ignore_merges`, as in Llama
3's tokenizer), and no merges lead to parts of words. So a word whose letters are to be counted shows every one of its
letters, and no room is spent on beginnings of words.
"""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import dialogue
import facts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{Han}|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer():
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pieces(room: int) -> list[str]:
    """The `room` pieces that save most tokens, most useful first."""
    rng, counts, pre = Random(7), Counter(), _pre_tokenizer()
    tags = re.compile("|".join(map(re.escape, SPECIAL + ADDED)))
    for _ in range(12_000):
        for text, _ in dialogue.draw_dialogue(rng):
            for part in tags.split(text):
                counts.update(piece for piece, _ in pre.pre_tokenize_str(part))
    saved = {
        piece: n * (len(piece) - 1)
        for piece, n in counts.items()
        if len(piece) > 1 and n >= 5 and piece.removeprefix("Ġ") not in facts.WORDS
    }
    return sorted(saved, key=lambda piece: (-saved[piece], piece))[:room]


def build(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template's copy into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + _pieces(VOCABULARY - len(alphabet) - len(SPECIAL) - len(ADDED) - 7)
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    template = Path(__file__).with_name("chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
