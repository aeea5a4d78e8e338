"""Diffusers pipelines inside SGLang: the cache in DiffusersPipeline and DiffusersExecutionStage."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..cache.mount import ModelBackend
from ..cache.parallel import mesh_group
from ..cache.runtime import Groups, Identity, Runtime
from ..cache.solvers import Solver, hooked, hooked_scheduler, latents_of
from ..cache.stretch import Stretch
from ..config import effective
from ..config.config_file import file_label
from ..errors import MountError
from ..report.stats import COND
from . import cache_dit_sections, recording, sglang_api, startup
from .session import Session, decide, publish

_NAMES = {"pred_cond": COND, "pred_uncond": "uncond", "conditional": COND, "unconditional": "uncond"}


class PipelineCache:
    """The cache of one diffusers pipeline.

    Branches are named by the pipeline's own ``cache_context``; where it has none, by the prompt
    embeddings that a forward gets. A step is a step of the pipeline's scheduler, whatever was asked for: a run of
    the loop takes part of its timesteps with image-to-image, and more than were asked for with solvers of second
    order. What it takes is known with its first forward, from ``begin_index`` and the pipeline's ``num_timesteps``;
    the scheduler's first step confirms it.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        modules = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
        self.modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        self.backend = ModelBackend(self.modules, self.identify, pipe=pipe)
        self.runtime = Runtime(self.backend)
        self.session: Session | None = None
        self.spread = self.compiled = False
        self._step = self._asked = 0
        self._loop_set = False
        self._stretch: Stretch | None = None
        self._context_name: str | None = None
        self._embeddings: list[torch.Tensor] = []
        if recording.folder() is not None and hasattr(pipe, "set_progress_bar_config"):
            # The tuner makes hundreds of requests; their bars would bury its own progress.
            pipe.set_progress_bar_config(disable=True)

    @property
    def refusal(self) -> str | None:
        """Why nothing of the pipeline can be cached, None where something can."""
        name = type(self.pipe).__name__
        if self.modules:
            counts = hasattr(getattr(self.pipe, "scheduler", None), "set_timesteps")
            return None if counts else f"{name} has no scheduler, so its steps cannot be counted"
        if getattr(self.pipe, "unet", None) is not None:
            return f"{name} denoises with a UNet, only transformers are cached"
        return f"{name} has no transformer"

    def mount(self) -> None:
        """Mount now; MountError is kept for the first request that wants caching."""
        if self.refusal is not None:
            raise MountError(self.refusal)
        self.runtime.mount()

    def identify(self, name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        """Branch and step of a forward of transformer ``name``; None for one that is no denoising step."""
        if not self._loop_set:
            # GLM-Image fills its attention cache from a picture before the loop.
            return None
        if self._stretch is None:
            self._follow()
        if not self.session.stats.enabled:
            return None
        if self._context_name is not None:
            branch = _NAMES.get(self._context_name, self._context_name)
        else:
            branch = self._branch_of(name, kwargs.get("encoder_hidden_states"))
        return Identity(branch=branch, step=self._step)

    def _branch_of(self, name: str, embeddings: Any) -> str:
        if not isinstance(embeddings, torch.Tensor):
            return COND
        for index, known in enumerate(self._embeddings):
            if known.data_ptr() == embeddings.data_ptr() and known.shape == embeddings.shape:
                return _branch_name(index)
        if self._step == 0:
            # Held until the request ends, so that no other tensor can take the address.
            self._embeddings.append(embeddings)
            return _branch_name(len(self._embeddings) - 1)
        if len(self._embeddings) > 1:
            # Several branches whose embeddings are made anew on each step: nothing tells them apart.
            self.backend.mounted[name].contexts.disable_branch(COND)
        # One forward a step with new embeddings each time (batched CFG) is one branch; a second forward
        # in the same step would be refused as ambiguous.
        return COND

    @contextmanager
    def request(
        self, session: Session, num_steps: int, size: tuple[int, ...] | None = None, *, warmup: bool = False
    ) -> Iterator[None]:
        """Run one pipeline call under ``session``."""
        self.session, self._asked, self._loop_set = session, num_steps, False
        self.backend.groups = Groups(forward=next(map(mesh_group, self.modules.values()), None))
        with self._named_contexts(), self._counted_steps() as solver:
            try:
                asked = dict.fromkeys(self.modules, (0, num_steps))
                session.open(self.runtime, self.backend, asked, None, size=size, followed=True, solver=solver)
                if warmup:
                    session.rehearse(compiled=self.compiled)
                yield
                if session.stats.enabled and not self._loop_set:
                    session.refuse(f"{type(self.pipe).__name__} does not set the timesteps of its scheduler")
            finally:
                self.session, self._stretch, self._embeddings = None, None, []

    @contextmanager
    def uncached(self, session: Session) -> Iterator[None]:
        """Run one pipeline call without the cache, only to write down its latents."""
        self.session = session
        with self._counted_steps():
            try:
                yield
            finally:
                self.session = None

    @contextmanager
    def _named_contexts(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in self.modules.values():
                if (own := getattr(module, "cache_context", None)) is not None:
                    hooks.enter_context(hooked(module, cache_context=self._naming(own)))
            yield

    def _naming(self, own: Callable[[str], Any]) -> Callable[[str], Any]:
        @contextmanager
        def cache_context(name: str) -> Iterator[None]:
            previous, self._context_name = self._context_name, name
            try:
                with own(name):
                    yield
            finally:
                self._context_name = previous

        return cache_context

    @contextmanager
    def _counted_steps(self) -> Iterator[Solver]:
        scheduler = self.pipe.scheduler
        solver, own_set_timesteps = Solver(scheduler, scheduler.step), scheduler.set_timesteps

        @functools.wraps(solver.own_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._scheduler_step(solver, *args, **kwargs)

        @functools.wraps(own_set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            # A new run of the loop: the next section of a long video, the next stage of a pyramid.
            self._step, self._embeddings, self._stretch, self._loop_set = 0, [], None, True
            if self.session is not None and self.session.steps is not None:
                self.session.steps.begin_loop()
            return own_set_timesteps(*args, **kwargs)

        with hooked_scheduler(scheduler, step=step, set_timesteps=set_timesteps):
            yield solver


    def _scheduler_step(self, solver: Solver, *args: Any, **kwargs: Any) -> Any:
        steps = None if self.session is None else self.session.steps
        result = solver.own_step(*args, **kwargs) if steps is None else steps.step(*args, **kwargs)
        if self._stretch is not None and self._step == 0:
            first = _index(solver.scheduler, solver.own_step, args, kwargs)
            if first not in (None, self._stretch.first):
                self._follow(first)
        self._step += 1
        if self.session is not None and self.session.recording is not None:
            self.session.recording.latents(latents_of(result))
        return result

    def _follow(self, first: int | None = None) -> None:
        """Tell the session what the run takes of the scheduler's steps.

        Args:
            first: index of its first step; None before that is made: what the scheduler and the pipeline say.
        """
        scheduler = self.pipe.scheduler
        timesteps = _places(scheduler)
        # Known once the pipeline has cut its timesteps; some end before the last one.
        count = min(getattr(self.pipe, "num_timesteps", None) or len(timesteps), len(timesteps))
        if first is None:
            first = getattr(scheduler, "begin_index", None)
        if first is None:
            # Some pipelines leave out the beginning and do not tell the scheduler.
            first = len(timesteps) - count
        self._stretch = Stretch(
            timesteps=timesteps, first=first, count=min(count, len(timesteps) - first), asked=self._asked,
            order=getattr(scheduler, "order", 1),
        )
        self.session.follow(self._split(self._stretch.positions), self._stretch)

    def _split(self, positions: Sequence[float]) -> dict[str, tuple[int, int]]:
        """First step and number of steps of each transformer."""
        count, boundary = len(positions), getattr(self.pipe.config, "boundary_ratio", None)
        if "transformer_2" not in self.modules or boundary is None:
            return dict.fromkeys(self.modules, (0, count))
        limit = boundary * self.pipe.scheduler.config.num_train_timesteps
        high = sum(position >= limit for position in positions)
        return {"transformer": (0, high), "transformer_2": (high, count - high)}


def _places(scheduler: Any) -> tuple[float, ...]:
    """The scheduler's timesteps, one for each of its steps."""
    return tuple(float(t) for t in scheduler.timesteps.flatten().tolist())


def _index(scheduler: Any, own_step: Callable[..., Any], args: Any, kwargs: Any) -> int | None:
    """Index in the scheduler's timesteps of the step that it has just made, None where it cannot be told."""
    if after := getattr(scheduler, "step_index", None):
        return int(after) - 1
    timestep = inspect.signature(own_step).bind(*args, **kwargs).arguments.get("timestep")
    if timestep is None:
        return None
    place, places = float(torch.as_tensor(timestep).flatten()[0]), _places(scheduler)
    return places.index(place) if place in places else None


def _branch_name(index: int) -> str:
    return (COND, "uncond")[index] if index < 2 else f"branch_{index}"


_pipes: weakref.WeakKeyDictionary[Any, PipelineCache] = weakref.WeakKeyDictionary()


def load(original: Callable[..., Any], pipeline: Any, pipe: Any, server_args: Any) -> Any:
    """In place of ``DiffusersPipeline._apply_cache_dit``: mount before torch.compile, do not enable yet."""
    startup.ensure_file(server_args)
    current = effective.current()
    sections = current.file.passed_on
    cache = _pipes[pipe] = PipelineCache(pipe)
    cache.compiled = bool(server_args.enable_torch_compile)
    # Mounted first: cache-dit's patches of single models are not for a transformer that is split already.
    if current.enabled or server_args.enable_torch_compile or sections:
        try:
            cache.mount()
            pipeline._cache_dit_enabled = True
        except MountError as error:
            if current.decide(None, None).resolved.primary.strict:
                raise
            sglang_api.logger().warning("cache-dit: off: %s", error)
    if sections:
        classes = {type(module).__name__ for module in cache.modules.values()}
        startup.check_classes(sections, classes, file_label(server_args.cache_dit_config))
        cache_dit_sections.apply(pipe, sections)
        cache.backend.identify_outside()
        cache.spread = "parallelism_config" in sections
    for module in cache.modules.values():
        sglang_api.ensure_one_replica(mesh_group(module))
    return pipe


def execute(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """Around one pipeline call."""
    params = batch.sampling_params
    session = Session("diffusers", decide(params.enable_cache_dit, params.cache_dit_params))
    cache = _pipes.get(stage.diffusers_pipe)
    if cache is not None and cache.spread and batch.generator_device is None:
        # The ranks share one picture: noise drawn on the CPU is the same on all, whatever their devices.
        batch.generator_device = "cpu"
    failed = True
    try:
        with _request(cache, session, batch):
            result = original(stage, batch, server_args)
        failed = False
        return result
    finally:
        publish(batch, session.close(_device(cache)), sglang_api.logger().info, failed=failed)


def _request(cache: PipelineCache | None, session: Session, batch: Any) -> AbstractContextManager[None]:
    if cache is None:
        return nullcontext()
    if not session.decision.enabled:
        return nullcontext() if session.recording is None else cache.uncached(session)
    if cache.refusal is not None:
        session.refuse(cache.refusal)
        return nullcontext()
    return cache.request(session, batch.num_inference_steps, sglang_api.size_of(batch), warmup=batch.is_warmup)


def _device(cache: PipelineCache | None) -> torch.device | None:
    if cache is None or not cache.modules:
        return None
    return next((p.device for p in next(iter(cache.modules.values())).parameters()), None)
