"""The cache beneath hooks that split a transformer over ranks, and what cache-dit cannot carry out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook as OffloadHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from cache_dit.distributed.core._hooks import HookRegistry, ModelHook
from torch import nn

from sglang_cachedit_plugin.cache.cached_model import CachedTransformer
from sglang_cachedit_plugin.cache.parallel import first_residual
from sglang_cachedit_plugin.cache.spec import Identity, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.errors import CacheDitError
from sglang_cachedit_plugin.integration import cache_dit_sections, diffusers
from sglang_cachedit_plugin.integration.request import WORKER
from sglang_cachedit_plugin.report.stats import TransformerStats
from tests.unit.blocks import DIM, Rig, TinyDiT, known_classes, sample, wanted
from tests.unit.cache.test_mount import chroma, inputs


class HalfHook(ModelHook):
    """Leaves the first half of the tokens, as cache-dit's hook leaves a rank its part."""

    metadata = {"hidden_states": SimpleNamespace(split_dim=1)}  # noqa: RUF012

    def _prepare_cp_input(self, tensor: torch.Tensor, plan: SimpleNamespace) -> torch.Tensor:
        return tensor.chunk(2, dim=plan.split_dim)[0]

    def pre_forward(self, module: nn.Module, hidden_states: torch.Tensor, *args, **kwargs):
        return (self._prepare_cp_input(hidden_states, self.metadata["hidden_states"]), *args), kwargs


class CountingHook(ModelHook):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def hook(module: nn.Module, each: ModelHook) -> ModelHook:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(each, type(each).__name__)
    return each


@pytest.fixture(autouse=True)
def tiny_classes():
    with known_classes():
        yield


def wide(step: int) -> torch.Tensor:
    """Twice the tokens of ``sample``; the first half is its."""
    return torch.cat([sample("cond", step), sample("other", step)], dim=1)


def test_a_plan_that_splits_at_the_first_block_measures_this_ranks_part():
    split, whole = Rig(TinyDiT()), Rig(TinyDiT())
    hook(split.model.transformer_blocks[0], HalfHook())
    for rig in (split, whole):
        rig.begin(6, residual_diff_threshold=0.5)
    for step in range(6):
        assert torch.equal(split.run("cond", step, wide(step)), whole.run("cond", step, sample("cond", step)))
    measured = split.stats.branch("cond").residual_diffs
    assert len(measured) >= 3
    assert measured == whole.stats.branch("cond").residual_diffs
    assert split.stats.branch("cond").cached == whole.stats.branch("cond").cached != []


def test_a_part_that_nobody_explains_is_compared_itself():
    before, after = torch.ones(1, 4, DIM), torch.full((1, 3, DIM), 5.0)
    assert torch.equal(first_residual(nn.Identity(), before, after), after)
    assert torch.equal(first_residual(nn.Identity(), before[:, :3], after), torch.full((1, 3, DIM), 4.0))


def serve(mounted: CachedTransformer, seen: list, threshold: float = 1.0) -> None:
    """Start a request on a mounted diffusers transformer; identities are noted with the embeddings they came from."""
    settings = CacheSettings(max_warmup_steps=1, residual_diff_threshold=threshold)
    plan, _ = build_plan(settings, 4, None)
    step = iter(range(100))

    def identify(name, kwargs):
        seen.append(kwargs["encoder_hidden_states"])
        return Identity("cond", next(step))

    spec = TransformerSpec(name="transformer", settings=settings, plan=plan)
    mounted.refresh(wanted(spec, TransformerStats(4), identify))


def test_hooks_around_the_model_and_a_block_see_every_call():
    outputs = {}
    for hooked in (False, True):
        torch.manual_seed(0)
        model = chroma().eval()
        mounted = CachedTransformer("transformer", model)
        hooks = []
        if hooked:
            hooks = [hook(each, CountingHook()) for each in (model, model.transformer_blocks[0])]
        serve(mounted, [])
        with torch.no_grad():
            outputs[hooked] = [model(**inputs(chroma, step))[0] for step in range(3)]
        assert [each.calls for each in hooks] == [3, 3][: len(hooks)]
    for plain, under_hooks in zip(outputs[False], outputs[True], strict=True):
        assert torch.equal(plain, under_hooks)


class EmbeddingsHook(ModelHook):
    """Halves the prompt embeddings of the whole model."""

    def pre_forward(self, module: nn.Module, *args, encoder_hidden_states=None, **kwargs):
        return args, kwargs | {"encoder_hidden_states": encoder_hidden_states.chunk(2, dim=1)[0].contiguous()}


class Prompted(TinyDiT):
    """Takes prompt embeddings and keeps what it was given."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        self.given = encoder_hidden_states
        return super().forward(hidden_states)


def test_forwards_are_told_apart_by_what_the_whole_model_is_given(monkeypatch):
    model = Prompted()
    mounted = CachedTransformer("transformer", model)
    hook(model, EmbeddingsHook())
    mounted.identify_outside()
    seen: list[torch.Tensor] = []
    serve(mounted, seen)
    embeddings = torch.randn(1, 4, DIM)
    model(sample("cond", 0), encoder_hidden_states=embeddings)
    assert len(seen) == 1 and seen[0] is embeddings
    assert model.given.shape[1] == 2
    mounted.bypass()
    model(sample("cond", 0), encoder_hidden_states=embeddings)
    assert len(seen) == 1


def test_hooks_survive_offload_hooks_that_come_and_go_with_each_request(monkeypatch):
    model = TinyDiT()
    add_hook_to_module(model, OffloadHook())
    pipe = SimpleNamespace(components={"transformer": model}, device="cpu", transformer=model)
    counting = CountingHook()
    monkeypatch.setattr(cache_dit_sections.cache_dit, "load_configs", lambda sections: {})
    monkeypatch.setattr(cache_dit_sections.cache_dit, "enable_cache", lambda pipe: hook(pipe.transformer, counting))
    cache_dit_sections.apply(pipe, {"parallelism_config": {}})
    for request in range(1, 4):
        model(sample("cond", 0))
        assert counting.calls == request
        remove_hook_from_module(model)
        add_hook_to_module(model, OffloadHook())


def test_what_cache_dit_cannot_do_with_a_model_is_one_error(monkeypatch):
    def fail(sections):
        raise AssertionError("heads 3 do not divide by 2")

    monkeypatch.setattr(cache_dit_sections.cache_dit, "load_configs", fail)
    with pytest.raises(CacheDitError, match="cannot take parallelism_config of the config file: heads 3 do not"):
        cache_dit_sections.apply(SimpleNamespace(device="cpu"), {"parallelism_config": {}})
    assert torch.accelerator.current_accelerator.__module__.startswith("torch"), "nothing of cache-dit's stays replaced"


@pytest.mark.parametrize(
    ("asked", "spread", "device"), [(None, True, "cpu"), (None, False, None), ("cuda", True, "cuda")]
)
def test_ranks_that_share_a_picture_draw_its_noise_on_the_cpu(monkeypatch, asked, spread, device):
    """The host would take the rank's own device, where nothing promises equal noise."""
    params = SimpleNamespace(enable_cache_dit=None, cache_dit_params=None)
    batch = SimpleNamespace(sampling_params=params, generator_device=asked, is_warmup=False)
    pipe = nn.Identity()
    cache = WORKER.models[pipe] = diffusers.PipelineCache(pipe)
    cache.spread = spread
    monkeypatch.setattr(diffusers.sglang_api, "logger", lambda: SimpleNamespace(info=print))
    monkeypatch.setattr(diffusers.sglang_api, "publishes_metrics", lambda: False)
    seen = []
    diffusers.execute(
        lambda stage, batch, server_args: seen.append(batch.generator_device), SimpleNamespace(diffusers_pipe=pipe),
        batch, None,
    )
    assert seen == [device]
