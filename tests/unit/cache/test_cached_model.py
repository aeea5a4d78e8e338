"""One transition a request: the ordered list of what is done to the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sglang_cachedit_plugin.cache import cached_model
from sglang_cachedit_plugin.cache.cached_model import CachedModel, State
from sglang_cachedit_plugin.cache.spec import RequestSpec, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import StepPlan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.report.stats import RequestStats


def spec(steps: int = 4) -> RequestSpec:
    each = TransformerSpec(name="transformer", settings=CacheSettings(), plan=StepPlan(num_steps=steps))
    return RequestSpec(
        transformers=(each,), stats=RequestStats(backend="native", enabled=True), identify=lambda name, kwargs: None
    )


FIRST, SECOND = spec(4), spec(8)


class Recorder:
    """Stands for the model's one transformer: notes what is done to it, and holds whether requests would run cached."""

    def __init__(self):
        self.events: list[object] = []
        self.cached = False
        self.mount_error: Exception | None = None
        self.refresh_error: Exception | None = None

    def mount(self, name: str, module: nn.Module, pipe: object) -> Recorder:
        self.events.append("mount")
        if self.mount_error:
            raise self.mount_error
        return self

    def refresh(self, spec: RequestSpec) -> None:
        self.events.append(spec)
        self.cached = True  # as a transformer that fails once it has begun
        if self.refresh_error:
            raise self.refresh_error

    def bypass(self) -> None:
        self.events.append("bypass")
        self.cached = False


def model_of(backend: Recorder, monkeypatch: pytest.MonkeyPatch) -> CachedModel:
    monkeypatch.setattr(cached_model, "CachedTransformer", backend.mount)
    return CachedModel({"transformer": nn.Identity()})


@pytest.fixture
def backend():
    return Recorder()


@pytest.fixture
def runtime(backend, monkeypatch):
    return model_of(backend, monkeypatch)


@pytest.mark.parametrize(
    ("requests", "events"),
    [
        ([None, None], []),
        ([FIRST], ["mount", FIRST]),
        ([FIRST, FIRST], ["mount", FIRST, FIRST]),
        ([FIRST, SECOND], ["mount", FIRST, SECOND]),
        ([FIRST, None, None, SECOND], ["mount", FIRST, "bypass", SECOND]),
        ([None, FIRST, None], ["mount", FIRST, "bypass"]),
    ],
)
def test_transitions(backend, runtime, requests, events):
    for request in requests:
        runtime.prepare(request)
        assert backend.cached == (request is not None)
    assert backend.events == events


def test_a_transformer_that_a_request_does_not_name_runs_as_it_is(monkeypatch):
    both = {"transformer": Recorder(), "transformer_2": Recorder()}
    monkeypatch.setattr(cached_model, "CachedTransformer", lambda name, *args: both[name].mount(name, *args))
    model = CachedModel(dict.fromkeys(both, nn.Identity()))
    model.prepare(FIRST)
    assert [each.cached for each in both.values()] == [True, False]
    assert both["transformer_2"].events == ["mount", "bypass"]


def test_mounting_early_leaves_the_original_forward(backend, runtime):
    runtime.mount()
    runtime.mount()
    assert runtime.state is State.BYPASSED
    runtime.prepare(None)
    assert backend.events == ["mount"]
    runtime.prepare(FIRST)
    assert backend.events == ["mount", FIRST]


def test_a_model_that_cannot_be_mounted_is_tried_once_and_its_reason_kept(backend, runtime):
    backend.mount_error = MountError("no adapter describes its blocks")
    for _ in range(3):
        with pytest.raises(MountError, match="no adapter describes its blocks"):
            runtime.prepare(FIRST)
        runtime.prepare(None)
    assert backend.events == ["mount"]
    assert runtime.state is State.UNMOUNTABLE
    assert runtime.reason == "no adapter describes its blocks"


def test_a_mount_that_breaks_is_tried_again(backend, runtime):
    backend.mount_error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        runtime.prepare(FIRST)
    backend.mount_error = None
    runtime.prepare(FIRST)
    assert backend.events == ["mount", "mount", FIRST]


@pytest.mark.parametrize("error", [MountError("F + B exceed the blocks"), RuntimeError("broken")])
@pytest.mark.parametrize("before", [[], [FIRST], [FIRST, None]])
def test_a_refresh_that_fails_runs_the_original_forward(backend, runtime, before, error):
    for request in before:
        runtime.prepare(request)
    backend.events.clear()
    backend.refresh_error = error
    with pytest.raises(type(error), match=str(error).replace("+", r"\+")):
        runtime.prepare(SECOND)
    assert backend.events[-2:] == [SECOND, "bypass"]
    assert (runtime.state, backend.cached) == (State.BYPASSED, False)
    runtime.prepare(None)
    backend.refresh_error = None
    runtime.prepare(FIRST)
    assert (runtime.state, backend.cached) == (State.ACTIVE, True)
    assert backend.events.count("mount") == (0 if before else 1)


REQUESTS = st.sampled_from([None, FIRST, SECOND])
FAULTS = st.sampled_from([None, MountError, OSError])


@given(st.lists(st.tuples(REQUESTS, FAULTS)))
def test_after_any_history_cached_is_what_was_last_asked_for(history):
    backend = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        live(history, backend, model_of(backend, patch))
    assert backend.events.count("mount") <= 1


def live(history: list, backend: Recorder, runtime: CachedModel) -> None:
    for request, fault in history:
        backend.refresh_error = fault("x") if fault else None
        failed = False
        try:
            runtime.prepare(request)
        except (MountError, OSError):
            failed = True
        assert failed == (request is not None and fault is not None)
        assert backend.cached == (runtime.state is State.ACTIVE) == (request is not None and not failed)


def test_a_position_is_the_hosts_or_the_step_itself():
    each = TransformerSpec(
        name="t", settings=CacheSettings(), plan=StepPlan(num_steps=2), timesteps=(900.0, 500.0)
    )
    assert [each.position(step) for step in (0, 1, 2, -1)] == [900.0, 500.0, 2.0, -1.0]
    assert FIRST.transformers[0].position(3) == 3.0
