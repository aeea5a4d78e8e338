"""Mounting diffusers' own transformers: one list, two lists as one, two decisions."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)

from sglang_cachedit_plugin.cache.block_lists import describe
from sglang_cachedit_plugin.cache.cached_model import CachedTransformer, preset_mask
from sglang_cachedit_plugin.cache.spec import Identity, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.report.stats import TransformerStats
from tests.unit.blocks import wanted

STEPS = 4


def flux() -> torch.nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def qwen() -> torch.nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )


def wan() -> torch.nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=4, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=16,
    )


def chroma() -> torch.nn.Module:
    return ChromaTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )


def inputs(build, step: int) -> dict:
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (1 - step / 10)

    text = {"encoder_hidden_states": noise(1, 3, 16), "timestep": torch.tensor([1.0 - step / STEPS])}
    if build is wan:
        return {**text, "hidden_states": noise(1, 4, 1, 4, 4), "timestep": torch.tensor([900 - 100 * step])}
    if build is qwen:
        return {**text, "hidden_states": noise(1, 4, 8), "encoder_hidden_states_mask": torch.ones(1, 3).bool(),
                "img_shapes": [[(1, 2, 2)]], "txt_seq_lens": [3]}
    ids = {"hidden_states": noise(1, 4, 8), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    if build is chroma:
        return {**text, **ids}
    return {**text, **ids, "pooled_projections": noise(1, 16), "guidance": torch.ones(1)}


MODELS = [flux, qwen, wan, chroma]


@pytest.fixture(params=MODELS, ids=["flux", "qwen", "wan", "chroma"])
def build(request):
    return request.param


def widened(build) -> torch.nn.Module:
    torch.manual_seed(3)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
    return model


class Mounted:
    """A mounted model whose identities the test names."""

    def __init__(self, build, hook: ModelHook | None = None):
        self.build, self.model = build, widened(build)
        if hook is not None:
            add_hook_to_module(self.model, hook)
        self.lists = [n for n in ("transformer_blocks", "single_transformer_blocks", "blocks")
                      if hasattr(self.model, n)]
        self.calls: Counter[str] = Counter()
        for name in self.lists:
            for index, block in enumerate(getattr(self.model, name)):
                block.register_forward_hook(lambda *_, key=f"{name}.{index}": self.calls.update([key]))
        self.before = [self.run(step) for step in range(STEPS)]
        self.mounted = CachedTransformer("transformer", self.model)
        self.identity: Identity | None = None

    @torch.no_grad()
    def run(self, step: int) -> torch.Tensor:
        self.identity = Identity("cond", step)
        self.calls.clear()
        return self.model(**inputs(self.build, step), return_dict=False)[0]

    def begin(self, **knobs) -> TransformerStats:
        settings = CacheSettings(max_warmup_steps=1, **knobs)
        plan, _ = build_plan(settings, STEPS, preset_mask)
        stats = TransformerStats(steps=STEPS)
        spec = TransformerSpec(name="transformer", settings=settings, plan=plan)
        self.mounted.refresh(wanted(spec, stats, lambda name, kwargs: self.identity))
        return stats


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_all_computed_and_off_are_the_original_bit_for_bit(build):
    rig = Mounted(build)
    assert same([rig.run(step) for step in range(STEPS)], rig.before)
    rig.begin(steps_computation_mask=(1,) * STEPS)
    assert same([rig.run(step) for step in range(STEPS)], rig.before)
    stats = rig.begin(steps_computation_mask=(1, 0, 0, 1), steps_computation_policy="static")
    cached = [rig.run(step) for step in range(STEPS)]
    assert stats.branches["cond"].cached == [1, 2]
    assert [torch.equal(a, b) for a, b in zip(cached, rig.before, strict=True)] == [True, False, False, True]
    rig.mounted.bypass()
    assert same([rig.run(step) for step in range(STEPS)], rig.before)


@pytest.mark.parametrize("build", [flux, qwen, wan])
@pytest.mark.parametrize(("first", "last"), [(1, 0), (1, 2), (3, 1)])
def test_a_cached_step_runs_the_first_and_last_blocks_only(build, first, last):
    rig = Mounted(build)
    rig.run(0)
    order = list(rig.calls)
    assert len(order) == rig.mounted.num_blocks[0]
    rig.begin(
        Fn_compute_blocks=first, Bn_compute_blocks=last,
        steps_computation_mask=(1, 0, 1, 0), steps_computation_policy="static",
    )
    kept = order[:first] + order[len(order) - last :]
    for step, expected in enumerate([order, kept, order, kept]):
        rig.run(step)
        assert list(rig.calls) == expected
        assert set(rig.calls.values()) == {1}


def test_unmount_gives_everything_back(build):
    rig = Mounted(build)
    rig.begin(residual_diff_threshold=1.0)
    rig.run(0)
    rig.mounted.unmount()
    assert "forward" not in rig.model.__dict__
    assert same([rig.run(step) for step in range(STEPS)], rig.before)


def test_a_second_mount_works_after_the_first_was_undone(build):
    rig = Mounted(build)
    rig.mounted.unmount()
    rig.mounted = CachedTransformer("transformer", rig.model)
    stats = rig.begin(residual_diff_threshold=1.0, max_continuous_cached_steps=1)
    for step in range(STEPS):
        rig.run(step)
    assert stats.branches["cond"].computed == [0, 2]


class _Counted(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("build", [qwen, wan, flux])
def test_an_offload_hook_goes_on_working(build):
    hook = _Counted()
    rig = Mounted(build, hook)
    hook.calls = 0
    stats = rig.begin(residual_diff_threshold=1.0, max_continuous_cached_steps=1)
    for step in range(STEPS):
        rig.run(step)
    assert hook.calls == STEPS
    assert stats.branches["cond"].computed == [0, 2]


def test_a_mount_that_fails_late_leaves_the_original_forward(monkeypatch):
    model = widened(flux)

    def fails(shared, block):
        raise MountError("a block of another kind")

    monkeypatch.setattr("sglang_cachedit_plugin.cache.block_hooks.SharedBlockState.hook", fails)
    with pytest.raises(MountError, match="a block of another kind"):
        CachedTransformer("transformer", model)
    assert "forward" not in model.__dict__


def test_a_class_nobody_describes_is_named():
    with pytest.raises(MountError, match=r"^Linear: "):
        describe(torch.nn.Linear(2, 2))


def test_a_class_whose_output_alone_can_be_forecast_is_refused_with_the_reason():
    from sglang_cachedit_plugin import adapters

    model = type("SanaVideo2Transformer3DModel", (torch.nn.Module,), {})()
    row = adapters.NATIVE["SanaVideo2Transformer3DModel"]
    with pytest.raises(MountError, match=f"^SanaVideo2Transformer3DModel: {re.escape(row.output_only)}$"):
        describe(model)
    assert row.describe().endswith(row.output_only)


def test_blocks_that_are_not_as_the_table_says_are_refused_untouched():
    from sglang_cachedit_plugin import adapters

    class Krea2Transformer2DModel(torch.nn.Module):
        pass

    assert "Krea2Transformer2DModel" in adapters.NATIVE
    model = Krea2Transformer2DModel()
    with pytest.raises(MountError, match="Krea2Transformer2DModel: its blocks are not as declared"):
        CachedTransformer("transformer", model)
    assert "forward" not in model.__dict__
