"""How long `mlx_mimo doctor` and `mlx_mimo plan` take at the released model's size: 109,000 tensors in 51 files.

    python examples/measure/doctor_time.py [--repeats 5]

It writes the headers of the released model at 4 bits into the temporary folder, with holes for the weights: 177 GB by
their sizes that take 20 MB of disk, where the file system knows holes (most do). Then it starts each command a few
times and prints the shortest time, from start to end, and the processor time of that run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlx_mimo.checkpoint import shapes
from mlx_mimo.checkpoint.layout import layout_of
from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config import released
from mlx_mimo.convert import manifest


def write_release(directory: Path, recipe: str = "4bit") -> None:
    """Writes the converted release as sparse files: real headers, tensors of holes."""
    config = released.CONFIG
    wanted = shapes.trunk_shapes(config)
    for layer in shapes.moe_layers(config):
        wanted += shapes.expert_shapes(config, layer)
    layout = layout_of(config, [shape.name for shape in wanted], named(recipe))
    directory.mkdir()
    for output in layout.files:
        with open(directory / output.name, "wb") as file:
            file.write(output.header)
            file.truncate(len(output.header) + sum(stored.nbytes for item in output.items for stored in item.stored))
    (directory / "model.safetensors.index.json").write_bytes(manifest.dump(manifest.index_json(layout)))
    (directory / "config.json").write_bytes(manifest.dump(manifest.config_json(layout)))


def times(command: list[str], repeats: int) -> tuple[float, float]:
    """Returns (seconds, processor seconds) of the fastest run."""
    found = []
    for _ in range(repeats):
        before, began = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, check=False)
        seconds, after = time.perf_counter() - began, os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        found.append((seconds, used))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="(default: 5)")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="mlx-mimo-doctor-") as folder:
        directory = Path(folder) / "release"
        write_release(directory)
        for words in (["doctor", str(directory)], ["doctor"], ["plan", "--memory", "64GB"], ["plan", "--all"]):
            seconds, used = times([f"mlx_mimo.{words[0]}", *words[1:]], repeats)
            said = " ".join("DIR" if word == str(directory) else word for word in words)
            print(f"mlx_mimo {said:<22} {seconds:.2f} s, {used:.2f} s of processor time")


if __name__ == "__main__":
    main()
