"""Exact match on the held-out file, by domain and mode.

    python examples/demo_model/evaluate.py --reference          the FP8 checkpoint in transformers, float32
    python examples/demo_model/evaluate.py --model DIRECTORY    a converted directory in MLX

With --reference the checkpoint is read chain-correct and the MTP layers are measured too.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "mlx_mimo" / "demo" / "checkpoint"
HELD_OUT = ROOT / "mlx_mimo" / "demo" / "heldout.jsonl"
MAX_TOKENS = 200


def parse_call(text: str) -> dict | None:
    """Returns the tool call in `text`, or None unless there is exactly one."""
    calls = re.findall(r"<tool_call>\n<function=([^>\n]+)>\n(.*?)</function>\n</tool_call>", text, re.S)
    if len(calls) != 1:
        return None
    name, body = calls[0]
    return {"name": name, "arguments": dict(re.findall(r"<parameter=([^>\n]+)>(.*?)</parameter>\n", body, re.S))}


def is_right(item: dict, text: str) -> bool:
    """Returns whether generated `text`, without its thoughts, is exactly what the item expects."""
    if item["mode"] == "on":
        if not text.startswith("<think>") or "</think>" not in text:
            return False
        text = text.rpartition("</think>")[2]
    text = text.removesuffix("<|im_end|>").strip()
    if item["call"]:
        return text.startswith("<tool_call>") and text.endswith("</tool_call>") and parse_call(text) == item["call"]
    return text == item["answer"]


def prompts(tokenizer, items: list[dict]) -> list[list[int]]:
    out = []
    for item in items:
        text = tokenizer.apply_chat_template(
            item["messages"],
            tools=item["tools"],
            add_generation_prompt=True,
            enable_thinking=item["mode"] == "on",
            tokenize=False,
        )
        out.append(tokenizer.encode(text, add_special_tokens=False))
    return out


# ---- the FP8 checkpoint in transformers


def read_checkpoint(folder: Path) -> dict:
    """Returns all tensors of an FP8 checkpoint in float32; K and V of global layers use the scale chain."""
    import torch
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((folder / "config.json").read_text())
    raw = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, "pt") as f:
            raw.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
    out = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        scale = raw.get(name + "_scale_inv")
        if scale is not None:
            rows = torch.arange(tensor.shape[0])
            layer = re.match(r"model\.layers\.(\d+)\.self_attn\.[kv]_proj", name)
            if layer and not config["hybrid_layer_pattern"][int(layer[1])]:
                k, v = (raw[re.sub("[kv]_proj", p + "_proj", name) + "_scale_inv"] for p in "kv")
                heads, head, value = config["num_key_value_heads"], config["head_dim"], config["v_head_dim"]
                cells = torch.cat([k.view(heads, -1, k.shape[1]), v.view(heads, -1, v.shape[1])], 1)
                own, first = (head, 0) if ".k_proj" in name else (value, head)
                by_row = cells[rows // own, (first + rows % own) // 128]
            else:
                by_row = scale[rows // 128]
            tensor = tensor.float() * by_row.repeat_interleave(128, 1)[:, : tensor.shape[1]]
        out[name] = tensor.float()
    return out


def reference_network(folder: Path):
    """The checkpoint in the torch network of network.py."""
    import network
    import torch

    net = network.Network().eval()
    tensors = read_checkpoint(folder)
    state = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            continue
        new = name.replace("attention_sink_bias", "sinks")
        new = "mtp." + new.removeprefix("model.mtp.layers.") if ".mtp." in new else "main." + new
        state[new] = tensor
    for i in range(len(network.PATTERN)):
        prefix = f"model.layers.{i}.mlp.experts."
        count = sum(n.startswith(prefix) and n.endswith("down_proj.weight") for n in tensors)
        if count:
            get = lambda e, part: tensors[f"{prefix}{e}.{part}.weight"]  # noqa: E731, B023
            pairs = [torch.cat([get(e, "gate_proj"), get(e, "up_proj")]) for e in range(count)]
            state[f"main.{prefix}gate_up_proj"] = torch.stack(pairs)
            state[f"main.{prefix}down_proj"] = torch.stack([get(e, "down_proj") for e in range(count)])
    net.load_state_dict(state)
    return net


def reference_generate(net, requests: list[list[int]], batch: int = 42) -> list[list[int]]:
    """Returns greedy answers; prompts of similar lengths share a batch, padded on the left."""
    import network
    import torch

    out: list = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    for first in tqdm(range(0, len(order), batch), desc="generating", file=sys.stderr):
        chosen = order[first : first + batch]
        longest = max(len(requests[i]) for i in chosen)
        ids = torch.tensor([[network.END_OF_TEXT] * (longest - len(requests[i])) + requests[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(requests[i])) + [1] * len(requests[i]) for i in chosen])
        with torch.no_grad():
            done = net.main.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                eos_token_id=[network.END_OF_TEXT, network.END],
                pad_token_id=network.END_OF_TEXT,
            )
        for i, row in zip(chosen, done[:, longest:].tolist()):
            while row and row[-1] == network.END_OF_TEXT:
                row.pop()
            out[i] = row
    return out


def mtp_accuracy(net, requests: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Returns for each MTP layer the share of generated tokens that it predicts."""
    import network
    import torch

    right, total = [0] * network.MTP_LAYERS, [0] * network.MTP_LAYERS
    for request, answer in zip(requests, answers):
        ids = torch.tensor([request + answer])
        with torch.no_grad():
            hidden = net.hidden(ids)
            for k in range(network.MTP_LAYERS):
                guess = net.main.lm_head(net.mtp_hidden(ids, hidden, k)).argmax(-1)[0]
                # Positions that a decoder would see: from the last prompt token on, with a token to compare with.
                for t in range(len(request) - 1, len(request) + len(answer) - 2 - k):
                    total[k] += 1
                    right[k] += int(guess[t] == ids[0, t + 2 + k])
    return [r / max(1, t) for r, t in zip(right, total)]


def run_reference(folder: Path, items: list[dict]) -> tuple[list[str], list[float]]:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = reference_network(folder)
    requests = prompts(tokenizer, items)
    answers = reference_generate(net, requests)
    texts = [tokenizer.decode(a) for a in answers]
    return texts, mtp_accuracy(net, requests, answers)


# ---- a converted directory in MLX


def run_mlx(model_path: str | None, items: list[dict]) -> list[str]:
    from mlx_lm import batch_generate

    from mlx_mimo import load

    model, tokenizer = load(model_path) if model_path else load()
    requests, texts = prompts(tokenizer, items), []
    for first in tqdm(range(0, len(requests), 30), desc="generating", file=sys.stderr):
        texts += batch_generate(model, tokenizer, requests[first : first + 30], max_tokens=MAX_TOKENS).texts
    if model.residency:
        model.residency.close()
    return texts


# ---- report


def report(items: list[dict], texts: list[str]) -> dict:
    cells = defaultdict(lambda: [0, 0])
    for item, text in zip(items, texts):
        for cell in (("all", "all"), (item["domain"], "all"), (item["domain"], item["mode"]), ("all", item["mode"])):
            cells[cell][0] += is_right(item, text)
            cells[cell][1] += 1
    return {domain + ("" if mode == "all" else f" {mode}"): counts for (domain, mode), counts in sorted(cells.items())}


def show(result: dict) -> None:
    print(f"{'domain':<12}{'thinking off':>16}{'thinking on':>16}{'both':>16}")
    for domain in sorted((d for d in result if " " not in d), key=lambda d: (d == "all", d)):
        columns = [result.get(f"{domain} off"), result.get(f"{domain} on"), result[domain]]
        texts = [f"{c[0]}/{c[1]} {c[0] / c[1]:6.1%}" if c else "-" for c in columns]
        print(f"{domain:<12}" + "".join(f"{t:>16}" for t in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory; default: the embedded demo")
    parser.add_argument("--reference", action="store_true", help="read the FP8 checkpoint with transformers")
    parser.add_argument("--data", type=Path, default=HELD_OUT)
    parser.add_argument("--limit", type=int, help="only N items, spread evenly over the file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--errors", action="store_true", help="list the wrong answers too")
    arguments = parser.parse_args()
    items = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    if arguments.limit and arguments.limit < len(items):
        items = [items[i * len(items) // arguments.limit] for i in range(arguments.limit)]
    mtp = None
    if arguments.reference:
        texts, mtp = run_reference(Path(arguments.model or CHECKPOINT), items)
    else:
        texts = run_mlx(arguments.model, items)
    result = report(items, texts)
    if arguments.json:
        print(json.dumps({"exact_match": {k: {"right": r, "items": n} for k, (r, n) in result.items()}, "mtp": mtp}))
        return
    show(result)
    if mtp:
        print("MTP token accuracy: " + ", ".join(f"layer {k} {a:.1%}" for k, a in enumerate(mtp)))
    if arguments.errors:
        for item, text in zip(items, texts):
            if not is_right(item, text):
                print(
                    f"{item['id']}: {item['messages'][-1]['content']!r}: {text!r}, not {item['answer'] or item['call']}"
                )


if __name__ == "__main__":
    main()
