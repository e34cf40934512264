"""From a Hub repo, or a directory, to a converted directory: what it will take first, then the conversion.

`python examples/convert_from_hub.py [REPO_OR_DIR] [TARGET] [RECIPE]`; without arguments it converts the demo model that
comes with the package. MiMo-V2-Flash needs about 313 GB for the download and 178 GB for the result at 4 bits.
"""

import sys
from pathlib import Path

from mlx_mimo.checkpoint.directory import read_config
from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.convert import convert_checkpoint
from mlx_mimo.demo import CHECKPOINT
from mlx_mimo.planning.budget import estimate
from mlx_mimo.units import format_size

source = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
target = Path(sys.argv[2] if len(sys.argv) > 2 else "converted")
recipe = sys.argv[3] if len(sys.argv) > 3 else "4bit"

if not Path(source).is_dir():
    from huggingface_hub import snapshot_download

    # Goes on where an interrupted download stopped.
    source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])

config = read_config(Path(source))
budget = estimate(config, named(recipe), ModelArgs.from_dict(config), 1, 1, 2, 2)
print(f"{recipe}: {format_size(budget.trunk)} of trunk, {format_size(budget.experts)} of experts")
# Run again after an interruption, it goes on with the first file that is missing.
convert_checkpoint(source, target, recipe=recipe)
print(f"converted into {target}")
