"""How long `load` takes over the files of a released model's size: 47 layers of 256 experts, 109,000 tensors.

    python examples/measure/load_time.py [--repeats 5] [--directory DIR]

It writes a converted directory with the released model's layers and experts and a small width, so that its headers are
as long as the real ones while its weights, holes in the files, are zero and load at once. Then it starts a process
for each stage a few times and prints the shortest time of each, without the start of Python and its imports, and the
processor time of that run. With --directory it keeps the directory there, or uses the one that is there.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_mimo.checkpoint import shapes
from mlx_mimo.checkpoint.index import INDEX
from mlx_mimo.checkpoint.layout import layout_of
from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config import released
from mlx_mimo.convert import manifest
from mlx_mimo.demo import CHECKPOINT

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "vocab_size": 1024,
    "num_attention_heads": 8,
    "swa_num_attention_heads": 8,
    "head_dim": 24,
    "v_head_dim": 16,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
EXPERT_MEMORY = 10_000_000  # bytes: a few hundred slots, so that `load` reads no expert
# One program a stage: it prints the seconds and the processor seconds of the stage alone.
PROGRAM = """
import json, sys, time
from mlx_mimo import load
from mlx_mimo.checkpoint.directory import Directory
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.planning.budget import measure

path = sys.argv[1]
directory = Directory(path)
args = ModelArgs.from_dict(directory.config)
{before}
began, used = time.perf_counter(), time.process_time()
{stage}
print(json.dumps([time.perf_counter() - began, time.process_time() - used]))
"""
STAGES = {  # name: what comes before it, the stage
    "read and check headers": ("", "directory.check()"),
    "check expert records": ("directory.check()", "directory.expert_files"),
    "count bytes": ("directory.check(); directory.expert_files", "measure(directory, args, 32768, 2048, 2, 2)"),
    "load in all": ("", f"loaded = load(path, expert_memory={EXPERT_MEMORY})"),
}


def write_directory(directory: Path) -> None:
    """A converted directory of zeros: every header true, every tensor a hole in its file."""
    config = released.CONFIG | NARROW
    wanted = shapes.trunk_shapes(config)
    for layer in shapes.moe_layers(config):
        wanted += shapes.expert_shapes(config, layer)
    layout = layout_of(config, [shape.name for shape in wanted], named("4bit"))
    directory.mkdir(parents=True)
    for output in layout.files:
        with open(directory / output.name, "wb") as file:
            file.write(output.header)
            file.truncate(len(output.header) + output.data_bytes)
    (directory / INDEX).write_bytes(manifest.dump(manifest.index_json(layout)))
    for name in TOKENIZER:
        shutil.copy(CHECKPOINT / name, directory / name)
    (directory / "config.json").write_bytes(manifest.dump(manifest.config_json(layout)))


def shortest(before: str, stage: str, directory: Path, repeats: int) -> tuple[float, float]:
    """(seconds, processor seconds) of the shortest of some runs."""
    command = [sys.executable, "-c", PROGRAM.format(before=before, stage=stage), str(directory)]
    runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(repeats)]
    for run in runs:
        if run.returncode:
            sys.exit(run.stderr)
    seconds, used = min(json.loads(run.stdout.splitlines()[-1]) for run in runs)
    return seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="(default: 5)")
    parser.add_argument("--directory", metavar="DIR", type=Path, help="(default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlx-mimo-load-") as folder:
        directory = args.directory or Path(folder) / "model"
        if not directory.exists():
            write_directory(directory)
        for name, (before, stage) in STAGES.items():
            seconds, used = shortest(before, stage, directory, args.repeats)
            print(f"{name:<24} {seconds:6.2f} s, {used:6.2f} s of processor time")


if __name__ == "__main__":
    main()
