"""The sum over experts, quick on a CPU: rows sorted by expert, one matmul an expert, in bfloat16 under autocast."""

import torch
import torch.nn.functional as F

ROWS = 64  # an expert's rows are padded to a multiple of this: few shapes, so matmul kernels are reused


def _layout(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, list[int]]:
    """Returns each pair's row in the padded layout, (T·K,), and every expert's rows, from (T, K) expert numbers."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    real = flat.bincount(minlength=count)
    filled = (real + ROWS - 1) // ROWS * ROWS
    shift = (filled.cumsum(0) - filled) - (real.cumsum(0) - real)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device) + shift[flat[order]]
    return rows, filled.tolist()


class ExpertSum(torch.autograd.Function):
    """sum over k of w_k · D(silu(G x) · U x), with its own backward pass: autograd's copies outlast the matmuls."""

    @staticmethod
    def forward(ctx, x, weights, gate_up, down, experts):
        """(T, H), (T, K), (E, 2I, H), (E, H, I), (T, K) expert numbers → (T, H)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        rows, counts = _layout(experts, len(gate_up))
        top = experts.shape[1]
        into = torch.zeros(sum(counts), x.shape[1], dtype=dtype, device=x.device)
        into[rows] = x.to(dtype).repeat_interleave(top, 0)
        # One expert at a time, so that its rows stay in the processor's cache.
        both, act, out = [], [], torch.empty_like(into)
        for e, (a, b) in enumerate(zip(into.split(counts), out.split(counts))):
            both.append(a @ gate_up[e].T)
            gate, up = both[-1].chunk(2, -1)
            act.append(F.silu(gate).mul_(up))
            torch.mm(act[-1], down[e].T, out=b)
        answers = out[rows].view(len(x), top, -1)
        ctx.save_for_backward(weights, gate_up, down, into, answers, rows, *both, *act)
        ctx.counts = counts
        total = answers[:, 0] * weights[:, :1]  # float32, as the weights are
        for k in range(1, top):
            total += answers[:, k] * weights[:, k : k + 1]
        return total

    @staticmethod
    def backward(ctx, grad):
        weights, gate_up, down, into, answers, rows, *kept = ctx.saved_tensors
        both, act = kept[: len(down)], kept[len(down) :]
        counts, top = ctx.counts, weights.shape[1]
        d_weights = torch.stack([(answers[:, k] * grad).sum(-1) for k in range(top)], -1)
        d_answers = torch.empty_like(answers)
        for k in range(top):
            torch.mul(grad, weights[:, k : k + 1], out=d_answers[:, k])
        d_out = torch.zeros_like(into)
        d_out[rows] = d_answers.view(len(rows), -1)
        d_into, d_down, d_gate_up = torch.empty_like(into), torch.empty_like(down), torch.empty_like(gate_up)
        for e, (g, x, b) in enumerate(zip(d_out.split(counts), into.split(counts), d_into.split(counts))):
            torch.mm(g.T, act[e], out=d_down[e])
            d_act = g @ down[e]
            gate, up = both[e].chunk(2, -1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            d_both = torch.cat([d_act * up * sigmoid * (1 + gate - silu), d_act * silu], -1)
            torch.mm(d_both, gate_up[e], out=b)
            torch.mm(d_both.T, x, out=d_gate_up[e])
        d_x = d_into[rows].view(len(grad), top, -1).to(grad.dtype).sum(1)
        return d_x, d_weights, d_gate_up.to(grad.dtype), d_down.to(grad.dtype), None


def forward(self, hidden_states, top_k_index, top_k_weights):
    """Replaces transformers' MiMoV2FlashExperts.forward."""
    return ExpertSum.apply(hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, top_k_index)
