"""Speed and peak memory of the converter beside mlx_lm.convert, on a random checkpoint with experts of 2048 × 4096.

    python tests/convert/bench_convert.py [--experts 32] [--layers 2] [--recipe 4bit] [--folder /tmp]

Writes FP8 checkpoints of two sizes, the second four times the first, converts both, and the larger by mlx_lm.convert
too; prints one JSON object. Take figures on an idle machine.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import checkpoints

OURS = [sys.executable, "-m", "mlx_mimo.convert", "--quiet", "--kv-scales", "chain"]
STOCK = [sys.executable, "-m", "mlx_lm", "convert", "-q"]


def bench_config(experts: int, moe_layers: int) -> dict:
    """Experts as released and a small trunk, so that experts are nearly all bytes, as in the release."""
    return checkpoints.tiny_config(
        hidden_size=4096,
        moe_intermediate_size=2048,
        n_routed_experts=experts,
        num_hidden_layers=moe_layers + 1,
        hybrid_layer_pattern=[0] + [1] * moe_layers,
        moe_layer_freq=[0] + [1] * moe_layers,
    )


def write(directory: Path, config: dict) -> int:
    """Writes a checkpoint of random codes, file by file, and returns its bytes."""
    hidden, inner, rng = config["hidden_size"], config["moe_intermediate_size"], np.random.default_rng(0)
    small = config | {"n_routed_experts": 1, "moe_intermediate_size": 64}
    checkpoints.write_checkpoint(directory, small, mtp=False)
    for path in directory.glob("*linear_fc*"):
        path.unlink()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    names = {name: file for name, file in index["weight_map"].items() if ".experts." not in name}
    for layer in range(1, config["num_hidden_layers"]):
        path = directory / f"model_{layer}.safetensors"
        _widen_router(path, layer, config["n_routed_experts"], hidden)
        for file, projections in (("fc1", ("gate", "up")), ("fc2", ("down",))):
            tensors = {}
            for expert in range(config["n_routed_experts"]):
                for projection in projections:
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
                    shape = (hidden, inner) if projection == "down" else (inner, hidden)
                    codes = rng.normal(0x30, 8, shape).astype(np.int8).view(np.uint8) & 0x7F
                    codes[codes == 0x7F] = 0x7E
                    codes |= rng.integers(0, 2, shape, np.uint8) << 7
                    scales = np.full((shape[0] // 128, shape[1] // 128), 1e-3, np.float32)
                    tensors |= {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scales)}
            file = f"model_{layer}_linear_{file}.safetensors"
            checkpoints.write_safetensors(directory / file, tensors)
            names |= dict.fromkeys(tensors, file)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _widen_router(path: Path, layer: int, experts: int, hidden: int) -> None:
    from support.damage import load

    tensors, prefix = load(path), f"model.layers.{layer}.mlp.gate"
    rng = np.random.default_rng(layer)
    tensors[f"{prefix}.weight"] = "F32", rng.standard_normal((experts, hidden), np.float32)
    tensors[f"{prefix}.e_score_correction_bias"] = "F32", np.zeros(experts, np.float32)
    checkpoints.write_safetensors(path, tensors)


def measure(command: list[str], source: Path, target: Path) -> dict:
    """{"seconds", "peak resident memory"} of one conversion, whose output is deleted."""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--hf-path", str(source), "--mlx-path", str(target)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"{command}: {process.stderr.read().decode()}")
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    shutil.rmtree(target)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(seconds, 2), "peak_memory_bytes": peak, "written_bytes": written}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2, help="with experts, in the larger checkpoint")
    parser.add_argument("--recipe", default="4bit", choices=("4bit", "mxfp4"))
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    stock = [*STOCK, *(["--q-mode", "mxfp4"] if arguments.recipe == "mxfp4" else ["--q-bits", "4"])]
    ours = [*OURS, "--recipe", arguments.recipe]
    found = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "recipe": arguments.recipe}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        for name, experts in (("small", arguments.experts // 4), ("large", arguments.experts)):
            source = folder / name
            # Elsewhere: a child's peak begins at the memory of the process that started it.
            with multiprocessing.Pool(1) as pool:
                size = pool.apply(write, (source, bench_config(experts, arguments.layers)))
            measure(ours, source, folder / "warm") if name == "small" else None  # compiles the kernels
            found[name] = {"bytes": size, "mlx_mimo": measure(ours, source, folder / "ours")}
        found["large"]["mlx_lm"] = measure(stock, folder / "large", folder / "stock")
    large = found["large"]
    for which in ("mlx_mimo", "mlx_lm"):
        large[which]["mb_per_second"] = round(large["bytes"] / 1e6 / large[which]["seconds"], 1)
    found["times_mlx_lm"] = round(large["mlx_lm"]["seconds"] / large["mlx_mimo"]["seconds"], 2)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
