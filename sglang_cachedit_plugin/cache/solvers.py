"""A pipeline's scheduler as a solver whose steps can be undone and repeated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

KNOWN = frozenset({
    "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowUniPCMultistepScheduler", "MOSSImageScheduler", "UniPCMultistepScheduler",
})
"""Deterministic schedulers of SGLang and diffusers with one evaluation a step: a repeated step gives the same."""

TWO_EVALUATIONS = frozenset({
    "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
})
"""Two forwards make one step: a cached one is half of a step that cannot be repeated alone."""

STOCHASTIC = frozenset({
    "CMStochasticIterativeScheduler", "CogVideoXDPMScheduler", "CosineDPMSolverMultistepScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "DDPMWuerstchenScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler", "LCMScheduler", "LTXEulerAncestralRFScheduler", "RePaintScheduler", "SASolverScheduler",
    "SCMScheduler", "ScoreSdeVeScheduler", "SelfForcingFlowMatchScheduler", "TCDScheduler", "UnCLIPScheduler",
})
"""Each step draws noise, so a repeated one gives another latent."""

_NOISE = {"eta": "eta", "s_churn": "churn", "transition": "a rollout"}
"""Arguments of ``step`` that add noise where they are set."""


@dataclass(frozen=True)
class Place:
    """Where a step stands.

    Args:
        position: the argument of the polynomials: sigma of flow matching, otherwise the timestep as a share of the
            training timesteps.
        gain: change of the model output for a change of the latents that leaves the predicted clean latents as they
            are (1 / sigma for flow matching).
    """

    position: float
    gain: float


class Call:
    """One call of a scheduler's ``step``: model output, latents before the step, and other arguments."""

    def __init__(self, bound: inspect.BoundArguments):
        self.bound = bound
        self.output: torch.Tensor = bound.arguments["model_output"]
        self.sample: torch.Tensor = bound.arguments["sample"]

    def with_tensors(self, output: torch.Tensor | None, sample: torch.Tensor | None) -> Call:
        """The same call with another output and other latents; None does not keep them alive."""
        bound = copy(self.bound)
        bound.arguments = dict(bound.arguments) | {"model_output": output, "sample": sample}
        return Call(bound)


@contextmanager
def hooked(target: Any, **hooks: Callable[..., Any]) -> Iterator[None]:
    """``hooks`` as attributes of the instance ``target``; its class stays its own, which pipelines compare.

    Afterwards only what is still ours is taken away: others may have put theirs in its place since.
    """
    before = {name: target.__dict__[name] for name in hooks if name in target.__dict__}
    for name, hook in hooks.items():
        setattr(target, name, hook)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            if target.__dict__.get(name) is hook:
                delattr(target, name)
                if name in before:
                    setattr(target, name, before[name])


@contextmanager
def hooked_scheduler(scheduler: Any, **hooks: Callable[..., Any]) -> Iterator[None]:
    """The same for a scheduler, whose copies do not carry the hooks along: pipelines copy their scheduler."""
    own_state = scheduler.__getstate__

    def state() -> dict[str, Any]:
        return {name: value for name, value in own_state().items() if name not in everything}

    everything = {**hooks, "__getstate__": state}
    with hooked(scheduler, **everything):
        yield


def latents_of(result: Any) -> torch.Tensor:
    """The latents in what a scheduler's ``step`` returns."""
    latents: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents


class Solver:
    """One scheduler during one denoising loop.

    Args:
        scheduler: its timesteps are set.
        own_step: its ``step``, without any hook.
    """

    def __init__(self, scheduler: Any, own_step: Callable[..., Any]):
        self.scheduler, self.own_step = scheduler, own_step
        self._signature = inspect.signature(own_step)
        # SGLang's DPM-Solver wraps the one of diffusers, which holds the state.
        inner = getattr(scheduler, "_inner", None)
        self._state_holder = scheduler if inner is None else inner
        self._checked = type(scheduler).__name__ in KNOWN
        self._places: tuple[Place, ...] | None = None
        self._source: Any = None
        self._first = 0

    def problem(self) -> str | None:
        """Why steps of this scheduler cannot be repeated, None where they can or where only trying shows it."""
        name, config = type(self.scheduler).__name__, getattr(self.scheduler, "config", None)
        names = set(self._signature.parameters)
        if not {"model_output", "timestep", "sample"} <= names:
            return f"{name}: its step takes {', '.join(sorted(names))}"
        if name in TWO_EVALUATIONS or (not self._checked and getattr(self.scheduler, "order", 1) > 1):
            return f"{name} evaluates the model twice a step"
        stochastic = name in STOCHASTIC or "Ancestral" in name or getattr(config, "stochastic_sampling", False)
        if stochastic or str(getattr(config, "algorithm_type", "")).startswith("sde"):
            return f"{name} draws noise in each step"
        return None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        return Call(self._signature.bind(*args, **kwargs))

    def refusal(self, call: Call) -> str | None:
        """Why this very step cannot be repeated, None where it can."""
        for argument, words in _NOISE.items():
            if call.bound.arguments.get(argument):
                return f"{type(self.scheduler).__name__} draws noise in each step ({words})"
        if not isinstance(call.output, torch.Tensor) or not isinstance(call.sample, torch.Tensor):
            return "the step takes no single tensor"
        return None

    def advance(self, call: Call) -> Any:
        return self.own_step(*call.bound.args, **call.bound.kwargs)

    def snapshot(self) -> dict[str, Any]:
        """The scheduler's state by reference: no step writes into a tensor of the state."""
        return _copied(vars(self._state_holder))

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Bring the scheduler back to a snapshot, which stays as it is."""
        own = vars(self._state_holder)
        for name in set(own) - set(snapshot):
            del own[name]
        own.update(_copied(snapshot))

    def repeats(self, call: Call) -> bool:
        """Whether the step made twice from one state gives the same twice; always so for known schedulers.

        The state afterwards is the one before. Waits for the device once.
        """
        if self._checked:
            return True
        before, seen = self.snapshot(), list[tuple[torch.Tensor, dict[str, Any]]]()
        for _ in range(2):
            seen.append((latents_of(self.advance(call)), self.snapshot()))
            self.restore(before)
        (first, after), (second, again) = seen
        self._checked = torch.equal(first, second) and _same_state(after, again)
        return self._checked

    def place(self, index: int) -> Place:
        """Place of the step with this number among the scheduler's timesteps; read from the device once."""
        if self._places is None or self._source is not self.scheduler.timesteps:
            self._source, self._places = self.scheduler.timesteps, _places(self.scheduler)
        return self._places[min(max(index, 0), len(self._places) - 1)]

    def read_again(self) -> None:
        """The scheduler's timesteps were changed in place."""
        self._places = None

    def set_anew(self) -> bool:
        """Whether the scheduler has other timesteps than at the last ``place``: its ``set_timesteps`` was called."""
        return self._source is not self.scheduler.timesteps

    def positions(self, first: int) -> list[float]:
        """Position of each step from number ``first`` on, and of the clean latents at the end."""
        self.place(first)
        assert self._places is not None
        end = 1.0 if getattr(getattr(self.scheduler, "config", None), "invert_sigmas", False) else 0.0
        return [*(place.position for place in self._places[first:]), end]

    def begin(self, call: Call) -> None:
        """The first step of a loop. Where nobody told the scheduler which one that is, its timestep does."""
        self._first = 0
        if self._own_index() is None and (timestep := call.bound.arguments["timestep"]) is not None:
            known = self.scheduler.timesteps.flatten().tolist()
            at = float(torch.as_tensor(timestep).flatten()[0])
            self._first = known.index(at) if at in known else 0

    def index(self, count: int) -> int:
        """Number among the scheduler's timesteps of step ``count`` of the loop under way, which comes next."""
        own = self._own_index()
        return self._first + count if own is None else own

    def _own_index(self) -> int | None:
        for name in ("step_index", "begin_index"):
            if (own := getattr(self._state_holder, name, None)) is not None:
                return int(own)
        return None

    def gain(self, call: Call, place: Place) -> float:
        """``Place.gain`` for the output of ``call``: flow Euler with a timestep for each token takes minus the flow."""
        return place.gain if call.bound.arguments.get("per_token_timesteps") is None else -place.gain


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy(value) if isinstance(value, list | dict | set) else value for name, value in state.items()}


def _same_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return set(one) == set(other) and all(_same(one[name], other[name]) for name in one)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other) if not hasattr(one, "__array__") else True


def _places(scheduler: Any) -> tuple[Place, ...]:
    """Place of every timestep of a scheduler."""
    config = getattr(scheduler, "config", None)
    steps = [float(t) for t in scheduler.timesteps.flatten().tolist()]
    trained = float(getattr(config, "num_train_timesteps", None) or 1000)
    kind = getattr(config, "prediction_type", None) or "flow_prediction"
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = None if sigmas is None else [float(sigma) for sigma in torch.as_tensor(sigmas).flatten().tolist()]
    if kind == "flow_prediction" or "Flow" in type(scheduler).__name__ or getattr(config, "use_flow_sigmas", False):
        levels = sigmas if sigmas is not None and len(sigmas) >= len(steps) else [t / trained for t in steps]
        if getattr(config, "invert_sigmas", False):
            return tuple(Place(level, -1.0 / max(1.0 - level, 1e-3)) for level in levels[: len(steps)])
        return tuple(Place(level, 1.0 / max(level, 1e-3)) for level in levels[: len(steps)])
    if type(scheduler).__name__ == "EulerDiscreteScheduler" and sigmas is not None:
        # x = x0 + sigma * noise
        scale = {"epsilon": lambda s: 1.0 / s, "v_prediction": lambda s: 1.0 / (s * math.sqrt(s * s + 1.0))}.get(kind)
        gains = [0.0 if scale is None else scale(max(sigma, 1e-3)) for sigma in sigmas]
        return tuple(Place(t / trained, gain) for t, gain in zip(steps, gains, strict=False))
    noise = getattr(scheduler, "alphas_cumprod", None)
    if noise is None:
        return tuple(Place(t / trained, 0.0) for t in steps)
    # x = sqrt(a) * x0 + sqrt(1 - a) * noise
    shares = torch.as_tensor(noise).tolist()
    return tuple(Place(t / trained, _gain(kind, shares[min(max(round(t), 0), len(shares) - 1)])) for t in steps)


def _gain(kind: str, signal: float) -> float:
    """``Place.gain`` of a variance-preserving model; ``signal`` is the square of what the clean latents count."""
    noise = math.sqrt(max(1.0 - signal, 1e-6))
    return {"epsilon": 1.0 / noise, "v_prediction": math.sqrt(signal) / noise}.get(kind, 0.0)
