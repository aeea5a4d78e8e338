"""Native pipelines: the cache in SGLang's DenoisingStage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from . import defaults, host, startup
from .errors import MountError
from .mount import ModelBackend
from .parallel import tell_parallel
from .runtime import Identity, Runtime
from .session import Session, publish


class _Mounted:
    """What belongs to one stage: its transformers and their runtime."""

    def __init__(self, backend: ModelBackend):
        self.backend = backend
        self.runtime = Runtime(backend)


_stages: weakref.WeakKeyDictionary[Any, _Mounted] = weakref.WeakKeyDictionary()
_open: list[tuple[Any, Session]] = []
_running: list[Any] = []


class CacheDitDenoisingMixin:
    """The Cache-DiT methods of the host's DenoisingStage, in terms of this plugin.

    Hooked onto ``DenoisingStage``; subclasses that override a method keep their own and reach these
    through ``super()``.
    """

    def _cache_dit_requested(self) -> bool:
        """Whether requests that say nothing are cached."""
        return defaults.current().enabled

    def _maybe_enable_cache_dit(self, num_inference_steps: int | tuple[int, int], batch: Any) -> None:
        """Bring the transformers to what ``batch`` wants. Runs once a request, before torch.compile.

        Args:
            num_inference_steps: steps of the transformer, or of the high and the low noise expert.
            batch: the host's request.
        """
        startup.ensure_file(self.server_args)
        params = batch.sampling_params
        enable = params.enable_cache_dit
        if enable is None:
            enable = self._cache_dit_requested()
            if enable == defaults.current().enabled:
                enable = None
        decision = defaults.current().decide(enable, params.cache_dit_params)
        session = Session("native", decision)
        _open.append((self, session))
        host.forget_branch()
        if decision.enabled and (sections := defaults.current().file.passed_on):
            session.stats.note(f"only the diffusers backend reads {', '.join(sections)} of the config file")
        if decision.enabled and self.server_args.enable_breakable_cuda_graph:
            session.disable("breakable CUDA graphs are on")
            return
        if not decision.enabled and self not in _stages:
            return
        mounted = _mounted(self)
        mounted.backend.groups = host.groups(
            _running or [self], batch, joint=self._cache_dit_joint_cfg_decision(),
            patch_size=getattr(self.transformer, "patch_size", None),
        )
        session.open(
            mounted.runtime,
            mounted.backend,
            _steps(self, num_inference_steps),
            _positions(batch),
            size=host.size_of(batch),
            one_config=self._cache_dit_secondary_uses_primary_config(),
        )
        # Some stages keep what a cached forward needs only while this is set.
        self._cache_dit_enabled = session.stats.enabled

    def _unmount_cache_dit(self) -> None:
        """The host wants the original forward."""
        if self in _stages:
            _stages[self].runtime.prepare(None)


def _mounted(stage: Any) -> _Mounted:
    modules = {"transformer": stage.transformer, "transformer_2": stage.transformer_2}
    modules = {name: module for name, module in modules.items() if module is not None}
    mounted = _stages.get(stage)
    if mounted is None or mounted.backend.modules != modules:
        # The host may load a transformer anew (low-memory modes): what was mounted went with it.
        mounted = _stages[stage] = _Mounted(ModelBackend(modules, _identify))
        for module in modules.values():
            tell_parallel(module, host.layout())
    return mounted


def compile_mounted(original: Callable[..., Any], stage: Any, module: Any) -> None:
    """Around ``DenoisingStage._maybe_torch_compile``: mount what will be compiled.

    A forward that is replaced after it was compiled is compiled again. The host holds compilation back
    until stock caching is mounted; here it is mounted already.
    """
    server_args = stage.server_args
    if not server_args.enable_torch_compile or server_args.enable_breakable_cuda_graph:
        return original(stage, module)
    startup.ensure_file(server_args)
    try:
        _mounted(stage).runtime.mount()
    except MountError as error:
        if defaults.current().decide(None, None).resolved.primary.strict:
            raise
        host.logger().warning("cache-dit: off: %s", error)
    in_use = defaults.current().enabled or server_args.cache_dit_config
    if in_use and host.prefer_regional_compile(server_args, module):
        server_args.regional_compile = True
    enabled, stage._cache_dit_enabled = stage._cache_dit_enabled, True
    try:
        return original(stage, module)
    finally:
        stage._cache_dit_enabled = enabled


def _identify(name: str, kwargs: Mapping[str, Any]) -> Identity | None:
    return host.forward_identity()


def _steps(stage: Any, num_inference_steps: int | tuple[int, int]) -> dict[str, tuple[int, int]]:
    primary, secondary = stage._cache_dit_step_counts(num_inference_steps)
    steps = {"transformer": (0, primary)}
    if stage.transformer_2 is not None:
        first = primary if isinstance(num_inference_steps, tuple) else 0
        steps["transformer_2"] = (first, secondary)
    return steps


def _positions(batch: Any) -> tuple[float, ...] | None:
    timesteps = getattr(batch, "timesteps", None)
    return None if timesteps is None else tuple(float(t) for t in timesteps.flatten().tolist())


def run_stage(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """Around every stage: whatever happened in it, a request opened in it ends with it."""
    before, failed = len(_open), True
    _running.append(stage)
    try:
        result = original(stage, batch, server_args)
        for _, session in _open[before:]:
            if session.recording is not None:
                session.recording.latents(getattr(result, "latents", None))
        failed = False
        return result
    finally:
        _running.pop()
        while len(_open) > before:
            owner, session = _open.pop()
            device = next((p.device for p in owner.transformer.parameters()), None)
            publish(batch, session.close(device), host.logger().info, failed=failed)
