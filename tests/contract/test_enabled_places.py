"""Where the host asks its own variable whether caching is on, and what holds there for a file, a PUT or a request."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_cachedit_plugin import hooks
from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.sources import read_file
from sglang_cachedit_plugin.integration import startup

VARIABLE = "SGLANG_CACHE_DIT_ENABLED"
_ARGS, _TUNE = "runtime/server_args/server_args.py", "runtime/server_args/auto_tune.py"
_STAGES = "runtime/pipelines_core/stages"

PLACES = {
    (_ARGS, "ServerArgs._breakable_cuda_graph_default"): "startup leaves the graphs out where a file caches all "
    "requests; requests that ask for caching later are declined with the reason, or cached around the graphs",
    (_ARGS, "ServerArgs._validate_offload"): "FSDP is served: ranks that gather weights decide together",
    (_ARGS, "ServerArgs._validate_parallelism"): "a warning about SP with TP, which is served",
    (_TUNE, "auto_residency_args_skip_reason"): "nothing applies what it calibrates: it gives a reason in any case",
    (_TUNE, "ServerArgsAutoTuner.maybe_replace_cpu_offloaded_components_with_layerwise"): "layerwise offload is served",
    (_TUNE, "ServerArgsAutoTuner._should_auto_enable_dit_layerwise_offload"): "layerwise offload is served",
    (_TUNE, "ServerArgsAutoTuner._can_apply_fsdp_policy"): "FSDP is served",
    ("runtime/models/dits/minimax_h3.py", "MiniMaxH3DiTModel._can_batch_block_adaln"): "it looks at the type "
    "of the blocks too, for which hooks stand in while a forward is cached",
    (f"{_STAGES}/denoising.py", "DenoisingStage._cache_dit_requested"): "hooked; _maybe_offload_during_compile "
    "asks as well",
    (f"{_STAGES}/model_specific_stages/hunyuan_image3/ar_stage.py", "HunyuanImage3AR._maybe_enable_cache_dit"):
    "its requests are refused with the reason",
    ("configs/pipeline_configs/llada_image.py", "LLaDAImagePipelineConfig.validate_server_args"): "refused for stock "
    "cache-dit, which does not know the model; the plugin has a row for it",
}


def _places(root: Path) -> Iterator[tuple[str, str]]:
    """(file, qualified name of the function) of each line of code that reads the variable."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name == "envs.py" or name.startswith("test/") or VARIABLE not in (text := path.read_text("utf-8")):
            continue

        def visit(node: ast.AST, inside: str, name: str = name) -> Iterator[tuple[str, str]]:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{inside}.{node.name}".lstrip(".")
            named = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if named == VARIABLE:
                yield name, inside
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)

        yield from visit(ast.parse(text), "")


def test_every_place_that_asks_the_variable_is_known():
    found = set(_places(hooks.host_root() / "sglang" / "multimodal_gen"))
    assert found <= set(PLACES)
    if version("sglang") == "0.5.23":
        assert found == set(PLACES)


@pytest.fixture
def file(tmp_path):
    """Reads a config file into this process's defaults for the length of a test."""
    before = effective.current()

    def read(text: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        effective.install(effective.Defaults(file=read_file(str(path))))

    yield read
    effective.install(before)


MEASURED = "cache_config: {residual_diff_threshold: 0.2}"
AROUND = "cache_config: {forecast: output, scm_preset: fast, scm_policy: static}"


@pytest.mark.parametrize(("text", "explicit", "graphs"), [
    (MEASURED, (), False), (MEASURED, ("enable_breakable_cuda_graph",), True), (AROUND, (), True), ("{}", (), True),
])
def test_graphs_that_the_host_chose_make_way_for_caching_from_a_file(file, text, explicit, graphs):
    file(text)
    args = SimpleNamespace(
        cache_dit_config="", enable_breakable_cuda_graph=True, is_arg_explicitly_set=lambda name: name in explicit
    )
    startup.before_launch(args)
    assert args.enable_breakable_cuda_graph is graphs
