"""Trains the demo model: fixed steps, resumable, the same on every machine up to rounding.

    python examples/demo_model/train.py --out build/demo

Muon for the matrices of attention and dense layer, AdamW for the rest; the learning rate is constant and then falls
linearly to zero. The routers' selection biases move by the sign of the load error (no auxiliary loss), less and less,
and rest at the end. The MTP layers learn during the last part, from detached hidden states, and cost the main model
nothing.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from random import Random

import dialogue
import network
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

STEPS = 4200
WARMUP = 100
DECAY_FROM = 0.55
MTP_FROM = 0.7
BIAS_UNTIL = 0.9
RATE, MATRIX_RATE = 2e-3, 4e-3
BIAS_STEP = 4e-3  # at the full learning rate
POOL = 512  # dialogues drawn, sorted by length and cut into batches at once
BATCH_TOKENS = 2048  # of each worker
WORKERS = 2
SAVE_SECONDS = 120


def encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Returns the ids, and a mask that is 1 where the loss counts."""
    ids, learn = [], []
    for text, trained in pieces:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        learn += [int(trained)] * len(new)
    return ids, learn


def pool(tokenizer: Tokenizer, number: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the batches of one pool: (B, L) ids and mask, rows of similar lengths, in random order."""
    rng = Random(f"pool {number} of worker {rank}")
    rows = sorted((encode(tokenizer, dialogue.draw_dialogue(rng)) for _ in range(POOL)), key=lambda r: -len(r[0]))
    out = []
    while rows:
        # Few shapes: lengths are multiples of 32, and a length has always as many rows (the last ones may be empty).
        longest = -(-len(rows[0][0]) // 32) * 32
        count = max(1, BATCH_TOKENS // longest)
        ids = torch.full((count, longest), network.END_OF_TEXT)
        learn = torch.zeros(count, longest)
        for i, (row, mask) in enumerate(rows[:count]):
            ids[i, : len(row)] = torch.tensor(row)
            learn[i, : len(row)] = torch.tensor(mask)
        out.append((ids, learn))
        rows = rows[count:]
    rng.shuffle(out)
    return out


def head_loss(net, hidden, ids, learn, ahead: int, frozen: bool = False):
    """Mean cross-entropy of the learnt tokens `ahead` places after each position, and how many are right."""
    wanted = learn[:, ahead:] > 0
    weight = net.main.lm_head.weight
    logits = F.linear(hidden[:, :-ahead][wanted], weight.detach() if frozen else weight).float()
    target = ids[:, ahead:][wanted]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


def balance(net) -> None:
    """Counts the load of each expert through hooks; `settle` then moves the biases."""
    for gate in net.routers():

        def hook(module, _, output):
            module.load = output[2].flatten().bincount(minlength=module.num_experts).float()

        gate.register_forward_hook(hook)


@torch.no_grad()
def settle(net, step_size: float) -> float:
    """Moves every bias by `step_size` towards an even load; returns the largest load over the mean one."""
    worst = 0.0
    for gate in net.routers():
        if dist.is_initialized():
            dist.all_reduce(gate.load)
        error = gate.load.mean() - gate.load
        gate.e_score_correction_bias += step_size * error.sign()
        worst = max(worst, (gate.load.max() / gate.load.mean()).item())
    return worst


def rate(step: int, steps: int, start: float = 0.0) -> float:
    first = start * steps
    rise = min(1.0, (step - first + 1) / WARMUP)
    fall = min(1.0, (steps - step) / (steps * (1 - DECAY_FROM)))
    return max(0.0, rise * fall)


def optimisers(net) -> list[torch.optim.Optimizer]:
    """Muon for the main model's attention and dense layer; AdamW for all else.

    For the experts too it needs fewer steps still, but each then takes nearly twice as long on a CPU.
    """
    layers = [p for n, p in net.main.named_parameters() if ".layers." in n and p.dim() == 2 and "gate.weight" not in n]
    chosen = {id(p) for p in layers}
    groups = []
    for module, first in ((net.main, 0.0), (net.mtp, MTP_FROM)):
        for matrices in (True, False):  # only matrices decay
            params = [p for p in module.parameters() if (p.dim() > 1) == matrices and id(p) not in chosen]
            groups.append({"params": params, "peak": RATE, "first": first, "weight_decay": 0.1 if matrices else 0.0})
    return [
        # scaled like AdamW's steps, as in Moonlight (arXiv 2502.16982)
        torch.optim.Muon(
            [{"params": layers, "peak": MATRIX_RATE, "first": 0.0}], lr=MATRIX_RATE, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True),
    ]


@torch.no_grad()
def share_gradients(params: list) -> None:
    """The mean over the workers, as one message in bfloat16: the loopback takes half as long as in float32."""
    grads = [p.grad for p in params]
    flat = torch.cat([g.flatten().bfloat16() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def machine() -> str:
    """Returns the machine's name for the card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} {platform.machine()} cores"


def keep_memory() -> None:
    """Restarts this command with a glibc that keeps freed memory: page faults take up to half of the time otherwise."""
    if sys.platform.startswith("linux") and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.environ["MALLOC_ARENA_MAX"] = "1"
        os.environ["MALLOC_MMAP_MAX_"] = "0"
        os.environ["MALLOC_TRIM_THRESHOLD_"] = str(10**11)
        os.environ["MALLOC_TOP_PAD_"] = str(2**29)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def train(out: Path, steps: int) -> None:
    """Trains in this process on a GPU, else in as many single-threaded processes as there are cores, up to WORKERS."""
    workers = 1 if torch.cuda.is_available() else min(WORKERS, os.cpu_count() or 1)
    if workers == 1:
        work(0, 1, out, steps)
        return
    meeting = out / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(work, (workers, out, steps), workers)


def work(rank: int, workers: int, out: Path, steps: int) -> None:
    """Runs one worker: it draws its own batches and averages gradients with the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{(out / 'meeting').resolve()}", rank=rank, world_size=workers)
    network.speed_up()
    net = network.Network().to(device)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    assert tokenizer.token_to_id("<|im_end|>") == network.END, tokenizer.token_to_id("<|im_end|>")
    parts = optimisers(net)
    step, number, spent = 0, 0, 0.0
    saved = out / "train.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device)
        net.load_state_dict(state["net"])
        for part, kept in zip(parts, state["optimisers"]):
            part.load_state_dict(kept)
        step, number, spent = state["place"]
        number += 1  # the rest of the pool that was begun is skipped
    balance(net)
    # bfloat16 matmuls are ten times as fast where the CPU has AMX; weights, router and head stay float32
    autocast = torch.autocast(device, torch.bfloat16)
    batches = pool(tokenizer, number, rank)
    position = 0
    began, last_save, seen, smooth = time.time() - spent, time.time(), 0, None
    bar = tqdm(total=steps, initial=step, mininterval=10, desc="training", disable=rank > 0)
    while step < steps:
        if position == len(batches):
            number, position = number + 1, 0
            batches = pool(tokenizer, number, rank)
        ids, learn = (t.to(device) for t in batches[position])
        position += 1
        with_mtp = step >= MTP_FROM * steps
        for group in (g for part in parts for g in part.param_groups):
            group["lr"] = group["peak"] * rate(step, steps, group["first"])
        with autocast:
            hidden = net.hidden(ids)
        loss, right = head_loss(net, hidden.float(), ids, learn, 1)
        total, guesses = loss, []
        worst = max((g.load.max() / g.load.mean()).item() for g in net.routers())
        if step < BIAS_UNTIL * steps:
            worst = settle(net, BIAS_STEP * rate(step, steps))
        if with_mtp:
            some = slice(None, None, 2)  # half of the batch is enough for them
            for k in range(network.MTP_LAYERS):
                with autocast:
                    guess = net.mtp_hidden(ids[some], hidden[some].detach(), k)
                extra, share = head_loss(net, guess.float(), ids[some], learn[some], 2 + k, frozen=True)
                total = total + extra
                guesses.append(round(share.item(), 3))
        net.zero_grad(set_to_none=True)
        total.backward()
        if workers > 1:
            share_gradients(list((net if with_mtp else net.main).parameters()))
        torch.nn.utils.clip_grad_norm_(net.main.parameters(), 1.0)
        if with_mtp:
            torch.nn.utils.clip_grad_norm_(net.mtp.parameters(), 1.0)
        for part in parts:
            part.step()
        step += 1
        seen += ids.numel() * workers
        if rank > 0:
            continue
        bar.update()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            record = {
                "step": step, "loss": round(smooth, 4), "right": round(right.item(), 4), "mtp": guesses,
                "load": round(worst, 2), "seconds": round(time.time() - began), "tokens": seen,
                "machine": machine(),
            }  # fmt: skip
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            bar.set_postfix_str(json.dumps({k: record[k] for k in ("loss", "right", "mtp", "load")}))
        if time.time() - last_save > SAVE_SECONDS or step in (steps, int(DECAY_FROM * steps)):
            place = (step, number, time.time() - began)
            partial = saved.with_suffix(".part")
            kept = [part.state_dict() for part in parts]
            torch.save({"net": net.state_dict(), "optimisers": kept, "place": place}, partial)
            partial.replace(saved)
            if step == int(DECAY_FROM * steps):  # from here a longer training can go on
                shutil.copy(saved, out / "constant.pt")
            last_save = time.time()
    bar.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    keep_memory()
    train(arguments.out, arguments.steps)
