"""Writes the checkpoint's card from an evaluation and the training log."""

import json
from pathlib import Path

import network

CARD = """# The demo checkpoint

A small MiMo-V2-Flash of {millions:.1f} million parameters (and {mtp_millions:.1f} in three MTP layers), trained on
made-up questions and stored as the release stores its own: FP8 e4m3 in 128×128 blocks, the K/V scale chain of the
global layers, the same names and files. It exists so that everything here can be tried, and tested, end to end on any
machine. It was taught sums up to 99 + 99, sorting of three or four numbers, counting the letters of a word, some
capitals and other small facts in English and Chinese, unit conversion, and how to call the tools it is given; each with
thinking off and on. It knows nothing else.

| | |
|---|---|
| layers | {layers}: global {globals}; sliding {slidings}, window {window} |
| experts | layer 0 dense; then {experts} a layer, {top} for a token |
| hidden, heads | {hidden}; {heads} query heads of 192/128; 2 KV heads in global layers, 4 in sliding ones |
| vocabulary | {vocabulary} rows, byte-level BPE; MiMo's special tokens and chat format |
| generation | greedy |

## Exact match on `heldout.jsonl`

The FP8 checkpoint read chain-correct by transformers, float32, greedy (`python examples/demo_model/evaluate.py
--reference`); in the last column its 4-bit conversion in MLX (`python examples/demo_model/evaluate.py`). No question of
the file occurs in training.

| domain | thinking off | thinking on | both | both, 4 bits |
|---|---|---|---|---|
{rows}

Share of answer tokens that each MTP layer foretells (layer k at position t: token t+2+k): {mtp}.

## Training

{training}

Trained by `examples/demo_model/`; its README says how to make it again.
"""


def _cell(cells: dict, name: str) -> str:
    right, items = cells[name]["right"], cells[name]["items"]
    return f"{right}/{items} = {right / items:.1%}"


def training_text(log: Path) -> str:
    """Returns one sentence about the training, from the last line of its log."""
    last = json.loads(log.read_text().splitlines()[-1])
    return (
        f"{last['step']:,} steps in {last['seconds'] / 60:.0f} minutes on {last['machine']}; loss of the answers' "
        f"tokens at the end {last['loss']:.3f}."
    )


def write(path: Path, evaluation: dict, converted: dict, training: str) -> None:
    """Takes what evaluate.py --json prints: `evaluation` with --reference, `converted` for the 4-bit directory."""
    cells, after = evaluation["exact_match"], converted["exact_match"]
    domains = sorted((d for d in cells if " " not in d), key=lambda d: (d == "all", d))
    columns = [(cells, " off"), (cells, " on"), (cells, ""), (after, "")]
    rows = [f"| {d} | " + " | ".join(_cell(found, d + mode) for found, mode in columns) + " |" for d in domains]
    net, cfg = network.Network(), network.config()
    path.write_text(
        CARD.format(
            millions=sum(p.numel() for p in net.main.parameters()) / 1e6,
            mtp_millions=sum(p.numel() for p in net.mtp.parameters()) / 1e6,
            layers=cfg.num_hidden_layers,
            globals=", ".join(str(i) for i, p in enumerate(network.PATTERN) if not p),
            slidings=", ".join(str(i) for i, p in enumerate(network.PATTERN) if p),
            window=network.WINDOW,
            experts=cfg.n_routed_experts,
            top=cfg.num_experts_per_tok,
            hidden=cfg.hidden_size,
            heads=cfg.num_attention_heads,
            vocabulary=cfg.vocab_size,
            rows="\n".join(rows),
            mtp=", ".join(f"layer {k} {share:.1%}" for k, share in enumerate(evaluation["mtp"])),
            training=training,
        )
    )
