"""Settings are fixed at launch: workers get what the launching process has read, before they load a model."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from torch import nn

from sglang_cachedit_plugin import hooks
from sglang_cachedit_plugin.adapters import NATIVE
from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.errors import MountError
from sglang_cachedit_plugin.integration import native, startup


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults())


def server_arguments(config) -> SimpleNamespace:
    return SimpleNamespace(
        cache_dit_config=config, backend="sglang", num_gpus=1, enable_breakable_cuda_graph=False
    )


def arguments(path) -> SimpleNamespace:
    return server_arguments(str(path))


def launched(path) -> SimpleNamespace:
    """The server arguments of a worker, as spawning hands them on, in a process that has read nothing yet."""
    made = arguments(path)
    startup.before_launch(made)
    made = pickle.loads(pickle.dumps(made))
    effective.install(Defaults())
    return made


def threshold() -> tuple[float, str]:
    resolved = effective.current().decide(None, None).resolved
    return resolved.primary.residual_diff_threshold, resolved.origins["residual_diff_threshold"]


def test_a_file_that_is_edited_after_launch_parts_no_process_from_another(tmp_path):
    path = tmp_path / "rdt.yaml"
    path.write_text("cache_config: {residual_diff_threshold: 0.1}\n")
    args = launched(path)
    path.write_text("cache_config: {residual_diff_threshold: 0.9}\n")
    startup.ensure_file(args)
    assert threshold() == (0.1, "rdt.yaml cache_config.residual_diff_threshold")
    assert args.cache_dit_config == str(path)
    path.unlink()
    startup.before_launch(args)
    assert threshold()[0] == 0.1


def test_a_second_launch_in_one_process_reads_the_file_again(tmp_path):
    path = tmp_path / "rdt.yaml"
    for value in (0.1, 0.2):
        path.write_text(f"cache_config: {{residual_diff_threshold: {value}}}\n")
        startup.before_launch(arguments(path))
        assert threshold()[0] == value


def test_settings_given_as_a_mapping_are_handed_on_as_they_are():
    made = server_arguments({"cache_config": {"strict": True}})
    startup.before_launch(made)
    assert made.cache_dit_config == {"cache_config": {"strict": True}}
    assert effective.current().enabled


class Refused(nn.Module):
    """A class of the host that cannot be cached."""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    pytest.importorskip("sglang")
    refused = next(row for row in NATIVE.values() if row.unsupported)
    monkeypatch.setitem(NATIVE, "Refused", refused)
    path = tmp_path / "strict.yaml"
    path.write_text("cache_config: {strict: true}\n")
    pipeline = SimpleNamespace(modules={"transformer": Refused()})
    return SimpleNamespace(server_args=launched(path), pipeline=pipeline)


def test_a_strict_file_stops_a_worker_whose_model_cannot_be_cached(worker):
    with pytest.raises(MountError, match="Refused"):
        hooks.start_worker(lambda worker: None, worker)


def test_the_host_is_told_of_the_files_caching_while_it_makes_its_stages(worker):
    told = []

    def load(worker):
        worker.pipeline.modules = {}
        told.append(native.CacheDitDenoisingMixin._cache_dit_requested(SimpleNamespace()))

    hooks.start_worker(load, worker)
    assert told == [True]
