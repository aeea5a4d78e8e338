"""Diffusers pipelines inside SGLang: the cache in DiffusersPipeline and DiffusersExecutionStage."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..cache.cached_model import CachedModel
from ..cache.parallel import mesh_group
from ..cache.solvers import Solver, hooked, hooked_scheduler, latents_of
from ..cache.spec import Groups, Identity
from ..cache.stretch import Stretch
from ..config import effective
from ..config.sources import file_label
from ..errors import MountError, Reason, reason_of
from ..report.stats import COND
from . import cache_dit_sections, ranks, recording, request, sglang_api, startup
from .request import WORKER, Facts, Session

_NAMES = {"pred_cond": COND, "pred_uncond": "uncond", "conditional": COND, "unconditional": "uncond"}


def load(original: Callable[..., Any], pipeline: Any, pipe: Any, server_args: Any) -> Any:
    """In place of ``DiffusersPipeline._apply_cache_dit``: what happens to a pipeline before any forward, in order."""
    startup.ensure_file(server_args)
    current = effective.current()
    sections = current.file.passed_on
    cache = WORKER.models[pipe] = PipelineCache(pipe, compiled=bool(server_args.enable_torch_compile))
    # 1. Mount: cache-dit's patches of single models are not for a transformer that is split already, and a forward
    # that is replaced after it was compiled is compiled again. Without any of this the first request mounts.
    if current.enabled or cache.compiled or sections:
        try:
            cache.mount()
            pipeline._cache_dit_enabled = True
        except MountError as error:
            if current.decide(None, None).resolved.primary.strict:
                raise
            reason = reason_of(error, "blocks")
            sglang_api.logger().warning("cache-dit: off [%s]: %s", reason.code, reason)
    # 2. Sections: what splits a transformer hooks around the mount, so forwards are told apart outside of it.
    if sections:
        classes = {type(module).__name__ for module in cache.modules.values()}
        startup.check_classes(sections, classes, file_label(server_args.cache_dit_config))
        cache_dit_sections.apply(pipe, sections)
        cache.identify_outside()
        cache.spread = "parallelism_config" in sections
    # 3. Groups: the meshes that the sections have made are those that decide together; each request binds them.
    for module in cache.modules.values():
        ranks.ensure_one_replica(mesh_group(module))
    # 4. Compile: the host does so next.
    return pipe


def execute(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """Around one pipeline call."""
    pipe = stage.diffusers_pipe
    with request.stage_under_way(stage, [batch]):
        session, cache = request.begin("diffusers", pipe, batch), WORKER.models.get(pipe)
        if cache is not None and cache.spread and batch.generator_device is None:
            # The ranks share one picture: noise drawn on the CPU is the same on all, whatever their devices.
            batch.generator_device = "cpu"
        with _request(cache, session, batch):
            return original(stage, batch, server_args)


def _request(cache: PipelineCache | None, session: Session, batch: Any) -> AbstractContextManager[None]:
    if cache is None:
        return nullcontext()
    if not session.decision.enabled:
        return nullcontext() if session.recording is None else cache.uncached(session)
    if cache.refusal is not None:
        session.refuse(Reason("model", cache.refusal))
        return nullcontext()
    return cache.request(session, batch.num_inference_steps, sglang_api.size_of(batch), warmup=batch.is_warmup)


class PipelineCache(CachedModel):
    """The transformers of one diffusers pipeline.

    Args:
        compiled: the host compiles them.

    Attributes:
        spread: the ranks share one picture.
    """

    def __init__(self, pipe: Any, *, compiled: bool = False):
        modules = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
        super().__init__({name: each for name, each in modules.items() if isinstance(each, nn.Module)}, pipe=pipe)
        self.pipe, self.compiled, self.spread = pipe, compiled, False
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
        """As for any model; MountError is kept for the first request that wants caching."""
        if self.refusal is not None:
            raise MountError(Reason("model", self.refusal))
        super().mount()

    @contextmanager
    def request(
        self, session: Session, num_steps: int, size: tuple[int, ...] | None = None, *, warmup: bool = False
    ) -> Iterator[None]:
        """Run one pipeline call under ``session``."""
        run = _Run(self, session, num_steps)
        with run.hooked() as solver:
            session.open(self, Facts(
                steps=dict.fromkeys(self.modules, (0, num_steps)), identify=run.identify, followed=True,
                groups=Groups(forward=next(map(mesh_group, self.modules.values()), None)), size=size, solver=solver,
                compiled=self.compiled if warmup else None,
            ))
            yield
            if session.stats.enabled and not run.loop_set:
                why = f"{type(self.pipe).__name__} does not set the timesteps of its scheduler"
                session.refuse(Reason("model", why))

    @contextmanager
    def uncached(self, session: Session) -> Iterator[None]:
        """Run one pipeline call without the cache, only to write down its latents."""
        with _Run(self, session, 0).hooked():
            yield


class _Run:
    """One pipeline call.

    Branches are named by the pipeline's own ``cache_context``; where it has none, by the prompt
    embeddings that a forward gets. A step is a step of the pipeline's scheduler, whatever was asked for: a run of
    the loop takes part of its timesteps with image-to-image, and more than were asked for with solvers of second
    order. What it takes is known with its first forward, from ``begin_index`` and the pipeline's ``num_timesteps``;
    the scheduler's first step confirms it.
    """

    def __init__(self, cache: PipelineCache, session: Session, asked: int):
        self._cache, self._pipe, self._session, self._asked = cache, cache.pipe, session, asked
        self._step, self.loop_set = 0, False
        self._stretch: Stretch | None = None
        self._context_name: str | None = None
        self._embeddings: list[torch.Tensor] = []

    def identify(self, name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        """Branch and step of a forward of transformer ``name``; None for one that is no denoising step."""
        if not self.loop_set:
            # GLM-Image fills its attention cache from a picture before the loop.
            return None
        if self._stretch is None:
            self._follow()
        if not self._session.stats.enabled:
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
            self._cache.mounted[name].cache.disable_branch(COND)
        # One forward a step with new embeddings each time (batched CFG) is one branch; a second forward
        # in the same step would be refused as ambiguous.
        return COND

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
    def hooked(self) -> Iterator[Solver]:
        """The names of branches, loops and steps are heard; the scheduler's steps go through the session's."""
        scheduler = self._pipe.scheduler
        solver, own_set_timesteps = Solver(scheduler, scheduler.step), scheduler.set_timesteps

        @functools.wraps(solver.own_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._scheduler_step(solver, *args, **kwargs)

        @functools.wraps(own_set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            # A new run of the loop: the next section of a long video, the next stage of a pyramid.
            self._step, self._embeddings, self._stretch, self.loop_set = 0, [], None, True
            if self._session.steps is not None:
                self._session.steps.begin_loop()
            return own_set_timesteps(*args, **kwargs)

        with ExitStack() as hooks:
            for module in self._cache.modules.values():
                if (own := getattr(module, "cache_context", None)) is not None:
                    hooks.enter_context(hooked(module, cache_context=self._naming(own)))
            hooks.enter_context(hooked_scheduler(scheduler, step=step, set_timesteps=set_timesteps))
            yield solver

    def _scheduler_step(self, solver: Solver, *args: Any, **kwargs: Any) -> Any:
        steps = self._session.steps
        result = solver.own_step(*args, **kwargs) if steps is None else steps.step(*args, **kwargs)
        if self._stretch is not None and self._step == 0:
            first = _index(solver.scheduler, solver.own_step, args, kwargs)
            if first not in (None, self._stretch.first):
                self._follow(first)
        self._step += 1
        if self._session.recording is not None:
            self._session.recording.latents(latents_of(result))
        return result

    def _follow(self, first: int | None = None) -> None:
        """Tell the session what the run takes of the scheduler's steps.

        Args:
            first: index of its first step; None before that is made: what the scheduler and the pipeline say.
        """
        scheduler = self._pipe.scheduler
        timesteps = sglang_api.timesteps_of(scheduler)
        # Known once the pipeline has cut its timesteps; some end before the last one.
        count = min(getattr(self._pipe, "num_timesteps", None) or len(timesteps), len(timesteps))
        if first is None:
            first = getattr(scheduler, "begin_index", None)
        if first is None:
            # Some pipelines leave out the beginning and do not tell the scheduler.
            first = len(timesteps) - count
        self._stretch = Stretch(
            timesteps=timesteps, first=first, count=min(count, len(timesteps) - first), asked=self._asked,
            order=getattr(scheduler, "order", 1),
        )
        self._session.follow(self._split(self._stretch.positions), self._stretch)

    def _split(self, timesteps: Sequence[float]) -> dict[str, tuple[int, int]]:
        """First step and number of steps of each transformer."""
        count, boundary = len(timesteps), getattr(self._pipe.config, "boundary_ratio", None)
        if "transformer_2" not in self._cache.modules or boundary is None:
            return dict.fromkeys(self._cache.modules, (0, count))
        limit = boundary * self._pipe.scheduler.config.num_train_timesteps
        high = sum(each >= limit for each in timesteps)
        return {"transformer": (0, high), "transformer_2": (high, count - high)}


def _index(scheduler: Any, own_step: Callable[..., Any], args: Any, kwargs: Any) -> int | None:
    """Index in the scheduler's timesteps of the step that it has just made, None where it cannot be told."""
    if after := getattr(scheduler, "step_index", None):
        return int(after) - 1
    timestep = inspect.signature(own_step).bind(*args, **kwargs).arguments.get("timestep")
    if timestep is None:
        return None
    own, timesteps = float(torch.as_tensor(timestep).flatten()[0]), sglang_api.timesteps_of(scheduler)
    return timesteps.index(own) if own in timesteps else None


def _branch_name(index: int) -> str:
    return (COND, "uncond")[index] if index < 2 else f"branch_{index}"
