"""Every native stage with steps of its own, and what the corrector does there."""

from __future__ import annotations

import ast
import re

from sglang_cachedit_plugin.hooks import host_root
from sglang_cachedit_plugin.integration import native_stages

METHODS = {"_run_denoising_step", "_run_denoising_loop", "_denoise", "_predict_noise_with_cfg", "_run_stage_steps"}
LOOPS = re.compile(r"(Denois|Rollout|TexGen|Refine|ComfyUIStep)")
CORRECTED = {
    "DenoisingStage", "Cosmos3DenoisingStage", "Hunyuan3DShapeDenoisingStage", "Kandinsky6DenoisingStage",
    "Kandinsky6SRDenoisingStage", "MOSSImageDenoisingStage", "SanaWMDenoisingStage", "WanAnimate2DenoisingStage",
    "ProgressiveDenoisingStage",
}
"""Their steps are those of the request's scheduler: of the video where sound has another one."""
WITHOUT_STEPS = {"ProgressiveDenoisingStageRouter", "SanaWMRefinerDecodingStage"}
INHERITING = {"Ideogram4ProgressiveDenoisingStage", "LTX2RefinementStage", "WanProgressiveDenoisingStage"}
"""As the base says."""


def stages() -> dict[str, tuple[str, ...]]:
    """Stage classes of the installed host with a step or a loop of their own, and their bases."""
    folder, found = host_root() / "sglang/multimodal_gen/runtime/pipelines_core/stages", {}
    for source in folder.rglob("*.py"):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or "BeforeDenoising" in node.name:
                continue
            own = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            stage = node.name.endswith(("Stage", "Router"))
            if stage and (own & METHODS or ("forward" in own and LOOPS.search(node.name))):
                found[node.name] = tuple(base.id for base in node.bases if isinstance(base, ast.Name))
    return found


def test_every_stage_with_steps_of_its_own_is_corrected_or_says_why_not():
    found = stages()
    known = CORRECTED | WITHOUT_STEPS | INHERITING | set(native_stages.UNCORRECTED)
    refused = {name for name, loop in native_stages.OWN_LOOPS.items() if loop.refused}
    unknown = {
        name for name, bases in found.items() if name not in known | refused and not {*bases} & refused
    }
    assert unknown == set()
    assert CORRECTED | INHERITING | set(native_stages.UNCORRECTED) <= set(found)
