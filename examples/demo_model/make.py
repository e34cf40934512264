"""Makes the demo checkpoint from nothing: tokenizer, training, export, held-out file, evaluation.

    python examples/demo_model/make.py

Needs `pip install torch` beside the package. Interrupted, it goes on from its last save when started again. Results go
to --to, which is the checkpoint that the package ships unless another folder is named.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import card
import export
import heldout
import tokenizer
import train

from mlx_mimo.convert import convert_checkpoint

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "mlx_mimo" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder for the state of the training")
    parser.add_argument("--to", type=Path, default=DEMO, help="folder for checkpoint/ and heldout.jsonl")
    parser.add_argument("--steps", type=int, default=train.STEPS)
    arguments = parser.parse_args()
    train.keep_memory()
    vocabulary = arguments.work / "tokenizer"
    if not (vocabulary / "tokenizer.json").exists():
        tokenizer.build(vocabulary)
    train.train(arguments.work, arguments.steps)
    export.export(arguments.work / "train.pt", vocabulary, arguments.to / "checkpoint")
    heldout.write(arguments.to / "heldout.jsonl")
    converted = arguments.work / "4bit"
    shutil.rmtree(converted, ignore_errors=True)
    convert_checkpoint(arguments.to / "checkpoint", converted, recipe="4bit")
    reference = evaluate(arguments.to, "--reference", "--model", arguments.to / "checkpoint")
    after = evaluate(arguments.to, "--model", converted)
    card.write(arguments.to / "README.md", reference, after, card.training_text(arguments.work / "log.jsonl"))
    print((arguments.to / "README.md").read_text())


def evaluate(to: Path, *flags) -> dict:
    command = [sys.executable, str(HERE / "evaluate.py"), "--json", "--data", str(to / "heldout.jsonl")]
    done = subprocess.run([*command, *map(str, flags)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
