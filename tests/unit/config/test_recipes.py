"""Every file in configs/ loads, fits its machine, says what it is for; the schema agrees with the strict checker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin import cli
from sglang_cachedit_plugin.config.diffusers_sections import (
    ATTENTION_BACKENDS,
    PARALLELISM,
    QUANT_SPELLINGS,
    QUANT_TYPES,
    QUANTIZE,
    SPELLINGS,
    Machine,
    fit,
)
from sglang_cachedit_plugin.config.json_schema import config_schema
from sglang_cachedit_plugin.config.settings import ALIASES, INERT_KNOBS, KNOBS
from sglang_cachedit_plugin.config.sources import read_file
from sglang_cachedit_plugin.errors import SettingError

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs").glob("*"))
HOPPER = Machine(device="cuda", capability=(9, 0), has=lambda module: True, cache_dit="1.5.1")
DOCUMENTED = {
    "cache", "cache_taylorseer", "cache_scm", "cache_separate_cfg", "parallel_1d", "parallel_2d", "parallel_3d",
    "parallel_uaa", "parallel_fp8", "parallel_async", "parallel_extra", "hybrid", "attention", "quantize", "combined",
}
"""Recipes of SGLang's documentation."""


def number(checker, value):
    """JSON has one type of number, where 2.0 is an integer; YAML has two, and so has the strict checker."""
    return isinstance(value, int) and not isinstance(value, bool)


STRICT = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", number),
)(config_schema())


def ranks(text: str) -> int:
    """The number of devices that a recipe's command starts."""
    found = re.search(r"--num-gpus (\d+)", text)
    return int(found[1]) if found else 1


def test_the_recipes_of_the_documentation_are_all_there():
    assert {path.stem for path in RECIPES} >= DOCUMENTED
    assert {path.suffix for path in RECIPES} == {".yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe(path):
    text = path.read_text()
    file = read_file(str(path))
    assert not file.warnings
    fit(file.passed_on, ranks(text), HOPPER, path.name)
    STRICT.validate(yaml.safe_load(text))
    header = text[: re.search("^[a-z]", text, re.MULTILINE).start()]
    schema, purpose, *_ = lines = header.splitlines()
    assert (ROOT / "configs" / schema.removeprefix("# yaml-language-server: $schema=")).is_file()
    assert purpose.startswith("# ") and purpose.endswith(".")
    assert sum(line.startswith("# Hardware: ") for line in lines) == 1
    command = next(line for line in lines if line.startswith("#   sglang generate"))
    assert f"--cache-dit-config configs/{path.name}" in command
    assert "--backend diffusers" in command or not file.passed_on
    assert ("native" in header.lower()) or file.passed_on, "a cache alone works natively too, and says so"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_doctor_checks_a_recipe_without_a_model(path, capsys, monkeypatch):
    monkeypatch.setattr("sglang_cachedit_plugin.config.diffusers_sections.find_spec", lambda module: object())
    arguments = ["doctor", "--config", str(path), "--num-gpus", str(ranks(path.read_text()))]
    status, out = cli.main(arguments), capsys.readouterr().out
    assert status == 0 and out.startswith("nothing is wrong\n"), out
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sections = read_file(str(path)).passed_on
    assert set(found["settings"]["sections"]) == set(sections)


def test_the_doctor_states_the_arithmetic(capsys, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("parallelism_config: {ulysses_size: auto, tp_size: 3}\n")
    assert cli.main(["doctor", "--config", str(file), "--num-gpus", "4"]) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "p.yaml parallelism_config" in errors[0]
    assert "ulysses_size auto x tp_size 3 does not divide 4" in errors[0]


def test_the_schema_command_prints_the_shipped_schema(capsys):
    assert cli.main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "sglang_cachedit_plugin" / "cache-dit-config.schema.json").read_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(printed))


WORDS = st.sampled_from(
    ["auto", "native", "flash", "float8", "INT8", "svdq_int4_r8_dq", "p2p", "fast", "none", "static", "low", "output",
     "8,3", "2", "", " ", "x", "vae", *QUANT_TYPES, *QUANT_SPELLINGS, *ATTENTION_BACKENDS]
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 70) | st.integers() | st.floats(-1, 2, allow_nan=False) | WORDS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4
)


def sections(*names):
    return st.dictionaries(st.sampled_from(names) | WORDS, VALUES, max_size=4)


CACHE = sections(*KNOBS, *ALIASES, *INERT_KNOBS, "enable_sperate_cfg")
PARALLEL = sections(*PARALLELISM, *SPELLINGS, "cp_plan")
QUANT = sections(*QUANTIZE) | st.fixed_dictionaries(
    {"quant_type": VALUES}, optional={name: VALUES for name in QUANTIZE if name != "quant_type"}
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "cache_config": CACHE | VALUES,
        "secondary": CACHE | VALUES,
        "profile": VALUES,
        "profiles": st.dictionaries(WORDS, CACHE | VALUES, max_size=2) | VALUES,
        "parallelism_config": PARALLEL | VALUES,
        "quantize_config": QUANT | VALUES,
        "attention_backend": VALUES,
        "unknown": VALUES,
    },
)
SUMS = (
    "expected one of ulysses_size", "ulysses_size of at least 2", "does not work with ring_size", "svdq types",
    "contradicts attention_backend", "does not split sequences", "no ring kernel", "cache bins", "the bins cover",
    "one a step", "together or not at all", "positive step counts", "excludes schedules", "already a row",
    "one for each 0", "one falling number", "width and height", "the first 1", "list of 1 to 4 numbers",
    "without effect beside",
)
"""What only the strict checker says: sums, and one key against another."""


@settings(max_examples=600, deadline=None)
@given(FILES)
@example({"cache_config": {"steps_computation_mask": [1, 0], "scm_preset": "fast"}})
@example({"cache_config": {"enable_taylorseer": True, "enable_dmd": True}})
@example({"parallelism_config": {"ulysses": 2, "ulysses_size": 2}})
@example({"parallelism_config": {"ulysses_size": "auto", "ring_size": "auto"}})
@example({"profiles": {"draft": {"secondary": {"lockstep": True}}}})
@example({"profiles": {"draft": {"profile": "x"}}})
@example({"profiles": {"draft": None}})
@example({"profiles": {"": {}}})
@example({"profile": ""})
@example({"cache_config": {"error_tolerance": 0.1}, "secondary": {"max_warmup_steps": 2}})
@example({"quantize_config": {"quant_type": "Float8_Blockwise", "components_to_quantize": {"vae": {"quant_type": 1}}}})
@example({"quantize_config": {}})
@example({"cache_config": {"schedules": [{"steps": 2, "mask": "10", "size": "64x64", "timesteps": [2, 1]}]}})
@example({"cache_config": {"schedules": [{"steps": 2, "mask": [1, 0], "weights": [[1.5]], "order": 4}]}})
@example({"cache_config": {"schedules": [{"steps": 2}]}})
def test_the_schema_agrees_with_the_strict_checker(raw):
    refused = ""
    try:
        read_file(raw)
    except SettingError as error:
        refused = str(error)
    complaint = next((error.message for error in STRICT.iter_errors(raw)), "")
    assert refused or not complaint
    assert complaint or not refused or any(words in refused for words in SUMS)


@pytest.mark.parametrize(
    "raw",
    [{"cache_confg": {}}, {"cache_config": {"max_warmup_stepz": 1}}, {"attention_backend": "sdpa"},
     {"parallelism_config": {"ulysses_size": 0}}, {"quantize_config": {"quant_type": "float4"}},
     {"secondary": {"lockstep": True}}, {"cache_config": {"residual_diff_threshold": 1.5}}],
)
def test_the_schema_refuses(raw):
    assert not STRICT.is_valid(raw)
