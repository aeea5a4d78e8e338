"""Stages with a denoising loop of their own: entered with the right identities, or declined with the reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import SimpleNamespace

import pytest
import torch

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import read_environment
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.integration import native, native_stages
from sglang_cachedit_plugin.integration.request import WORKER
from tests.models.native.cases import CASES
from tests.models.native.harness import MASK, STEPS, Rig, batch, distance, noise, set_arguments
from tests.models.native.test_native_models import rig

STAGES = "sglang.multimodal_gen.runtime.pipelines_core.stages"
LOOPS = re.compile(r"(Denois|Rollout|TexGen|Refine|ComfyUIStep|AR$)")
STATIC = {"steps_computation_mask": MASK, "scm_policy": "static", "max_warmup_steps": 0}


@pytest.fixture(autouse=True)
def nothing_open():
    yield
    WORKER.active.sessions.clear()
    WORKER.active.stages.clear()


def stage_classes() -> dict[str, type]:
    """Stages of the host whose name says that they denoise."""
    package = importlib.import_module(STAGES)
    found = {}
    for info in pkgutil.walk_packages(package.__path__, f"{STAGES}."):
        for name, cls in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(cls) and cls.__module__ == info.name and LOOPS.search(name):
                found[name] = cls
    base = importlib.import_module(f"{STAGES}.base").PipelineStage
    return {name: cls for name, cls in found.items() if issubclass(cls, base) and "BeforeDenoising" not in name}


def asks(cls: type) -> bool:
    """Whether the forward of a stage leads to the host's own question for caching."""
    base = importlib.import_module(f"{STAGES}.denoising").DenoisingStage
    if not issubclass(cls, base):
        return False
    home = next(each for each in cls.__mro__ if "forward" in vars(each))
    words = ("_maybe_enable_cache_dit", "super().forward(", "_prepare_denoising_loop(", "super()._prepare")
    return home is base or any(word in inspect.getsource(home) for word in words)


def test_every_stage_with_a_loop_of_its_own_is_known():
    classes = stage_classes()
    assert len(classes) > 25
    unknown = {name for name, cls in classes.items() if native_stages.of(cls) is None and not asks(cls)}
    assert unknown == {
        # One holds a denoising stage, one decodes, one writes tokens: they do not denoise.
        "ProgressiveDenoisingStageRouter", "SanaWMRefinerDecodingStage", "GlmImageAR",
    }
    assert set(native_stages.OWN_LOOPS) <= set(classes)


def run(stage, request) -> dict:
    """The report of one request that goes through the plugin's hook around stages."""
    native.run_stage(type(stage).forward, stage, request, set_arguments())
    return request.metrics.cache_dit


def request(**knobs) -> SimpleNamespace:
    made = batch(True, knobs)
    made.metrics = SimpleNamespace()
    made.num_inference_steps = STEPS
    return made


def on_host(name: str, module: str, forward, transformer=None):
    """An instance of a stage class of the host with another loop."""
    cls = getattr(importlib.import_module(f"{STAGES}.{module}"), name)
    stage = type(name, (cls,), {"forward": forward}).__new__(type(name, (cls,), {"forward": forward}))
    stage.transformer = transformer
    return stage


@torch.no_grad()
def test_sana_video_2_forecasts_outputs_in_the_hosts_own_loop():
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.sana_video2 import (
        SanaVideo2DenoisingStage,
    )

    each = rig("SanaVideo2Transformer3DModel")
    stage = SanaVideo2DenoisingStage(each.model)
    stage.begin_declared_component_use = lambda **kwargs: None
    forwards = []
    hook = each.model.register_forward_hook(lambda *_: forwards.append(1))

    def generate(**knobs):
        made = request(**knobs) if knobs else batch(False, {})
        made.timesteps, made.metrics, made.flow_shift = None, SimpleNamespace(), 3.0
        made.num_inference_steps, made.do_classifier_free_guidance, made.guidance_scale = STEPS, True, 4.0
        made.prompt_embeds, made.negative_prompt_embeds = [noise(3, 1, 6, 8)], [noise(4, 1, 6, 8)]
        made.prompt_attention_mask = made.negative_attention_mask = [torch.ones(1, 6)]
        made.latents = noise(5, 1, 4, 3, 4, 4)
        report = run(stage, made)
        return made.latents, report

    plain, _ = generate()
    cached, report = generate(forecast="output", **STATIC)
    hook.remove()
    assert report["transformers"]["transformer"]["branches"]["cond"]["cached"] == [2, 4]
    assert 1e-4 < distance([cached], [plain]) < 1.0
    _, report = generate(**STATIC)
    assert not report["enabled"]
    assert "forecast: output" in report["reason"]


@torch.no_grad()
def test_cosmos_3_branches_are_named_by_the_key_of_their_prompt():
    each = rig("Cosmos3OmniTransformer")
    inputs = each.case.inputs(0, 0)
    each.case.fresh(each.model)

    def forward(self, made, server_args):
        for step in range(STEPS):
            for key in ("cond", "uncond"):
                self._run_transformer(
                    latents=inputs["hidden_states"], timestep=inputs["timestep"], text_ids=inputs["text_ids"],
                    text_mask=inputs["text_mask"], video_shape=None, fps=24.0, cache_key=key, current_timestep=step,
                )
        return made

    stage = on_host("Cosmos3DenoisingStage", "model_specific_stages.cosmos3", forward, each.model)
    stage._extra_transformer_kwargs = {}
    branches = run(stage, request(**STATIC))["transformers"]["transformer"]["branches"]
    assert {name: branch["cached"] for name, branch in branches.items()} == {"cond": [2, 4], "uncond": [2, 4]}


@torch.no_grad()
@pytest.mark.parametrize("forecast", ["residual", "output"])
def test_cosmos_3_guidance_that_ends_midway_goes_on_without_the_other_half_of_the_batch(forecast):
    each = rig("Cosmos3OmniTransformer")
    shapes = []

    def forward(self, made, server_args):
        each.case.fresh(each.model)
        for step in range(STEPS):
            inputs = each.case.inputs(0, step)
            common = {
                "latents": inputs["hidden_states"], "timestep": inputs["timestep"], "video_shape": None, "fps": 24.0,
                "current_timestep": step,
            }
            prompt = {"cond_text_ids": inputs["text_ids"], "cond_text_mask": inputs["text_mask"]}
            if step < 4:
                other = {name.replace("cond", "uncond"): value.clone() for name, value in prompt.items()}
                output = self._predict_noise_cfg_batched(**common, **prompt, **other, guidance_scale=4.0)
            else:
                output = self._run_transformer(
                    **common, text_ids=inputs["text_ids"], text_mask=inputs["text_mask"], cache_key="cond"
                )
            shapes.append(output.shape == inputs["hidden_states"].shape)
        return made

    stage = on_host("Cosmos3DenoisingStage", "model_specific_stages.cosmos3", forward, each.model)
    stage._extra_transformer_kwargs = {}
    report = run(stage, request(**STATIC, forecast=forecast))
    (branch,) = report["transformers"]["transformer"]["branches"].values()
    assert (branch["computed"], branch["cached"]) == ([0, 1, 3, 4, 5], [2])
    assert all(shapes)
    assert report["reason"] == "transformer: cond: its input changed shape or dtype at step 4, computed anew"


@torch.no_grad()
def test_wan_animate_branches_are_named_by_their_flag():
    from sglang.multimodal_gen.runtime.distributed.cfg_policy import CFGBranch

    each = rig("WanAnimate2Transformer3DModel")
    keys = each.case.fresh(each.model)
    inputs = each.case.inputs(0, 0, **keys)
    branches = [
        CFGBranch("conditional", True, {"encoder_hidden_states": inputs["encoder_hidden_states"]}),
        CFGBranch(
            "unconditional", False,
            {"encoder_hidden_states": inputs["encoder_hidden_states"], "is_unconditional": True},
        ),
    ]

    def forward(self, made, server_args):
        for step in range(STEPS):
            ctx = SimpleNamespace(
                latents=inputs["hidden_states"], clip_condition=inputs["clip_cond"], context_by_branch={},
                reference_kv=inputs["reference_kv"], cfg_parallel=False, guidance_scale=4.0,
                reference_image_embeddings=inputs["encoder_hidden_states_image"],
                cfg_policy=SimpleNamespace(branches=branches),
                scheduler=SimpleNamespace(step=lambda noise, t, x, return_dict: (x,)),
            )
            state = SimpleNamespace(step_index=step, t_device=torch.tensor(500.0), current_guidance_scale=4.0)
            self._run_denoising_step(ctx, state, made, server_args)
        return made

    stage = on_host("WanAnimate2DenoisingStage", "model_specific_stages.wan_animate_2.denoising", forward, each.model)
    stage.transformer_2 = None
    branches_seen = run(stage, request(**STATIC))["transformers"]["transformer"]["branches"]
    assert {name: seen["cached"] for name, seen in branches_seen.items()} == {"cond": [2, 4], "uncond": [2, 4]}


@torch.no_grad()
def test_ltx_2_steps_are_named_though_its_context_holds_no_request():
    each = rig("LTX2VideoTransformer3DModel")

    def forward(self, made, server_args):
        native.CacheDitDenoisingMixin._maybe_enable_cache_dit(self, STEPS, made)
        for index in range(STEPS):
            state = SimpleNamespace(step_index=index, current_model=self.transformer, attn_metadata=None)
            with self._ltx2_model_forward_context(SimpleNamespace(use_ltx23_hq_timestep_semantics=False), state):
                self.transformer(**each.case.inputs(0, index))
        return made

    stage = on_host("LTX2DenoisingStage", "model_specific_stages.ltx_2.denoising", forward, each.model)
    stage.transformer_2, stage.server_args, stage._disable_cache_dit_for_request = None, set_arguments(), False
    (branch,) = run(stage, request(**STATIC))["transformers"]["transformer"]["branches"].values()
    assert branch["cached"] == [2, 4]


@torch.no_grad()
def test_ideogram_4_counts_its_steps_down():
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
    from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.ideogram import Ideogram4Scheduler

    positive, negative = (Rig(CASES["Ideogram4Transformer2DModel"]) for _ in range(2))
    scheduler = Ideogram4Scheduler()
    scheduler.set_timesteps(STEPS, device="cpu")

    def forward(self, made, server_args):
        made.timesteps = scheduler.timesteps
        native.CacheDitDenoisingMixin._maybe_enable_cache_dit(self, STEPS, made)
        for index, remaining in enumerate(scheduler.timesteps):
            for module in (self.transformer, self.transformer_2):
                with set_forward_context(current_timestep=int(remaining), attn_metadata=None, forward_batch=made):
                    module(**positive.case.inputs(0, index))
        return made

    stage = on_host("Ideogram4DenoisingStage", "model_specific_stages.ideogram", forward, positive.model)
    stage.unconditional_transformer = stage.transformer_2 = negative.model
    stage.server_args = set_arguments()
    transformers = run(stage, request(**STATIC))["transformers"]
    cached = {name: {branch: seen["cached"] for branch, seen in each["branches"].items()}
              for name, each in transformers.items()}
    assert cached == {"transformer": {"cond": [2, 4]}, "transformer_2": {"uncond": [2, 4]}}


@pytest.mark.parametrize("name", [name for name, loop in native_stages.OWN_LOOPS.items() if loop.refused])
def test_a_declined_stage_runs_with_the_reason_or_fails_with_strict(name):
    ran = []
    cls = stage_classes()[name]
    stage = type(name, (cls,), {}).__new__(cls)

    def forward(self, made, server_args):
        ran.append(made)
        return made

    made = request()
    native.run_stage(forward, stage, made, set_arguments())
    assert made.metrics.cache_dit["reason"] == f"{name}: {native_stages.of(cls).refused}"
    assert not made.metrics.cache_dit["enabled"]
    with pytest.raises(MountError, match=name):
        native.run_stage(forward, stage, request(strict=True), set_arguments())
    assert ran == [made]


def test_requests_of_another_kind_pass_through():
    cls = stage_classes()["VLAActionDenoisingStage"]
    answer = native.run_stage(lambda stage, made, args: made, cls.__new__(cls), "action", set_arguments())
    assert answer == "action"
    assert WORKER.active.sessions == []


@pytest.mark.parametrize(
    ("field", "reason"), [("enable_teacache", "TeaCache"), ("enable_spectrum", "Spectrum")]
)
def test_what_the_host_does_itself_is_not_done_twice(field, reason):
    each = rig("LTX2VideoTransformer3DModel")
    made = request(**STATIC)
    setattr(made, field, True)
    native.CacheDitDenoisingMixin._maybe_enable_cache_dit(each.stage, STEPS, made)
    assert reason in WORKER.active.sessions.pop().close().as_dict()["reason"]
    assert not each.stage._cache_dit_enabled


@torch.no_grad()
def test_a_picture_that_grows_during_denoising_starts_anew():
    each: Rig = rig("FluxTransformer2DModel")
    made = request(steps_computation_mask=[1, 0, 0, 0, 0, 0], scm_policy="static", enable_taylorseer=True,
                   max_warmup_steps=0, max_continuous_cached_steps=-1)
    native.CacheDitDenoisingMixin._maybe_enable_cache_dit(each.stage, STEPS, made)
    outputs = []
    for step in range(STEPS):
        if step == 3:
            native.CacheDitDenoisingMixin._refresh_cache_dit_context(each.stage, 3, None)
        outputs.append(each.step(made, int(step >= 3), step))
    report = WORKER.active.sessions.pop().close().as_dict()
    assert report["transformers"]["transformer"]["branches"]["cond"]["computed"] == [0, 3]
    assert [output.shape[1] for output in outputs] == [16, 16, 16, 24, 24, 24]


def test_a_worker_names_what_cannot_be_cached(monkeypatch):
    each = rig("SanaVideo2Transformer3DModel")
    worker = SimpleNamespace(pipeline=SimpleNamespace(modules={"transformer": each.model, "scheduler": object()}))
    lines = []
    monkeypatch.setattr("sglang_cachedit_plugin.integration.sglang_api.logger", lambda: SimpleNamespace(
        warning=lambda text, *args: lines.append(text % args)
    ))

    def install(**variables):
        environment, _ = read_environment({f"SGLANG_CACHE_DIT_{name}": text for name, text in variables.items()})
        monkeypatch.setattr(effective, "_current", Defaults(environment=environment))

    native.check_worker(worker)
    assert lines == []
    install(ENABLED="true")
    native.check_worker(worker)
    (line,) = lines
    assert line.startswith("cache-dit: off [model]: transformer: SanaVideo2Transformer3DModel: every block attends")
    install(ENABLED="true", FORECAST="output")
    native.check_worker(worker)
    assert len(lines) == 1
    install(ENABLED="true", STRICT="true")
    with pytest.raises(MountError, match="SanaVideo2"):
        native.check_worker(worker)
