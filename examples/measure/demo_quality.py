"""What quality each recipe costs: `python examples/measure/demo_quality.py [--recipes 8bit,4bit,2bit] [--limit N]`.

Converts the embedded demo checkpoint with every recipe and prints a Markdown table: bits per weight, exact match on the
held-out questions, and the KL divergence from the unquantised (bf16) model on the tokens of their right answers.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlx_mimo import load
from mlx_mimo.checkpoint.recipe import NAMES
from mlx_mimo.compare.quality import Comparer, predictions
from mlx_mimo.convert import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "mlx_mimo" / "demo"
sys.path.insert(0, str(ROOT / "examples" / "demo_model"))

import evaluate  # noqa: E402


@dataclass(frozen=True)
class Text:
    """A question without tools and its answer, as token ids; the answer begins at `start`."""

    ids: list[int]
    start: int

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start :]


def texts(tokenizer, items: list[dict]) -> list[Text]:
    def encode(messages: list[dict], asked: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asked, enable_thinking=False
        )
        return tokenizer.encode(text, add_special_tokens=False)

    out = []
    for item in items:
        if item["tools"] is None:
            ids = encode([*item["messages"], {"role": "assistant", "content": item["answer"]}], False)
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(ids, encode(item["messages"], True)))
            out.append(Text(ids, len(list(shared))))
    return out


def logprobs(directory: Path, items: list[dict]) -> tuple[list[np.ndarray], list[Text]]:
    """Returns log probabilities of the answers' tokens, and the texts. The questions' tokens are left out: all begin
    alike, and the same uncertain tokens would be counted once for each question."""
    model, tokenizer = load(directory, expert_memory="all")
    found, rows = texts(tokenizer, items), []
    try:
        predictions(model, [text.ids for text in found], lambda row: rows.append(row[found[len(rows)].start - 1 :]))
    finally:
        model.residency.close()
    return rows, found


def spread(items: list[dict], limit: int) -> list[dict]:
    """Returns `limit` different items at equal distances, or all of them if there are fewer."""
    limit = min(limit, len(items))
    return [items[i * len(items) // limit] for i in range(limit)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(NAMES))
    parser.add_argument("--limit", type=int, help="questions, spread evenly over the held-out file (default: all)")
    options = parser.parse_args()
    items = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    items = spread(items, options.limit or len(items))
    print("| recipe | bits per expert weight | exact match | mean KL | 99 % KL | top-1 agreement |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        convert_checkpoint(DEMO / "checkpoint", original, recipe="bf16", progress=False)
        wanted, found = logprobs(original, items)
        for recipe in tqdm(options.recipes.split(","), desc="recipes"):
            directory = Path(folder) / recipe
            convert_checkpoint(DEMO / "checkpoint", directory, recipe=recipe, progress=False)
            comparer = Comparer()
            for a, b, text in zip(wanted, logprobs(directory, items)[0], found):
                comparer.add(a, b, text.answer)
            result = comparer.result()
            answers = evaluate.run_mlx(str(directory), items)
            right = sum(map(evaluate.is_right, items, answers))
            print(
                f"| {recipe} | {bits_per_weight(directory):.2f} | {right}/{len(items)} = {right / len(items):.1%} | "
                f"{result.kl_mean:.5f} | {result.kl_99:.4f} | {result.top1_agreement:.2%} |",
                flush=True,
            )


def bits_per_weight(directory: Path) -> float:
    """Returns the experts' stored bits over their weights."""
    config = json.loads((directory / "config.json").read_text())
    experts = sum(config["moe_layer_freq"]) * config["n_routed_experts"]
    weights = experts * 3 * config["hidden_size"] * config["moe_intermediate_size"]
    stored = 0
    for path in directory.glob("model-experts-*.safetensors"):
        with open(path, "rb") as file:
            stored += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return 8 * stored / weights


if __name__ == "__main__":
    main()
