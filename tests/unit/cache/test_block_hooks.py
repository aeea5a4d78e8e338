"""Block hooks in loops that do more than call their blocks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.adapters import Blocks, ModelAdapter
from sglang_cachedit_plugin.errors import MountError
from tests.unit.blocks import DIM, Rig, sample

N = 6
STATIC = {"steps_computation_mask": (1, 0, 1, 0), "steps_computation_policy": "static", "max_warmup_steps": 0}


class Step(nn.Module):
    """A block with a second stream and an argument of its own."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        generator = torch.Generator().manual_seed(index)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5)

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None, *, bias: float = 0.0) -> Any:
        moved = x + 0.5 * torch.tanh((x + (0 if text is None else text)) @ self.weight + bias)
        return moved if text is None else (moved, text + 0.1 * moved, self.index)


class InPlace(Step):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(torch.tanh(x @ self.weight))


class Later(Step):
    """Hands its update on unadded, as fused kernels do."""

    def forward(self, x: Any) -> Any:
        x = added(x)
        return x, torch.tanh(x @ self.weight)


def added(pending: Any) -> torch.Tensor:
    return pending if isinstance(pending, torch.Tensor) else pending[0] + pending[1]


class Loop(nn.Module):
    """The host's kind of model: a loop over ``blocks`` that subclasses write."""

    def __init__(self, kind: type = Step, count: int = N):
        super().__init__()
        self.blocks = nn.ModuleList(kind(index) for index in range(count))
        self.left_out: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if index not in self.left_out:
                x = block(x)
        return added(x)


class Own(Loop):
    """Two streams, an argument for each block, an addition between blocks and a look at the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        text = x * 0.5
        for index, block in enumerate(self.blocks):
            assert (len(self.blocks), block.index) == (N, index)
            x, text, number = block(x, text, bias=0.1 * index)
            assert number in (index, None)
            x = x + 0.01 * index
        return x + text


class Samples(Loop):
    """Each block runs once for each sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x, x.flip(0) * 2]
        for block in self.blocks:
            parts = [block(part) for part in parts]
        return parts[0] + parts[1]


class Joined(nn.Module):
    """Two lists that carry the same stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Step(index) for index in range(3))
        self.second = nn.ModuleList(Step(10 + index) for index in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, *self.second):
            x = block(x)
        return x


ROWS = {
    "Loop": ModelAdapter(family="loop", blocks=(Blocks(name="blocks", streams=("x",)),)),
    "Own": ModelAdapter(family="own", blocks=(Blocks(name="blocks", streams=("x", "text")),)),
    "Joined": ModelAdapter(
        family="joined",
        blocks=(Blocks(name="first", streams=("x",)), Blocks(name="second", streams=("x",), shares_decision=True)),
    ),
}


@pytest.fixture(autouse=True)
def rows() -> Iterator[None]:
    adapters.NATIVE.update(ROWS)
    yield
    for name in ROWS:
        del adapters.NATIVE[name]


class Hooked(Rig):
    def __init__(self, model: nn.Module):
        super().__init__(model)
        for path, module in model.named_modules():
            if isinstance(module, Step):
                module.register_forward_pre_hook(lambda *_, path=path: self.calls.update([path]))

    def outputs(self, at: int | None = None, steps: int = 4) -> list[torch.Tensor]:
        inputs = [sample("cond", step if at is None else at) for step in range(steps)]
        return [self.run("cond", step, inputs[step].clone()) for step in range(steps)]

    def ran(self, step: int) -> list[str]:
        self.calls.clear()
        self.run("cond", step)
        return [path for path, times in self.calls.items() for _ in range(times)]

    def plain(self, at: int | None = None) -> list[torch.Tensor]:
        self.mounted.bypass()
        return self.outputs(at)


def close(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("model", [Loop, Own, Samples, Joined])
def test_computed_steps_are_the_original_and_cached_ones_exact_on_equal_inputs(model):
    rig = Hooked(model())
    plain, fixed = rig.plain(), rig.plain(at=0)
    for first, last in ((1, 0), (2, 1), (1, 2)):
        rig.begin(4, Fn_compute_blocks=first, Bn_compute_blocks=last, **STATIC)
        outputs = rig.outputs()
        assert [torch.equal(a, b) for a, b in zip(outputs, plain, strict=True)] == [True, False, True, False]
        assert rig.stats.branches["cond"].cached == [1, 3]
        rig.begin(4, Fn_compute_blocks=first, Bn_compute_blocks=last, **STATIC)
        assert close(rig.outputs(at=0), fixed)


def test_lists_that_share_a_decision_have_one_and_one_count():
    rig = Hooked(Joined()).begin(4, Fn_compute_blocks=2, Bn_compute_blocks=1, **STATIC)
    assert rig.ran(0) == ["first.0", "first.1", "first.2", "second.0", "second.1", "second.2"]
    assert rig.ran(1) == ["first.0", "first.1", "second.2"]
    assert rig.mounted.num_blocks == [6]
    rig.begin(4, residual_diff_threshold=0.9)
    rig.outputs()
    assert list(rig.stats.branches["cond"].residual_diffs) == [1, 2, 3]


def test_samples_of_one_forward_decide_for_themselves():
    rig = Hooked(Samples()).begin(4, **STATIC)
    assert rig.ran(0) == [f"blocks.{index}" for index in range(N) for _ in range(2)]
    assert rig.ran(1) == ["blocks.0", "blocks.0"]
    assert not rig.stats.notes


@pytest.mark.parametrize("left_out", [2, 4, 5])
@pytest.mark.parametrize("last", [0, 1])
def test_a_block_that_the_loop_leaves_out_moves_the_end_of_the_middle(left_out, last):
    rig = Hooked(Loop())
    rig.model.left_out = (left_out,)
    plain, fixed = rig.plain(), rig.plain(at=0)
    rig.begin(4, Bn_compute_blocks=last, **STATIC)
    outputs = rig.outputs()
    assert torch.equal(outputs[0], plain[0]) and torch.equal(outputs[2], plain[2])
    rig.begin(4, Bn_compute_blocks=last, **STATIC)
    assert close(rig.outputs(at=0), fixed)


def test_where_a_loop_leaves_out_its_first_block_the_states_themselves_are_compared():
    rig = Hooked(Loop()).begin(4, residual_diff_threshold=0.9)
    rig.run("cond", 0)
    rig.model.left_out = (0,)
    for step in (1, 2):
        rig.run("cond", step)
    values = [sample("cond", step) for step in (1, 2)]
    expected = float((values[1] - values[0]).abs().sum() / values[0].abs().sum())
    stats = rig.stats.branches["cond"]
    assert (stats.computed, stats.cached) == ([0, 1], [2])
    assert stats.residual_diffs[2] == pytest.approx(expected, rel=1e-4)


def test_a_loop_that_ends_before_the_middle_does_is_computed_and_says_so():
    rig = Hooked(Loop())
    rig.model.left_out = (N - 1,)
    plain = rig.plain()
    rig.begin(4, **STATIC)
    outputs = rig.outputs()
    assert all(map(torch.equal, outputs, plain))
    assert rig.stats.branches["cond"].cached == []
    assert any("left out its last block" in note for note in rig.stats.notes)


def test_blocks_that_overwrite_their_input_need_copies(monkeypatch):
    def cached(in_place: bool) -> str | None:
        row = ModelAdapter(family="x", blocks=(Blocks(name="blocks", streams=("x",), in_place=in_place),))
        monkeypatch.setitem(adapters.NATIVE, "Loop", row)
        rig = Hooked(Loop(InPlace))
        fixed = rig.plain(at=0)
        rig.begin(4, **STATIC)
        assert close(rig.outputs(at=0), fixed)
        return rig.mounted.problem()

    assert cached(in_place=True) is None
    assert cached(in_place=False) == "Loop: blocks: block 0 overwrites its input x"


def test_a_stream_that_a_block_hands_on_unfinished_is_materialized(monkeypatch):
    rig = Hooked(Loop(Later)).begin(4, **STATIC)
    rig.outputs()
    assert "a block's states are tuple" in rig.mounted.problem()
    row = ModelAdapter(family="x", blocks=(Blocks(name="blocks", streams=("x",), materialize="added"),))
    monkeypatch.setitem(adapters.NATIVE, "Loop", row)
    rig = Hooked(Loop(Later))
    fixed = rig.plain(at=0)
    rig.begin(4, Bn_compute_blocks=1, **STATIC)
    assert close(rig.outputs(at=0), fixed)


def test_a_computed_step_keeps_the_states_that_its_residual_needs_and_no_others():
    inputs: list[weakref.ref] = []
    alive: list[list[int]] = []

    def look(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(weakref.ref(args[0]))
        alive.append([index for index, each in enumerate(inputs) if each() is not None])

    rig = Hooked(Loop())
    for block in rig.model.blocks:
        block.register_forward_pre_hook(look)
    rig.begin(4, **STATIC)
    for step in (0, 2):
        inputs.clear()
        alive.clear()
        rig.run("cond", step)
        # Each block's own input, and from the second on the states at which the middle begins.
        assert [set(each) - {0} for each in alive] == [set(), {1}, {1, 2}, {1, 3}, {1, 4}, {1, 5}], step


def test_blocks_that_lack_a_declared_stream_are_refused():
    with pytest.raises(MountError, match=r"Own: its blocks are not as declared: blocks"):
        Hooked(Own(InPlace))


def test_an_empty_list_is_left_aside():
    model = Joined()
    model.second = nn.ModuleList()
    rig = Hooked(model).begin(4, **STATIC)
    assert rig.ran(0) == ["first.0", "first.1", "first.2"]
    assert rig.ran(1) == ["first.0"]


def test_blocks_stay_submodules_of_their_transformer_alone():
    rig = Hooked(Loop())
    before = list(rig.model.state_dict())
    rig.begin(4, **STATIC).run("cond", 0)
    assert list(rig.model.state_dict()) == before
    assert [type(block) for block in rig.model.blocks] == [Step] * N


def test_under_torch_compile_each_block_is_still_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    rig = Hooked(Loop())
    plain = rig.plain()
    rig.begin(4, **STATIC)
    rig.model.compile(backend=backend)
    try:
        assert all(torch.equal(a, b) for a, b in zip(rig.outputs()[::2], plain[::2], strict=True))
        assert rig.stats.branches["cond"].cached == [1, 3]
        assert any("tanh" in graph.code for graph in graphs)
        assert len(graphs) <= 3
    finally:
        torch._dynamo.reset()
