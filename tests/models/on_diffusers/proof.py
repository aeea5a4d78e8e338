"""What must hold for a mounted transformer, whatever its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sglang_cachedit_plugin.adapters import Blocks, ModelAdapter
from sglang_cachedit_plugin.cache.cached_model import CachedTransformer, preset_mask
from sglang_cachedit_plugin.cache.spec import Identity, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.report.stats import TransformerStats
from tests.models.on_diffusers.zoo import STEPS, Noise
from tests.unit.blocks import wanted

MASK = (1, 1, 0, 1, 0, 0)
CACHED = [step for step, computed in enumerate(MASK) if not computed]
SMALL, LARGE = 4, 8


class Proof:
    """A tiny transformer, mounted; the test says which forward is which.

    Args:
        lists: the block lists whose calls are noted.
        inputs: (noise, side) -> keyword arguments of the forward.
    """

    def __init__(self, model: nn.Module, lists: tuple[str, ...], inputs: Callable[[Noise, int], dict[str, Any]]):
        self.model, self.inputs = model, inputs
        self.lists = lists
        self.calls: Counter[str] = Counter()
        for name in lists:
            for index, block in enumerate(getattr(model, name)):
                block.register_forward_hook(lambda *_, key=f"{name}.{index}": self.calls.update([key]))
        self.identity: Identity | None = None
        self.plain = {side: [self.run(step, side) for step in range(STEPS)] for side in (SMALL, LARGE)}
        self.order = list(self.calls)
        self.mounted = CachedTransformer("transformer", model)

    @torch.no_grad()
    def run(self, step: int, side: int, frozen: bool = False) -> torch.Tensor:
        """Output of one forward; ``frozen``: with the inputs of step 0."""
        self.identity = Identity("cond", step)
        self.calls.clear()
        output = self.model(**self.inputs(Noise(0 if frozen else step), side))
        while not isinstance(output, torch.Tensor):
            output = output[0]
        return output

    def begin(self, **knobs: Any) -> TransformerStats:
        """Start a request."""
        settings = CacheSettings(max_warmup_steps=1, **knobs)
        plan, _ = build_plan(settings, STEPS, preset_mask)
        stats = TransformerStats(steps=STEPS)
        spec = TransformerSpec(name="transformer", settings=settings, plan=plan)
        self.mounted.refresh(wanted(spec, stats, lambda name, kwargs: self.identity))
        return stats

    def equals_plain(self, side: int) -> bool:
        """Whether all steps come out as without the plugin, bit for bit."""
        return all(torch.equal(self.run(step, side), plain) for step, plain in enumerate(self.plain[side]))

    def kept(self, row: ModelAdapter, first: int, last: int) -> list[str]:
        """Blocks that a cached step must run, in their order: the first and last of each chain, and lists without."""
        kept = {call for call in self.order if call.split(".")[0] not in {each.name for each in row.blocks}}
        for chain in _chains(row.blocks):
            calls = [call for each in chain for call in self.order if call.split(".")[0] == each.name]
            kept |= {*calls[:first], *calls[len(calls) - last :]}
        return [call for call in self.order if call in kept]


def _chains(lists: tuple[Blocks, ...]) -> list[list[Blocks]]:
    chains: list[list[Blocks]] = []
    for each in lists:
        if each.shares_decision and chains:
            chains[-1].append(each)
        else:
            chains.append([each])
    return chains


def check(proof: Proof, row: ModelAdapter) -> None:
    """Every property of one transformer: computed, static, another size, frozen, bypass."""
    proof.begin(steps_computation_mask=(1,) * STEPS)
    assert proof.equals_plain(SMALL), "all steps computed: not the output of the model alone"
    for first, last, side in ((1, 0, SMALL), (2, 1, LARGE)):
        _check_static(proof, row, first, last, side)
        _check_frozen(proof, first, last, side)
    proof.mounted.bypass()
    assert proof.equals_plain(SMALL), "bypass: not the output of the model alone"
    proof.mounted.unmount()
    assert "forward" not in proof.model.__dict__


def _check_static(proof: Proof, row: ModelAdapter, first: int, last: int, side: int) -> None:
    stats = proof.begin(
        steps_computation_mask=MASK, steps_computation_policy="static", Fn_compute_blocks=first,
        Bn_compute_blocks=last,
    )
    for step, computed in enumerate(MASK):
        output = proof.run(step, side)
        assert list(proof.calls) == (proof.order if computed else proof.kept(row, first, last)), (step, first, last)
        assert set(proof.calls.values()) == {1}
        assert torch.equal(output, proof.plain[side][step]) == bool(computed), (step, first, last)
    assert stats.branches["cond"].cached == CACHED
    assert stats.branches["cond"].computed == [step for step in range(STEPS) if step not in CACHED]
    assert stats.notes == []


def _check_frozen(proof: Proof, first: int, last: int, side: int) -> None:
    """Where nothing changes from step to step, the cached step is the computed one: every stream is restored."""
    proof.begin(
        steps_computation_mask=MASK, steps_computation_policy="static", Fn_compute_blocks=first,
        Bn_compute_blocks=last,
    )
    for step in range(STEPS):
        torch.testing.assert_close(proof.run(step, side, frozen=True), proof.plain[side][0], rtol=1e-4, atol=2e-5)
