"""The host's layerwise offload under a mount: its hooks are on the blocks, so what does not run is not brought.

The host's own manager, on the CPU in place of a device with memory of its own.
"""

from __future__ import annotations

import pytest
import torch
from sglang.multimodal_gen.runtime.managers.memory_managers.layerwise_offload import LayerwiseOffloadManager

from tests.tiny.streams import device_with_streams
from tests.unit.blocks import Rig, known_classes

BLOCKS = 6


@pytest.fixture
def brought(monkeypatch):
    """Layers that were brought to the device since the last look."""
    layers: list[int] = []
    own = LayerwiseOffloadManager.prefetch_layer

    def prefetch_layer(self, index, non_blocking=True):
        before = index in self._gpu_layers
        own(self, index, non_blocking)
        if not before and index in self._gpu_layers:
            layers.append(index)

    monkeypatch.setattr(LayerwiseOffloadManager, "prefetch_layer", prefetch_layer)
    with known_classes(), device_with_streams():
        yield layers


def rig(offloaded: bool) -> Rig:
    rig = Rig()
    if offloaded:
        LayerwiseOffloadManager(
            rig.model, layers_attr_str="transformer_blocks", num_layers=BLOCKS, enabled=True, pin_cpu_memory=False,
        )
    return rig


STATIC = {"steps_computation_mask": (1, 1, 0, 0, 1, 0), "steps_computation_policy": "static", "max_warmup_steps": 0}


@pytest.mark.parametrize("knobs", [{}, {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, {"forecast": "output"}])
def test_pictures_are_the_same_and_cached_steps_bring_only_what_runs(brought, knobs):
    plain, offloaded = (rig(each).begin(6, **STATIC, **knobs) for each in (False, True))
    for step, computed in enumerate(STATIC["steps_computation_mask"]):
        brought.clear()
        assert torch.equal(offloaded.run("cond", step), plain.run("cond", step)), step
        if computed:
            assert set(range(1, BLOCKS)) <= set(brought) | {1}
        elif knobs.get("forecast") == "output":
            assert brought == []
        else:
            # What runs, and the one that the host brings ahead of its turn.
            first, last = knobs.get("Fn_compute_blocks", 1), knobs.get("Bn_compute_blocks", 0)
            allowed = {*range(first + 1), *range(BLOCKS - last, BLOCKS), *((0,) if last else ())}
            assert set(brought) <= allowed, step
    assert offloaded.stats.branches["cond"].cached == [2, 3, 5]
