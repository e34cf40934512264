"""Builds the tokenizer: byte-level BPE in Qwen2's form, with merges chosen so that letters can be counted.

Merges run from the left end of frequent pieces of text (` capital`, `What`), so a token longer than a byte almost
always stands at the beginning of a piece; the words whose letters are counted stay mostly single letters.
"""

import json
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
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer():
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merges(room: int) -> list[tuple[str, str]]:
    """At most `room` merges: the pieces that save most tokens for each merge they need."""
    rng, counts, pre = Random(7), Counter(), _pre_tokenizer()
    for _ in range(12_000):
        for text, _ in dialogue.draw_dialogue(rng):
            for tag in SPECIAL + ADDED:
                text = text.replace(tag, "\n")
            counts.update(piece for piece, _ in pre.pre_tokenize_str(text))
    letters = {chr(c) for c in range(ord("a"), ord("z") + 1)}
    counted = set(facts.WORDS)
    chosen: dict[str, tuple[str, str]] = {}
    chains = {}
    for piece, n in counts.items():
        word = piece.removeprefix("Ġ")
        if word in counted or n < 20:
            continue
        if any(ord(c) > 0x7F and c not in "ĠĊ" for c in piece):
            # Chinese: one token a character, whatever stands before it
            for i in range(0, len(piece) - 2, 3):
                character = piece[i : i + 3]
                chains.setdefault(character, 0)
                chains[character] += 2 * n
        else:
            chains[piece] = chains.get(piece, 0) + n * (len(piece) - 1)
    while chains and len(chosen) < room:

        def worth(piece: str) -> float:
            return chains[piece] / max(1, sum(piece[:i] not in chosen for i in range(2, len(piece) + 1)))

        best = max(chains, key=worth)
        saved = chains.pop(best)
        missing = [best[:i] for i in range(2, len(best) + 1) if best[:i] not in chosen]
        if saved and len(chosen) + len(missing) <= room:
            chosen.update({m: (m[:-1], m[-1]) for m in missing})
    # Pieces that begin with a bare letter come last, lest they break up those that begin with a space.
    return sorted(chosen.values(), key=lambda pair: (pair[0][0] in letters, len(pair[0])))


def build(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template's copy into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(VOCABULARY - len(alphabet) - len(SPECIAL) - len(ADDED) - 7)
    tokens = alphabet + [a + b for a, b in merges]
    assert len(set(tokens)) == len(tokens)
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
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
