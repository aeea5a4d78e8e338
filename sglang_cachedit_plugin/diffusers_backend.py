"""Diffusers pipelines inside SGLang: the cache in DiffusersPipeline and DiffusersExecutionStage."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from . import defaults, engine, host, recording, startup
from .config_file import file_label
from .errors import MountError
from .mount import ModelBackend
from .parallel import mesh_group
from .runtime import Groups, Identity, Runtime
from .session import Session, publish
from .stats import COND

_NAMES = {"pred_cond": COND, "pred_uncond": "uncond", "conditional": COND, "unconditional": "uncond"}


class PipelineCache:
    """The cache of one diffusers pipeline.

    Branches are named by the pipeline's own ``cache_context``; where it has none, by the prompt
    embeddings that a forward gets. Steps are those of the pipeline's scheduler.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        modules = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
        self.modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        self.backend = ModelBackend(self.modules, self.identify, pipe=pipe)
        self.runtime = Runtime(self.backend)
        self.session: Session | None = None
        self.spread = self.compiled = False
        self._step = 0
        self._context_name: str | None = None
        self._embeddings: list[torch.Tensor] = []
        if recording.folder() is not None and hasattr(pipe, "set_progress_bar_config"):
            # The tuner makes hundreds of requests; their bars would bury its own progress.
            pipe.set_progress_bar_config(disable=True)

    @property
    def refusal(self) -> str | None:
        """Why nothing of the pipeline can be cached, None where something can."""
        if self.modules:
            return None
        name = type(self.pipe).__name__
        if getattr(self.pipe, "unet", None) is not None:
            return f"{name} denoises with a UNet, only transformers are cached"
        return f"{name} has no transformer"

    def mount(self) -> None:
        """Mount now; MountError is kept for the first request that wants caching."""
        if self.refusal is not None:
            raise MountError(self.refusal)
        self.runtime.mount()

    def identify(self, name: str, kwargs: Mapping[str, Any]) -> Identity | None:
        """Branch and step of a forward of transformer ``name``."""
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
            self.backend.mounted[name].contexts.poison(COND)
        # One forward a step with new embeddings each time (batched CFG) is one branch; a second forward
        # in the same step would be refused as ambiguous.
        return COND

    @contextmanager
    def request(
        self, session: Session, num_steps: int, size: tuple[int, ...] | None = None, *, warmup: bool = False
    ) -> Iterator[None]:
        """Run one pipeline call under ``session``."""
        self.session, self._step, self._embeddings = session, 0, []
        self.backend.groups = Groups(forward=next(map(mesh_group, self.modules.values()), None))
        with self._named_contexts(), self._counted_steps():
            try:
                places = _Timesteps(self.pipe.scheduler)
                session.open(self.runtime, self.backend, self._split(num_steps), places, size=size)
                if warmup:
                    session.rehearse(compiled=self.compiled)
                yield
            finally:
                self.session, self._embeddings = None, []

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
                    hooks.enter_context(_hooked(module, cache_context=self._naming(own)))
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
    def _counted_steps(self) -> Iterator[None]:
        scheduler = self.pipe.scheduler
        own_step, own_set_timesteps, own_state = scheduler.step, scheduler.set_timesteps, scheduler.__getstate__

        @functools.wraps(own_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self.step(scheduler, own_step, *args, **kwargs)

        @functools.wraps(own_set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            # A new round of the loop: the next section of a long video, the next stage of a pyramid.
            self._step, self._embeddings = 0, []
            return own_set_timesteps(*args, **kwargs)

        def state() -> dict[str, Any]:
            # What copy and pickle take along: pipelines copy their scheduler, and a copy must not count.
            return {name: value for name, value in own_state().items() if name not in hooks}

        hooks = {"step": step, "set_timesteps": set_timesteps, "__getstate__": state}
        with _hooked(scheduler, **hooks):
            yield

    def step(self, scheduler: Any, own_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of ``step`` of the pipeline's scheduler; ``own_step`` is the scheduler's own."""
        result = own_step(*args, **kwargs)
        self._step += 1
        if self.session is not None and self.session.recording is not None:
            self.session.recording.latents(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    def _split(self, num_steps: int) -> dict[str, tuple[int, int]]:
        """First step and number of steps of each transformer."""
        if "transformer_2" not in self.modules:
            return {"transformer": (0, num_steps)}
        boundary = getattr(self.pipe.config, "boundary_ratio", None)
        if boundary is None:
            return {"transformer": (0, num_steps), "transformer_2": (0, num_steps)}
        self.pipe.scheduler.set_timesteps(num_steps)
        limit = boundary * self.pipe.scheduler.config.num_train_timesteps
        high = int((self.pipe.scheduler.timesteps >= limit).sum())
        return {"transformer": (0, high), "transformer_2": (high, num_steps - high)}


class _Timesteps(Sequence[float]):
    """The scheduler's timesteps, read once each time the pipeline has set them."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        self._source: torch.Tensor | None = None
        self._read: list[float] = []

    def __len__(self) -> int:
        if self._source is not self._scheduler.timesteps:
            self._source = self._scheduler.timesteps
            self._read = [float(t) for t in self._source.flatten().tolist()]
        return len(self._read)

    def __getitem__(self, step: int) -> float:
        return self._read[step]


@contextmanager
def _hooked(target: Any, **hooks: Callable[..., Any]) -> Iterator[None]:
    """``hooks`` as attributes of the instance ``target``: its class stays its own, which pipelines compare."""
    before = {name: target.__dict__[name] for name in hooks if name in target.__dict__}
    for name, hook in hooks.items():
        setattr(target, name, hook)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            # Only what is still ours: others may have put theirs in its place since.
            if target.__dict__.get(name) is hook:
                delattr(target, name)
                if name in before:
                    setattr(target, name, before[name])


def _branch_name(index: int) -> str:
    return (COND, "uncond")[index] if index < 2 else f"branch_{index}"


_pipes: weakref.WeakKeyDictionary[Any, PipelineCache] = weakref.WeakKeyDictionary()


def load(original: Callable[..., Any], pipeline: Any, pipe: Any, server_args: Any) -> Any:
    """In place of ``DiffusersPipeline._apply_cache_dit``: mount before torch.compile, do not enable yet."""
    startup.ensure_file(server_args)
    current = defaults.current()
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
            host.logger().warning("cache-dit: off: %s", error)
    if sections:
        classes = {type(module).__name__ for module in cache.modules.values()}
        startup.check_classes(sections, classes, file_label(server_args.cache_dit_config))
        engine.apply(pipe, sections)
        cache.backend.identify_outside()
        cache.spread = "parallelism_config" in sections
    for module in cache.modules.values():
        host.ensure_one_replica(mesh_group(module))
    return pipe


def execute(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """Around one pipeline call."""
    params = batch.sampling_params
    decision = defaults.current().decide(params.enable_cache_dit, params.cache_dit_params)
    session = Session("diffusers", decision)
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
        publish(batch, session.close(_device(cache)), host.logger().info, failed=failed)


def _request(cache: PipelineCache | None, session: Session, batch: Any) -> AbstractContextManager[None]:
    if cache is None:
        return nullcontext()
    if not session.decision.enabled:
        return nullcontext() if session.recording is None else cache.uncached(session)
    if cache.refusal is not None:
        session.refuse(cache.refusal)
        return nullcontext()
    return cache.request(session, batch.num_inference_steps, host.size_of(batch), warmup=batch.is_warmup)


def _device(cache: PipelineCache | None) -> torch.device | None:
    if cache is None or not cache.modules:
        return None
    return next((p.device for p in next(iter(cache.modules.values())).parameters()), None)
