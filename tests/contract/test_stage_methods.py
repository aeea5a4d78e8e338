"""Every stage of the host is asked: no Cache-DiT method that a subclass of DenoisingStage overrides goes unheard."""

from __future__ import annotations

import ast
import importlib
import pkgutil

from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

from tests.contract import records

STAGES = "sglang.multimodal_gen.runtime.pipelines_core.stages"
WITHOUT_EFFECT = {
    "_cache_dit_has_separate_cfg": "branches are told apart by name, however many forwards a step has",
    "_cache_dit_dual_model_name": "names an adapter of stock caching",
}


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__()))


def stages() -> set[type]:
    """Every subclass of DenoisingStage in the installed host."""
    package = importlib.import_module(STAGES)
    for info in pkgutil.walk_packages(package.__path__, f"{STAGES}."):
        importlib.import_module(info.name)
    return {each for each in subclasses(DenoisingStage) - {DenoisingStage} if each.__module__.startswith(STAGES)}


def asked() -> set[str]:
    """Names that the package reads or calls on something, or gives as text: among them all it asks a stage."""
    found = set()
    for path in records.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value.rpartition(".")[2])
    return found


def unheard(cls: type) -> set[str]:
    """Cache-DiT methods of the host's base that a class overrides and the package does not ask."""
    own = {name for name in vars(cls) if ("cache_dit" in name or "scm" in name) and hasattr(DenoisingStage, name)}
    return {name for name in own if callable(getattr(cls, name))} - asked() - set(WITHOUT_EFFECT)


def test_no_stage_overrides_a_method_that_nobody_asks():
    classes = stages()
    assert {"MiniMaxH3DenoisingStage", "Flux3ImageDenoiseStage", "LTX2RefinementStage"} <= {c.__name__ for c in classes}
    assert {cls.__name__: unheard(cls) for cls in classes if unheard(cls)} == {}


def test_a_stage_with_a_say_of_another_kind_is_found():
    class Stage(DenoisingStage):
        def _cache_dit_knob(self, *args, **kwargs):
            """As a later host might have it."""

        def _build_cache_dit_config(self, *args, **kwargs):
            """Asked today."""

    assert unheard(Stage) == {"_cache_dit_knob"}


def test_methods_without_effect_are_still_the_hosts():
    assert [name for name in WITHOUT_EFFECT if not hasattr(DenoisingStage, name)] == []
