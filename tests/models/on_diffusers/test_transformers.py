"""Every transformer class of diffusers, built tiny: computed steps are its own, cached steps leave out its middle."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import diffusers
import pytest

from sglang_cachedit_plugin.adapters import DIFFUSERS
from sglang_cachedit_plugin.errors import MountError
from tests.models.on_diffusers import images, videos
from tests.models.on_diffusers.proof import Proof, check

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
CASES = {**images.CASES, **videos.CASES}
EXTRAS = [(name, extra) for name, case in CASES.items() for extra in case.extra]


@pytest.mark.parametrize("name", CASES)
def test_a_class_caches_as_its_row_says(name):
    case = CASES[name]
    check(Proof(case.build(name), case.lists, case.inputs), DIFFUSERS[name])


@pytest.mark.parametrize(("name", "extra"), EXTRAS)
def test_residuals_added_between_the_blocks_are_not_lost(name, extra):
    case = CASES[name]
    proof = Proof(case.build(name), case.lists, case.extra[extra])
    without = Proof(case.build(name), case.lists, case.inputs)
    assert not proof.plain[4][0].equal(without.plain[4][0]), "the extra input does nothing, so this test would not"
    check(proof, DIFFUSERS[name])


def test_last_blocks_that_need_the_first_are_not_computed_without_them():
    case = CASES["HunyuanDiT2DModel"]
    proof = Proof(case.build("HunyuanDiT2DModel"), case.lists, case.inputs)
    with pytest.raises(MountError, match="Bn_compute_blocks 2 must not exceed Fn_compute_blocks 1"):
        proof.begin(Fn_compute_blocks=1, Bn_compute_blocks=2)
    assert proof.equals_plain(4)


@functools.cache
def transformers_of_pipelines() -> dict[str, set[str]]:
    """Class names that annotate the parameters ``transformer`` and ``transformer_2``, with the pipelines' names."""
    found: dict[str, set[str]] = {}
    for source in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline*.py"):
        for cls in ast.walk(ast.parse(source.read_text())):
            if isinstance(cls, ast.ClassDef) and cls.name.endswith("Pipeline"):
                for argument in _arguments(cls):
                    if argument.arg.startswith("transformer") and argument.annotation is not None:
                        for name in ast.unparse(argument.annotation).replace("| None", "").split(" | "):
                            found.setdefault(name.strip(), set()).add(cls.name)
    return found


def _arguments(cls: ast.ClassDef) -> list[ast.arg]:
    inits = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    return [argument for init in inits for argument in (*init.args.args, *init.args.kwonlyargs)]


def test_every_transformer_of_a_diffusers_pipeline_has_a_row_and_a_case():
    found = transformers_of_pipelines()
    assert len(found) > 40
    assert set(found) == set(DIFFUSERS)
    assert set(CASES) == {name for name, row in DIFFUSERS.items() if not row.unsupported}


def test_rows_that_say_so_have_a_second_transformer():
    takes_two = {
        name for name, pipelines in transformers_of_pipelines().items()
        if any(
            "transformer_2" in inspect.signature(getattr(diffusers, pipeline).__init__).parameters
            for pipeline in pipelines if hasattr(diffusers, pipeline)
        )
    }
    assert takes_two == {name for name, row in DIFFUSERS.items() if row.transformers == 2}
