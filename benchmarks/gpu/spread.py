"""Transformers of FLUX and Wan size with random weights, spread over ranks in plain torch.

Sequence parallelism cuts the tokens: Ulysses exchanges heads for tokens around the attention, ring passes keys and
values on. Tensor parallelism cuts heads and hidden features and adds up the partial results. Nothing is approximated,
so a block costs what a real one costs; what the numbers mean is of no concern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Spread:
    """This rank's groups along each axis, None where the axis has one rank.

    ``model`` are the ranks of one forward, ``row`` is this rank's CFG branch of ``rows`` that run side by side.
    """

    name: str
    ulysses: Any = None
    ring: Any = None
    tp: Any = None
    cfg: Any = None
    model: Any = None
    row: int = 0
    rows: int = 1

    @staticmethod
    def size(group: Any) -> int:
        """Ranks of a group."""
        return 1 if group is None else dist.get_world_size(group)

    @property
    def sp_size(self) -> int:
        """Shards of the tokens."""
        return self.size(self.ulysses) * self.size(self.ring)

    @classmethod
    def build(cls, ulysses: int = 1, ring: int = 1, tp: int = 1, cfg: int = 1) -> Spread:
        """Groups of a layout in the host's order of ranks: TP first, then Ulysses, then ring, then CFG branches."""
        rank, world = dist.get_rank(), dist.get_world_size()
        grid = torch.arange(world).reshape(cfg, ring, ulysses, tp)
        found: dict[str, Any] = {"model": dist.group.WORLD}
        for name, size, moved in (
            ("tp", tp, grid.reshape(-1, tp)),
            ("ulysses", ulysses, grid.movedim(2, 3).reshape(-1, ulysses)),
            ("ring", ring, grid.movedim(1, 3).reshape(-1, ring)),
            ("cfg", cfg, grid.movedim(0, 3).reshape(-1, cfg)),
            ("model", cfg, grid.reshape(cfg, -1)),
        ):
            for ranks in moved.tolist() if size > 1 else ():
                group = dist.new_group(ranks)
                if rank in ranks:
                    found[name] = group
        sizes = (("CFG", cfg), ("Ulysses", ulysses), ("ring", ring), ("TP", tp))
        words = [f"{label} {size}" for label, size in sizes if size > 1]
        return cls(name=" x ".join(words) or "one GPU", row=rank * cfg // world, rows=cfg, **found)

    @property
    def sp_rank(self) -> int:
        """Which shard of the tokens this rank holds."""
        ring = 0 if self.ring is None else dist.get_group_rank(self.ring, dist.get_rank())
        ulysses = 0 if self.ulysses is None else dist.get_group_rank(self.ulysses, dist.get_rank())
        return ring * self.size(self.ulysses) + ulysses

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of (batch, tokens, dim)."""
        return x.chunk(self.sp_size, dim=1)[self.sp_rank].contiguous()


def _swap(x: torch.Tensor, group: Any, *, heads_out: bool) -> torch.Tensor:
    """Exchange heads for tokens (or back) over ``group``; x is (batch, tokens, heads, dim)."""
    n = dist.get_world_size(group)
    b, s, h, d = x.shape
    if heads_out:
        send = x.reshape(b, s, n, h // n, d).permute(2, 0, 1, 3, 4).contiguous()
    else:
        send = x.reshape(b, n, s // n, h, d).permute(1, 0, 2, 3, 4).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    if heads_out:
        return received.permute(1, 0, 2, 3, 4).reshape(b, n * s, h // n, d)
    return received.permute(1, 2, 0, 3, 4).reshape(b, s // n, n * h, d)


def _with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of its normaliser; tensors are (batch, heads, tokens, dim)."""
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.float(), lse.float()[..., : q.shape[2]]


def _ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Any) -> torch.Tensor:
    """Attention over the keys and values of all ranks, passed on from one to the next."""
    rank, n = dist.get_group_rank(group, dist.get_rank()), dist.get_world_size(group)
    after = dist.get_global_rank(group, (rank + 1) % n)
    before = dist.get_global_rank(group, (rank - 1) % n)
    held = torch.stack([k, v]).contiguous()
    out, lse = _with_lse(q, k, v)
    for _ in range(n - 1):
        received = torch.empty_like(held)
        operations = [dist.P2POp(dist.isend, held, after, group), dist.P2POp(dist.irecv, received, before, group)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        held = received
        part, part_lse = _with_lse(q, held[0], held[1])
        total = torch.logaddexp(lse, part_lse)
        out = out * (lse - total).exp().unsqueeze(-1) + part * (part_lse - total).exp().unsqueeze(-1)
        lse = total
    return out.to(q.dtype)


def attention(qkv: torch.Tensor, heads: int, spread: Spread) -> torch.Tensor:
    """Self-attention of (batch, local tokens, 3 x heads x dim); returns (batch, local tokens, heads x dim)."""
    b, s, width = qkv.shape
    x = qkv.reshape(b, s, heads, width // heads)
    if spread.ulysses is not None:
        x = _swap(x, spread.ulysses, heads_out=True)
    q, k, v = (each.transpose(1, 2) for each in x.chunk(3, dim=-1))
    if spread.ring is not None:
        out = _ring(q.contiguous(), k.contiguous(), v.contiguous(), spread.ring)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2)
    if spread.ulysses is not None:
        out = _swap(out, spread.ulysses, heads_out=False)
    return out.reshape(b, s, -1)


class Matrix(nn.Module):
    """A random matrix without bias. ``add_up``: rows are cut over TP and the results added up."""

    def __init__(self, rows: int, columns: int, spread: Spread | None = None):
        super().__init__()
        self.group = None if spread is None else spread.tp
        self.weight = nn.Parameter(torch.empty(columns, rows).normal_(std=1 / math.sqrt(rows)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.weight)
        if self.group is not None:
            dist.all_reduce(out, group=self.group)
        return out


def norm(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:])


GATE = 0.3
"""Share of a block's result that is added to the stream, so that many random blocks stay bounded."""


class Stream(nn.Module):
    """Projections and feed-forward of one token stream."""

    def __init__(self, dim: int, ffn: int, spread: Spread):
        super().__init__()
        tp = spread.size(spread.tp)
        self.qkv = Matrix(dim, 3 * dim // tp)
        self.out = Matrix(dim // tp, dim, spread)
        self.up = Matrix(dim, ffn // tp)
        self.down = Matrix(ffn // tp, dim, spread)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Add attention and feed-forward to the stream."""
        x = x + GATE * self.out(attended)
        return x + GATE * self.down(F.gelu(self.up(norm(x)), approximate="tanh"))


class DoubleBlock(nn.Module):
    """FLUX's first kind: image and text have weights of their own and attend together."""

    def __init__(self, dim: int, heads: int, spread: Spread):
        super().__init__()
        self.image, self.text = Stream(dim, 4 * dim, spread), Stream(dim, 4 * dim, spread)
        self.heads, self.spread = heads // spread.size(spread.tp), spread

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor):
        """Returns text, then image."""
        qkv = torch.cat([self.text.qkv(norm(encoder_hidden_states)), self.image.qkv(norm(hidden_states))], dim=1)
        text, image = attention(qkv, self.heads, self.spread).split(
            [encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1
        )
        return self.text.finish(encoder_hidden_states, text), self.image.finish(hidden_states, image)


class SingleBlock(nn.Module):
    """FLUX's second kind: both streams share weights."""

    def __init__(self, dim: int, heads: int, spread: Spread):
        super().__init__()
        self.both = Stream(dim, 4 * dim, spread)
        self.heads, self.spread = heads // spread.size(spread.tp), spread

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor):
        """Returns text, then image."""
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x = self.both.finish(x, attention(self.both.qkv(norm(x)), self.heads, self.spread))
        return x.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)


class WanBlock(nn.Module):
    """Wan's: self-attention, attention to the text, feed-forward."""

    def __init__(self, dim: int, ffn: int, heads: int, spread: Spread):
        super().__init__()
        tp = spread.size(spread.tp)
        self.own = Stream(dim, ffn, spread)
        self.query, self.keys = Matrix(dim, dim // tp), Matrix(dim, 2 * dim // tp)
        self.cross_out = Matrix(dim // tp, dim, spread)
        self.heads, self.spread = heads // tp, spread

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        attended = attention(self.own.qkv(norm(hidden_states)), self.heads, self.spread)
        b, s, _ = hidden_states.shape
        q = self.query(norm(hidden_states)).reshape(b, s, self.heads, -1).transpose(1, 2)
        k, v = (
            each.reshape(b, -1, self.heads, q.shape[-1]).transpose(1, 2)
            for each in self.keys(encoder_hidden_states).chunk(2, dim=-1)
        )
        cross = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1)
        hidden_states = hidden_states + GATE * self.cross_out(cross)
        return self.own.finish(hidden_states, attended)


class SpreadFlux(nn.Module):
    """FLUX.1's shape: 19 double and 38 single blocks, dim 3072, 24 heads."""

    def __init__(self, spread: Spread, double: int = 19, single: int = 38, dim: int = 3072, heads: int = 24):
        super().__init__()
        blocks = [DoubleBlock(dim, heads, spread) for _ in range(double)]
        self.blocks = nn.ModuleList([*blocks, *(SingleBlock(dim, heads, spread) for _ in range(single))])

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return norm(hidden_states)


class SpreadWan(nn.Module):
    """Wan 14B's shape: 40 blocks, dim 5120, feed-forward 13824, 40 heads."""

    def __init__(self, spread: Spread, blocks: int = 40, dim: int = 5120, ffn: int = 13824, heads: int = 40):
        super().__init__()
        self.blocks = nn.ModuleList(WanBlock(dim, ffn, heads, spread) for _ in range(blocks))

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        return norm(hidden_states)


def build(kind: type[nn.Module], spread: Spread, device: torch.device, seed: int = 0, **sizes: int) -> nn.Module:
    """A model with random bfloat16 weights on ``device``, the same on every rank but for what TP cuts."""
    tp_rank = 0 if spread.tp is None else dist.get_group_rank(spread.tp, dist.get_rank())
    torch.manual_seed(1000 * seed + tp_rank)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return kind(spread, **sizes).eval()
    finally:
        torch.set_default_dtype(dtype)
