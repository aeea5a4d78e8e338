"""Classes that only cache-dit's register knows: their adapters are read, and their own loops are cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_dit import BlockAdapter, BlockAdapterRegister, ForwardPattern
from diffusers import DiffusionPipeline
from torch import nn

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.adapters import Blocks
from sglang_cachedit_plugin.cache.block_lists import describe
from sglang_cachedit_plugin.cache.cached_model import CachedTransformer
from sglang_cachedit_plugin.errors import MountError
from tests.unit.blocks import DIM, Rig, sample
from tests.unit.cache.test_mount import MODELS, Mounted

N = 5
STATIC = {"steps_computation_mask": (1, 0, 1, 0), "steps_computation_policy": "static", "max_warmup_steps": 0}


class Two(nn.Module):
    """Takes and returns hidden and encoder states."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5)

    def moved(self, hidden_states: torch.Tensor, text: Any = 0.0) -> torch.Tensor:
        return hidden_states + 0.5 * torch.tanh((hidden_states + text) @ self.weight)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        moved = self.moved(hidden_states, encoder_hidden_states)
        return moved, encoder_hidden_states + 0.1 * moved[:, :1]


class EncoderFirst(Two):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return super().forward(hidden_states, encoder_hidden_states)[::-1]


class HiddenOnly(Two):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return self.moved(hidden_states, encoder_hidden_states)


class One(Two):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.moved(hidden_states)


class Makes(Two):
    """Returns a second value that it does not take."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        moved = self.moved(hidden_states)
        return moved, moved * 2


class MakesFirst(Makes):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        return super().forward(hidden_states)[::-1]


class OtherNames(Two):
    def forward(self, img: torch.Tensor, txt: torch.Tensor) -> Any:
        return super().forward(img, txt)


class Registered(nn.Module):
    """A loop of its own: it scales the states between the blocks, which a list in place of the loop would not."""

    def __init__(self, kind: Callable[[int], nn.Module], loop: Callable[..., torch.Tensor]):
        super().__init__()
        self.blocks = nn.ModuleList(kind(seed) for seed in range(N))
        self.more = nn.ModuleList(kind(seed) for seed in range(N, N + 3))
        self.loop = loop

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.loop([*self.blocks, *self.more], hidden_states)


def loop(unpack: Callable[[Any], tuple[Any, Any]], takes_text: bool) -> Callable[..., torch.Tensor]:
    def run(blocks: list[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
        text = hidden[:, :1] * 0.5
        last = None
        for block in blocks:
            hidden, made = unpack(block(hidden, text) if takes_text else block(hidden))
            text, last = (made if takes_text and made is not None else text), made
            hidden = hidden * 0.99
        return hidden + (0.0 if last is None else last)

    return run


def both(value: Any) -> tuple[Any, Any]:
    return value


def swapped(value: Any) -> tuple[Any, Any]:
    return value[::-1]


def alone(value: Any) -> tuple[Any, Any]:
    return value, None


PATTERNS = {
    0: (Two, loop(both, True)), 1: (EncoderFirst, loop(swapped, True)), 2: (HiddenOnly, loop(alone, True)),
    3: (One, loop(alone, False)), 4: (Makes, loop(both, False)), 5: (MakesFirst, loop(swapped, False)),
}


class Functor:
    def apply(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("an adapter is read, not applied")


@pytest.fixture
def register(monkeypatch) -> Callable[..., None]:
    """Registers an adapter for ``Registered``, as a third party does."""
    monkeypatch.setattr(BlockAdapterRegister, "_adapters", dict(BlockAdapterRegister._adapters))

    def add(pattern: int, blocks: Callable[[Registered], Any] = lambda model: [model.blocks, model.more]) -> None:
        @BlockAdapterRegister.register("Registered")
        def adapter(pipe: Any, **kwargs: Any) -> BlockAdapter:
            found = blocks(pipe.transformer)
            patterns = [getattr(ForwardPattern, f"Pattern_{pattern}")] * (len(found) if isinstance(found, list) else 1)
            return BlockAdapter(
                pipe=pipe, transformer=pipe.transformer, blocks=found, patch_functor=Functor(),
                forward_pattern=patterns if isinstance(found, list) else patterns[0], **kwargs,
            )

    return add


def run(rig: Rig, at: int | None = None) -> list[torch.Tensor]:
    return [rig.run("cond", step, sample("cond", step if at is None else at)) for step in range(4)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_forward_pattern_is_cached_in_the_models_own_loop(register, pattern):
    register(pattern)
    rig = Rig(Registered(*PATTERNS[pattern]))
    plain, fixed = run(rig), run(rig, at=0)
    for first, last in ((1, 0), (2, 1)):
        rig.begin(4, Fn_compute_blocks=first, Bn_compute_blocks=last, **STATIC)
        assert [torch.equal(a, b) for a, b in zip(run(rig), plain, strict=True)] == [True, False, True, False]
        assert rig.stats.branches["cond"].cached == [1, 3]
        assert rig.mounted.problem() is None
        rig.begin(4, Fn_compute_blocks=first, Bn_compute_blocks=last, **STATIC)
        torch.testing.assert_close(run(rig, at=0), fixed)
    rig.mounted.bypass()
    assert all(map(torch.equal, run(rig), plain))


@pytest.mark.parametrize(("pattern", "declared", "problem"), [
    (3, 4, "block 0 returns 1 of hidden_states, encoder_hidden_states"),
    (2, 0, "block 0 returns 1 of hidden_states, encoder_hidden_states"),
    (0, 1, "block 0 makes (1, 1, 8) of hidden_states (1, 5, 8)"),
])
def test_a_pattern_that_the_blocks_do_not_keep_is_found_on_the_first_forward(register, pattern, declared, problem):
    kind, own = PATTERNS[pattern]

    register(declared)
    rig = Rig(Registered(kind, own))
    plain = run(rig)
    rig.begin(4, **STATIC)
    assert all(map(torch.equal, run(rig), plain))
    assert problem in rig.mounted.problem()


def test_states_of_other_names_are_told_by_their_place(register):
    register(0)
    model = Registered(OtherNames, loop(both, True))
    assert describe(model) == [
        Blocks(name="blocks", streams=("img", "txt"), measured="img"),
        Blocks(name="more", streams=("img", "txt"), measured="img"),
    ]
    rig = Rig(model)
    fixed = run(rig, at=0)
    rig.begin(4, **STATIC)
    torch.testing.assert_close(run(rig, at=0), fixed)


def test_lists_that_an_adapter_joins_share_one_decision(register):
    register(3, lambda model: model.blocks + model.more)
    rig = Rig(Registered(*PATTERNS[3]))
    assert rig.mounted.num_blocks == [N + 3]
    fixed = run(rig, at=0)
    rig.begin(4, Fn_compute_blocks=1, Bn_compute_blocks=1, **STATIC)
    torch.testing.assert_close(run(rig, at=0), fixed)


def test_a_transformer_may_be_known_by_its_pipeline(register):
    register(3)
    model = type("Renamed", (Registered,), {})(*PATTERNS[3])
    with pytest.raises(MountError, match="Renamed: no adapter describes its blocks"):
        CachedTransformer("transformer", model)
    assert "forward" not in model.__dict__
    cls = type("RegisteredPipeline", (DiffusionPipeline,), {})
    pipe = cls.__new__(cls)
    pipe.transformer = model
    assert CachedTransformer("transformer", model, pipe).num_blocks == [N, 3]


@pytest.mark.parametrize(("blocks", "words"), [
    (lambda model: model.nothing, "no attribute 'nothing'"),
    (lambda model: nn.ModuleList([One(0)]), "in no list of the transformer"),
])
def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(register, blocks, words):
    register(3, blocks)
    model = Registered(*PATTERNS[3])
    with pytest.raises(MountError, match=f"Registered: its blocks are not as declared: .*{words}"):
        CachedTransformer("transformer", model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("build", MODELS)
def test_real_classes_without_a_row_are_cached_as_with_one(build, monkeypatch):
    model = build()
    row = describe(model)
    others = {name: each for name, each in adapters.DIFFUSERS.items() if name != type(model).__name__}
    monkeypatch.setattr(adapters, "DIFFUSERS", others)
    assert adapters.find_adapter(type(model)) is None
    known = describe(model)
    assert [(each.name, each.streams, each.measured) for each in known] == [
        (each.name, each.streams, each.measured) for each in row
    ]
    rig = Mounted(build)
    stats = rig.begin(steps_computation_mask=(1, 0, 0, 1), steps_computation_policy="static")
    outputs = [rig.run(step) for step in range(4)]
    assert stats.branches["cond"].cached == [1, 2]
    assert [torch.equal(a, b) for a, b in zip(outputs, rig.before, strict=True)] == [True, False, False, True]
    assert rig.mounted.problem() is None
