"""Rows that other distributions bring: the documented example, installed as a real distribution on the path."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from sglang_cachedit_plugin import adapters
from sglang_cachedit_plugin.adapters import entry_points
from sglang_cachedit_plugin.cache.cached_model import CachedTransformer, preset_mask
from sglang_cachedit_plugin.cache.spec import Identity, TransformerSpec
from sglang_cachedit_plugin.cache.step_plan import build_plan
from sglang_cachedit_plugin.config.settings import CacheSettings
from sglang_cachedit_plugin.doctor import report
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.report.stats import TransformerStats
from tests.unit.blocks import wanted

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-model.md"
ROWS, MODEL = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
POINT = re.search(r'entry-points."(.*?)"\]\n(\S+) = "(.*?)"', PAGE.read_text()).groups()


class Site:
    """A folder on the path into which distributions are put."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        monkeypatch.syspath_prepend(folder)
        self.modules: list[str] = []

    def install(self, name: str, rows: str, point: tuple[str, str, str] | None = None) -> None:
        module = f"{name.replace('-', '_')}_rows"
        group, key, value = point or (entry_points.GROUP, name, f"{module}:ROWS")
        (self.folder / f"{value.split(':')[0]}.py").write_text(rows)
        info = self.folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{key} = {value}\n")
        self.modules.append(value.split(":")[0])
        entry_points.load.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path, monkeypatch)
    entry_points.load.cache_clear()
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)
    entry_points.load.cache_clear()


def row(family: str) -> str:
    return f'ModelAdapter(family="{family}", blocks=(Blocks(name="blocks", streams=("x",)),))'


IMPORT = "from sglang_cachedit_plugin.adapters import ModelAdapter, Blocks\n"


def my_transformer() -> type:
    space: dict = {}
    exec(MODEL, space)
    return space["MyTransformer"]


def test_the_documented_example_caches(site):
    torch.manual_seed(1)
    model = my_transformer()().eval()
    with pytest.raises(MountError, match="no adapter describes its blocks"):
        CachedTransformer("transformer", model)
    site.install("my-models", ROWS, POINT)
    now = {}
    calls = []
    for index, block in enumerate(model.double_blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append((now["step"], index)))

    def run(step: int) -> torch.Tensor:
        now["step"] = step
        inputs = torch.Generator().manual_seed(2)
        with torch.no_grad():
            return model(torch.randn(1, 3, 8, generator=inputs), torch.randn(1, 2, 8, generator=inputs))

    plain = run(0)
    mounted = CachedTransformer("transformer", model)
    mask = (1, 0, 1, 0)
    settings = CacheSettings(
        max_warmup_steps=1, steps_computation_mask=mask, steps_computation_policy="static"
    )
    plan, _ = build_plan(settings, 4, preset_mask)
    spec = TransformerSpec(name="transformer", settings=settings, plan=plan)
    stats = TransformerStats(steps=4)
    mounted.refresh(wanted(spec, stats, lambda name, kwargs: Identity("cond", now["step"])))
    calls.clear()
    outputs = [run(step) for step in range(4)]
    assert calls == [(step, index) for step in range(4) for index in range(4 if mask[step] else 1)]
    assert torch.equal(outputs[0], plain)
    torch.testing.assert_close(outputs[1], plain)
    assert stats.branches["cond"].cached == [1, 3]
    assert stats.notes == []


def test_a_callable_gives_rows_and_a_name_with_its_module_outranks_the_bare_one(site):
    rows = f"{{'Mine': {row('bare')}, '{__name__}.Mine': {row('full')}}}"
    site.install("first", f"{IMPORT}def ROWS():\n    return {rows}")

    class Mine:
        __module__, __qualname__ = __name__, "Mine"

    class Theirs:
        __module__, __qualname__ = "elsewhere", "Mine"

    Theirs.__name__ = "Mine"
    assert adapters.find_adapter(Mine).family == "full"
    assert adapters.find_adapter(Theirs).family == "bare"


def test_a_row_from_outside_outranks_the_one_that_ships(site):
    class FluxTransformer2DModel:
        pass

    before = adapters.find_adapter(FluxTransformer2DModel)
    assert before is adapters.NATIVE["FluxTransformer2DModel"]
    site.install("better-flux", f"{IMPORT}ROWS = {{'FluxTransformer2DModel': {row('better')}}}")
    assert adapters.find_adapter(FluxTransformer2DModel).family == "better"


def test_two_rows_of_one_name_are_both_left_out(site):
    site.install("one", f"{IMPORT}ROWS = {{'Mine': {row('one')}, 'Other': {row('other')}}}")
    site.install("two", f"{IMPORT}ROWS = {{'Mine': {row('two')}}}")
    found = entry_points.load()
    assert set(found.rows) == {"Other"}
    assert found.problems == (
        "Mine has rows in entry point 'one' of one and in entry point 'two' of two: none of them is used",
    )


@pytest.mark.parametrize(("rows", "problem"), [
    ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ("ROWS = [1]", "TypeError: expected a mapping from class names to ModelAdapter, found list"),
    ("ROWS = {'Mine': 3}", "TypeError: 'Mine': expected an ModelAdapter, found int"),
    (f"{IMPORT}ROWS = {{'Mine': ModelAdapter(family='nothing')}}", "ValueError: nothing: block lists, or why there are "
     "none, one of the two"),
    ("", "AttributeError: module 'broken_rows' has no attribute 'ROWS'"),
])
def test_what_cannot_be_read_is_one_line_and_the_rest_goes_on(site, rows, problem):
    site.install("broken", rows)
    site.install("whole", f"{IMPORT}ROWS = {{'Whole': {row('whole')}}}")
    found = entry_points.load()
    assert found.problems == (f"entry point 'broken' of broken: {problem}",)
    assert set(found.rows) == {"Whole"}
    with pytest.raises(MountError, match="no adapter describes its blocks; entry point 'broken' of broken"):
        CachedTransformer("transformer", my_transformer()())
    assert f"rows of other packages: {found.problems[0]}" in report.examine()["warnings"]


def test_nothing_is_imported_before_a_model_is_mounted(site):
    site.install("lazy", "raise SystemExit(3)")
    assert "lazy_rows" not in sys.modules
