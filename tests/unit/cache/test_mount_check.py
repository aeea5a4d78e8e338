"""The mount probe: blocks that break a rule are found on the first forward, and caching is off with the reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.adapters import Blocks, ModelAdapter
from sglang_cachedit_plugin.cache.cached_model import CachedModel
from sglang_cachedit_plugin.cache.mount_check import BlockProbe
from sglang_cachedit_plugin.cache.spec import Identity
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.integration.request import Facts, Session

STEPS, SIZE, DIM = 5, 4, 8


class Block(nn.Module):
    """Adds a bounded function of its input."""

    def __init__(self, seed: int):
        super().__init__()
        self.weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed)) / DIM**0.5

    def change(self, hidden_states):
        return 0.5 * torch.tanh(hidden_states @ self.weight)

    def forward(self, hidden_states):
        return hidden_states + self.change(hidden_states)


class InPlace(Block):
    def forward(self, hidden_states):
        return hidden_states.add_(self.change(hidden_states))


class Hidden(Block):
    """Writes into its input as a foreign kernel does, past torch's count of writes."""

    def forward(self, hidden_states):
        result = super().forward(hidden_states)
        hidden_states.numpy()[...] = 0.0
        return result


class Same(Block):
    def forward(self, hidden_states):
        return hidden_states


class Wider(Block):
    def forward(self, hidden_states):
        return torch.cat([super().forward(hidden_states), hidden_states[:, :1]], dim=1)


class Probed(nn.Module):
    """Runs its blocks in the order that the test gives."""

    def __init__(self, kind=Block, order=range(SIZE)):
        super().__init__()
        self.blocks = nn.ModuleList(kind(seed) for seed in range(SIZE))
        self.order = list(order)

    def forward(self, hidden_states):
        hidden_states = hidden_states + 0.0
        for index in self.order:
            hidden_states = self.blocks[index](hidden_states)
        return hidden_states


class Served:
    """Requests to one model through a session."""

    def __init__(self, model: nn.Module, row: ModelAdapter, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(adapters.NATIVE, type(model).__name__, row)
        self.model, self.step = model, 0
        self.plain = [self.forward(step) for step in range(STEPS)]
        self.cached = CachedModel({"transformer": model})

    @torch.no_grad()
    def forward(self, step: int) -> torch.Tensor:
        self.step = step
        start = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(9))
        return self.model(start * (1 + 0.1 * step))

    def request(self, **knobs) -> tuple[list[torch.Tensor], dict]:
        wanted = {"steps_computation_mask": [1, 0, 1, 0, 0], "scm_policy": "static", "max_warmup_steps": 0, **knobs}
        session = Session("native", Defaults().decide(True, wanted))
        session.open(self.cached, Facts(
            steps={"transformer": (0, STEPS)}, identify=lambda name, kwargs: Identity("cond", self.step)
        ))
        try:
            return [self.forward(step) for step in range(STEPS)], session.stats.as_dict()
        finally:
            self.report = session.close().as_dict()

    def is_plain(self, outputs: list[torch.Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(outputs, self.plain, strict=True))


ROW = ModelAdapter(family="test", blocks=(Blocks(name="blocks", streams=("hidden_states",)),))


@pytest.mark.parametrize("edges", [(1, 0), (1, 2), (2, 1)])
def test_blocks_that_keep_the_rules_are_cached_from_the_first_step_on(edges, monkeypatch):
    served = Served(Probed(), ROW, monkeypatch)
    for _ in range(2):
        outputs, _ = served.request(Fn_compute_blocks=edges[0], Bn_compute_blocks=edges[1])
        assert served.report["reason"] is None
        assert served.report["transformers"]["transformer"]["branches"]["cond"]["cached"] == [1, 3, 4]
        assert [torch.equal(*pair) for pair in zip(outputs, served.plain, strict=True)] == [1, 0, 1, 0, 0]
    assert not served.cached.mounted["transformer"].probe.due(*edges)


BROKEN = [
    (lambda: Probed(InPlace), "block 0 overwrites its input hidden_states"),
    (lambda: Probed(Hidden), "is overwritten before its residual is made"),
    (lambda: Probed(Same), "returned in its own place"),
    (lambda: Probed(Wider), r"block 0 makes \(1, 4, 8\) of hidden_states \(1, 3, 8\)"),
    (lambda: Probed(order=[3, 2, 1, 0]), "block 3 runs first"),
    (lambda: Probed(order=[0, 1, 1, 2, 3]), "block 1 runs after block 1"),
    (lambda: Probed(order=[]), "none of its blocks ran"),
]


@pytest.mark.parametrize(("model", "reason"), BROKEN)
def test_a_broken_rule_switches_caching_off_with_the_reason(model, reason, monkeypatch):
    served = Served(model(), ROW, monkeypatch)
    for _ in range(2):
        outputs, _ = served.request()
        assert served.is_plain(outputs)
        assert served.report["enabled"] is False
        assert served.report["cached_steps"] == 0
        assert re.search(reason, served.report["reason"]), served.report["reason"]


def test_the_first_request_reports_the_steps_that_it_computed(monkeypatch):
    served = Served(Probed(InPlace), ROW, monkeypatch)
    served.request()
    assert served.report["transformers"]["transformer"]["branches"]["cond"]["computed"] == list(range(STEPS))


def test_strict_makes_it_an_error(monkeypatch):
    served = Served(Probed(InPlace), ROW, monkeypatch)
    with pytest.raises(MountError, match="overwrites its input"):
        served.request(strict=True)
    with pytest.raises(MountError, match="overwrites its input"):
        served.request(strict=True)
    assert served.is_plain([served.forward(step) for step in range(STEPS)])


def test_a_row_that_says_so_may_overwrite(monkeypatch):
    row = ModelAdapter(family="test", blocks=(Blocks(name="blocks", streams=("hidden_states",), in_place=True),))
    served = Served(Probed(InPlace), row, monkeypatch)
    outputs, _ = served.request()
    assert served.report["reason"] is None
    assert [torch.equal(*pair) for pair in zip(outputs, served.plain, strict=True)] == [1, 0, 1, 0, 0]


def test_a_request_that_fails_by_itself_says_nothing_about_the_mount(monkeypatch):
    served = Served(Probed(), ROW, monkeypatch)
    own = served.model.blocks[2].forward
    served.model.blocks[2].forward = lambda hidden_states: own(hidden_states) @ torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        served.request()
    served.model.blocks[2].forward = own
    served.request()
    assert served.report["cached_steps"] == 3


@pytest.mark.parametrize("failing", range(SIZE))
def test_an_error_that_does_not_come_back_costs_one_request(failing, monkeypatch):
    """The model alone gets through, but nothing was seen that the description has wrong."""
    served = Served(Probed(), ROW, monkeypatch)
    fails_once(served.model.blocks[failing])
    outputs, _ = served.request()
    assert served.is_plain(outputs)
    assert served.report["enabled"] is False and "a fault of the machine" in served.report["reason"]
    served.request()
    assert (served.report["cached_steps"], served.report["reason"]) == (3, None)


def test_an_error_that_comes_back_is_the_description_s(monkeypatch):
    served = Served(Probed(), ROW, monkeypatch)
    for _ in range(2):
        fails_once(served.model.blocks[2])
        served.request()
    outputs, _ = served.request()
    assert served.is_plain(outputs)
    assert "a fault of the machine" in served.report["reason"]


def fails_once(block):
    own = block.forward

    def forward(hidden_states):
        block.forward = own
        raise RuntimeError("a fault of the machine")

    block.forward = forward


def test_a_new_number_of_first_blocks_is_looked_at_again(monkeypatch):
    served = Served(Probed(), ROW, monkeypatch)
    served.request()
    assert served.cached.mounted["transformer"].probe.due(2, 0)
    served.request(Fn_compute_blocks=2)
    assert not served.cached.mounted["transformer"].probe.due(2, 0)


def test_inference_tensors_have_no_count_of_writes_and_are_compared(monkeypatch):
    served = Served(Probed(InPlace), ROW, monkeypatch)
    with torch.inference_mode():
        outputs, _ = served.request()
    assert served.is_plain(outputs)
    assert "is overwritten" in served.report["reason"]


def test_nothing_is_read_from_the_device_before_the_end():
    """Tensors of the meta device raise when their values are read."""
    probe = BlockProbe(Blocks(name="blocks", streams=("hidden_states",)), (1, 2))
    hidden = torch.empty(1, 3, DIM, device="meta")
    for index in range(2):
        probe.enter("blocks", index, {"hidden_states": hidden})
        hidden = hidden + 1
        probe.leave("blocks", index, hidden)
    assert probe.finish() is None
    assert [flag.device.type for _, flag in probe.flags] == ["meta", "meta"]


@pytest.mark.parametrize(("given", "returned", "right"), [
    ((1, 4, DIM), (2, 4, DIM), True), ((2, 4, DIM), (2, 4, DIM), True), ((2, 4, DIM), (1, 4, DIM), False),
    ((1, 4, DIM), (1, 2, DIM), False), ((1, 4, DIM), (4, DIM), False),
])
def test_one_text_may_serve_several_pictures(given, returned, right):
    probe = BlockProbe(Blocks(name="blocks", streams=("encoder_hidden_states",)), (1, 2))
    probe.enter("blocks", 0, {"encoder_hidden_states": torch.zeros(given)})
    probe.leave("blocks", 0, torch.zeros(returned))
    assert (probe.finish() is None) == right


def test_a_flag_of_the_device_is_read_when_the_request_ends(monkeypatch):
    """A picture already cached: the request is told, the next ones are not cached."""
    served = Served(Probed(), ROW, monkeypatch)
    served.cached.mount()
    probe = served.cached.mounted["transformer"].probe
    probe._flags.append(("blocks: hidden_states is overwritten", torch.tensor(True)))
    served.request()
    assert served.report["cached_steps"] == 3
    assert "the picture may be wrong, later requests are not cached" in served.report["reason"]
    outputs, _ = served.request()
    assert served.is_plain(outputs)
    assert (served.report["enabled"], served.report["reason"]) == (
        False, "Probed: blocks: hidden_states is overwritten"
    )
