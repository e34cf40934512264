"""Attention with sinks, for training without a cache.

Scores are the largest arrays there are, and on a CPU it is memory that costs: so a few rows of the batch at a time,
which stay in the cache from the first product to the last.
"""

import torch

CHUNK_BYTES = 600_000  # of float32 scores


def _chunks(batch: int, heads: int, length: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // (heads * length * length * 4))
    return [slice(i, min(batch, i + step)) for i in range(0, batch, step)]


class SinkAttention(torch.autograd.Function):
    """softmax([scale·q·kᵀ + mask, sink]) · v, the sink's column without a value; a KV head serves several queries."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask, scale):
        """(B, Hq, L, D), (B, Hkv, L, D), (B, Hkv, L, V), (Hq,) or None, (1, 1, L, L) → (B, Hq, L, V)."""
        device = q.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
        ctx.dtypes, ctx.scale = (q.dtype, k.dtype, v.dtype), scale
        batch, heads, length, _ = q.shape
        kv = k.shape[1]
        q = (q * scale).to(dtype).reshape(batch, kv, -1, q.shape[-1])  # (B, Hkv, G·L, D)
        k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
        p = q.new_empty(batch, kv, q.shape[2], length)
        out = q.new_empty(batch, kv, q.shape[2], v.shape[-1])
        share = torch.zeros(batch, heads, length, 1, device=q.device)
        sink = None if sinks is None else sinks.view(1, -1, 1, 1).float()
        for c in _chunks(batch, heads, length):
            score = (q[c] @ k[c].transpose(2, 3)).float().view(-1, heads, length, length).add_(mask)
            top = score.amax(-1, keepdim=True)
            if sink is not None:
                top = torch.maximum(top, sink)
            # exp is slow where it underflows; a masked score becomes e^-80, which adds nothing either
            total = score.sub_(top).clamp_(min=-80).exp_().sum(-1, keepdim=True)
            if sink is not None:
                own = (sink - top).exp_()
                total += own
                share[c] = own / total
            p[c] = score.div_(total).view(-1, *p.shape[1:])
            out[c] = p[c] @ v[c]
        ctx.save_for_backward(q, k, v, p, out, None if sinks is None else share)
        return out.view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p, out, share = ctx.saved_tensors
        batch, length = k.shape[0], k.shape[2]
        grad = grad.to(p.dtype).reshape(out.shape)
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        heads = q.shape[1] * q.shape[2] // length
        for c in _chunks(batch, heads, length):
            d_v[c] = p[c].transpose(2, 3) @ grad[c]
            d_score = (grad[c] @ v[c].transpose(2, 3)).float().sub_(inner[c]).mul_(p[c]).to(p.dtype)
            d_q[c] = d_score @ k[c]
            d_k[c] = d_score.transpose(2, 3) @ q[c]
        d_sinks = None
        if share is not None:
            d_sinks = -(share * inner.view(batch, heads, length, 1)).sum((0, 2, 3))
        first, second, third = ctx.dtypes
        d_q = d_q.view(batch, heads, length, -1).to(first).mul_(ctx.scale)
        return d_q, d_k.to(second), d_v.to(third), d_sinks, None, None


def forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Replaces transformers' eager_attention_forward; every row of the batch must have the same mask."""
    out = SinkAttention.apply(query, key, value, module.sinks, attention_mask[:1], scaling)
    return out.transpose(1, 2).contiguous(), None
