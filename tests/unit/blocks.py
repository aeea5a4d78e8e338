"""A tiny transformer whose blocks can be counted, mounted the way a host would mount it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.cache.cached_model import CachedTransformer, preset_mask
from sglang_cachedit_plugin.cache.spec import Groups, Identity, RequestSpec, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import RequestStats, TransformerStats

DIM, TOKENS = 8, 5


class Block(nn.Module):
    """Adds a bounded function of its input; ``fail`` makes it raise."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5)
        self.fail = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("block failed")
        return hidden_states + 0.5 * torch.tanh(hidden_states @ self.weight)


class Linear(nn.Module):
    """Adds a constant times the input's first token, which the test uses as the residual's size."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + hidden_states[:, :1]


class TinyDiT(nn.Module):
    """One list of blocks."""

    def __init__(self, blocks: int = 6, kind: Any = Block):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            kind(seed) if kind is Block else kind() for seed in range(blocks)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class TwoListsDiT(nn.Module):
    """Two lists of blocks, one after the other: two contexts for each branch."""

    def __init__(self, blocks: int = 4):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(seed) for seed in range(blocks))
        self.single_blocks = nn.ModuleList(Block(100 + seed) for seed in range(blocks))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        hidden_states = torch.roll(hidden_states, 1, dims=-1)
        for block in self.single_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


ROWS = {
    "TinyDiT": adapters.ModelAdapter(
        family="tiny", blocks=(adapters.Blocks(name="transformer_blocks", streams=("hidden_states",)),)
    ),
    "TwoListsDiT": adapters.ModelAdapter(
        family="tiny",
        blocks=(
            adapters.Blocks(name="transformer_blocks", streams=("hidden_states",)),
            adapters.Blocks(name="single_blocks", streams=("hidden_states",)),
        ),
    ),
}


@contextlib.contextmanager
def known_classes() -> Iterator[None]:
    """The tiny classes are in the adapters' table for a while."""
    adapters.NATIVE.update(ROWS)
    try:
        yield
    finally:
        for name in ROWS:
            del adapters.NATIVE[name]


def sample(branch: str, step: int, scale: float = 0.15) -> torch.Tensor:
    """Input of one forward: a slow drift with the step, from a start of the branch's own."""
    generator = torch.Generator().manual_seed(sum(map(ord, branch)))
    start = torch.randn(1, TOKENS, DIM, generator=generator)
    drift = torch.randn(1, TOKENS, DIM, generator=generator)
    return start + scale * step * drift


def wanted(spec: TransformerSpec, stats: TransformerStats, identify: Any, **more: Any) -> RequestSpec:
    """What a request wants of one transformer."""
    record = RequestStats(backend="test", enabled=True, transformers={spec.name: stats})
    return RequestSpec(transformers=(spec,), stats=record, identify=identify, **more)


class Rig:
    """A mounted model that a test drives: it says the identity of each forward itself."""

    def __init__(self, model: nn.Module | None = None, name: str = "transformer"):
        self.model = TinyDiT() if model is None else model
        self.mounted = CachedTransformer(name, self.model)
        self.identity: Identity | None = None
        self.stats = TransformerStats(steps=0)
        self.calls: Counter[str] = Counter()
        for path, module in self.model.named_modules():
            if isinstance(module, Block | Linear):
                module.register_forward_hook(lambda *_, path=path: self.calls.update([path]))

    def _identify(self, name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        return self.identity

    def begin(self, num_steps: int, positions: tuple[float, ...] | None = None, first_step: int = 0,
              groups: Groups | None = None, warmup: Any = None, **knobs: Any) -> Rig:
        """Start a request; knobs as in CacheSettings."""
        settings = CacheSettings(**{"max_warmup_steps": 1, **knobs})
        plan, _ = build_plan(settings, num_steps, preset_mask, first_step=first_step)
        spec = TransformerSpec(
            name=self.mounted.name, settings=settings, plan=plan, first_step=first_step, timesteps=positions
        )
        self.stats = TransformerStats(steps=num_steps)
        self.mounted.refresh(wanted(spec, self.stats, self._identify, groups=groups or Groups(), warmup=warmup))
        return self

    @torch.no_grad()
    def run(self, branch: str, step: int, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """One forward of ``branch`` at ``step``."""
        self.identity = Identity(branch, step)
        return self.model(sample(branch, step) if hidden_states is None else hidden_states)

    @torch.no_grad()
    def run_counted(self, branch: str, step: int) -> list[str]:
        """Paths of the blocks that ran in one forward, in the model's order."""
        self.calls.clear()
        self.run(branch, step)
        assert set(self.calls.values()) <= {1}, "a block ran twice"
        return [path for path, _ in self.model.named_modules() if path in self.calls]
