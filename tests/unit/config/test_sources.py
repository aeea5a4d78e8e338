"""What each source accepts and refuses, in one line that names field, value and origin."""

from __future__ import annotations

import json

import pytest

from sglang_cachedit_plugin.config import sources
from sglang_cachedit_plugin.config.settings import KNOBS, CacheSettings
from sglang_cachedit_plugin.config.sources import Source, load_file, read_environment, read_file, read_request, resolve
from sglang_cachedit_plugin.errors import SettingError

ENV = "SGLANG_CACHE_DIT_"

VARIABLES = [
    ("FN", "2", "Fn_compute_blocks", 2),
    ("BN", "1", "Bn_compute_blocks", 1),
    ("WARMUP", "0", "max_warmup_steps", 0),
    ("RDT", "0.35", "residual_diff_threshold", 0.35),
    ("MC", "-1", "max_continuous_cached_steps", -1),
    ("TAYLORSEER", "true", "enable_taylorseer", True),
    ("TS_ORDER", "2", "taylorseer_order", 2),
    ("DMD", "1", "enable_dmd", True),
    ("DMD_HISTORY", "8", "dmd_history", 8),
    ("DMD_RANK", "3", "dmd_rank", 3),
    ("DMD_RIDGE", "1e-6", "dmd_ridge", 1e-6),
    ("DMD_SVD_PRECISION", "high", "dmd_svd_precision", "high"),
]
PRIMARY_ONLY = [
    ("SCM_PRESET", "fast", "steps_computation_mask", "fast"),
    ("SCM_POLICY", "static", "steps_computation_policy", "static"),
    ("LOCKSTEP", "yes", "lockstep", True),
    ("VERIFY_RANKS", "on", "verify_ranks", True),
    ("FORECAST", "output", "forecast", "output"),
    ("FORECAST_ORDER", "3", "forecast_order", 3),
    ("ERROR_TOLERANCE", "0.01", "error_tolerance", 0.01),
    ("CORRECTOR", "false", "corrector", False),
    ("CORRECTOR_ORDER", "1", "corrector_order", 1),
    ("CORRECTOR_CARRY", "1", "corrector_carry", 1.0),
    ("STRICT", "1", "strict", True),
]


@pytest.mark.parametrize(("suffix", "text", "name", "value"), VARIABLES + PRIMARY_ONLY)
def test_a_variable_sets_its_knob(suffix, text, name, value):
    source, warnings = read_environment({ENV + suffix: text, "PATH": "/bin"})
    resolved = resolve(source)
    assert not warnings
    assert value != getattr(CacheSettings(), name), "the row must differ from the default"
    assert getattr(resolved.primary, name) == getattr(resolved.secondary, name) == value
    assert resolved.origins[name] == resolved.secondary_origins[name] == ENV + suffix
    assert {n for n, origin in resolved.origins.items() if origin != "default"} == {name}


@pytest.mark.parametrize(("suffix", "text", "name", "value"), VARIABLES)
def test_a_secondary_variable_sets_the_second_transformer_only(suffix, text, name, value):
    variable = f"{ENV}SECONDARY_{suffix}"
    resolved = resolve(read_environment({variable: text})[0])
    assert getattr(resolved.secondary, name) == value
    assert getattr(resolved.primary, name) == getattr(CacheSettings(), name)
    assert resolved.secondary_origins[name] == variable
    assert resolved.config()[f"secondary.{name}"] == {"value": value, "origin": variable}


def test_the_bins_are_read_together():
    environment = {ENV + "SCM_COMPUTE_BINS": "8,3,3,2,2", ENV + "SCM_CACHE_BINS": "1, 2,2,2,3"}
    settings = resolve(read_environment(environment)[0]).primary
    assert settings.scm_compute_bins == (8, 3, 3, 2, 2)
    assert settings.scm_cache_bins == (1, 2, 2, 2, 3)


def test_the_switch():
    assert read_environment({})[0].enabled is None
    for text, value in [("true", True), ("False", False), ("0", False), (" on ", True)]:
        enabled = read_environment({ENV + "ENABLED": text})[0].enabled
        assert (enabled.value, enabled.origin) == (value, ENV + "ENABLED")


def test_an_empty_variable_is_unset():
    names = [ENV + "ENABLED", *sources.VARIABLES, *sources.SECONDARY_VARIABLES]
    for text in ("", "  "):
        assert read_environment(dict.fromkeys(names, text)) == (Source(), ())
    environment = {ENV + "TAYLORSEER": "true", ENV + "SECONDARY_TAYLORSEER": ""}
    assert resolve(read_environment(environment)[0]).secondary.enable_taylorseer is True


def test_a_variable_only_the_host_knows_is_a_warning_and_the_host_is_asked_only_then():
    asked = []

    def host():
        asked.append(True)
        return {ENV + "FUTURE"}

    assert read_environment({ENV + "FN": "2"}, host)[1] == ()
    assert not asked
    source, warnings = read_environment({ENV + "FUTURE": "x", ENV + "FN": "2"}, host)
    assert [ENV + "FUTURE" in warning for warning in warnings] == [True]
    assert source.primary["Fn_compute_blocks"].value == 2


BAD_VARIABLES = [
    ({"WARMPU": "2"}, ENV + "WARMPU", "unknown variable; did you mean 'SGLANG_CACHE_DIT_WARMUP'?"),
    ({"SECONDARY_LOCKSTEP": "1"}, ENV + "SECONDARY_LOCKSTEP", "SGLANG_CACHE_DIT_LOCKSTEP holds for both transformers"),
    ({"FN": "two"}, ENV + "FN", "'two' (environment): expected a whole number of at least 1"),
    ({"FN": "0"}, ENV + "FN", "expected a whole number of at least 1"),
    ({"FN": "1.5"}, ENV + "FN", "expected a whole number"),
    ({"WARMPU": ""}, ENV + "WARMPU", "unknown variable"),
    ({"RDT": "nan"}, ENV + "RDT", "expected a number from 0 to 1"),
    ({"RDT": "inf"}, ENV + "RDT", "expected a number from 0 to 1"),
    ({"RDT": "1.01"}, ENV + "RDT", "expected a number from 0 to 1"),
    ({"SECONDARY_WARMUP": "-4"}, ENV + "SECONDARY_WARMUP", "of at least 0"),
    ({"TS_ORDER": "7"}, ENV + "TS_ORDER", "from 1 to 2"),
    ({"TAYLORSEER": "maybe"}, ENV + "TAYLORSEER", "expected true or false"),
    ({"ENABLED": "tru"}, ENV + "ENABLED", "expected true or false"),
    ({"SCM_POLICY": "statik"}, ENV + "SCM_POLICY", "did you mean 'static'?"),
    ({"SCM_PRESET": "fats"}, ENV + "SCM_PRESET", "medium, fast, ultra; did you mean 'fast'?"),
    ({"SCM_PRESET": "1,0"}, ENV + "SCM_PRESET", "expected one of none, slow, medium, fast, ultra"),
    ({"TAYLORSEER": "1", "DMD": "1"}, ENV + "DMD", "exclude each other"),
    ({"SECONDARY_TAYLORSEER": "1", "SECONDARY_DMD": "1"}, ENV + "SECONDARY_DMD", "exclude each other"),
    ({"SCM_COMPUTE_BINS": "8,3"}, ENV + "SCM_CACHE_BINS", "together or not at all"),
    ({"SCM_COMPUTE_BINS": "8,3", "SCM_CACHE_BINS": " "}, ENV + "SCM_CACHE_BINS", "together or not at all"),
    ({"SCM_CACHE_BINS": "8,3"}, ENV + "SCM_COMPUTE_BINS", "together or not at all"),
    ({"SECONDARY_SCM_COMPUTE_BINS": "8,3"}, ENV + "SECONDARY_SCM_CACHE_BINS", "together or not at all"),
    ({"SCM_COMPUTE_BINS": "8", "SCM_CACHE_BINS": "1,1"}, ENV + "SCM_CACHE_BINS", "expected 0 or 1 cache bins"),
    ({"MAX_ACCUMULATED_DIFF": "2"}, ENV + "MAX_ACCUMULATED_DIFF", "error_tolerance takes its place"),
    ({"SECONDARY_MAX_ACCUMULATED_DIFF": "2"}, ENV + "SECONDARY_MAX_ACCUMULATED_DIFF", "error_tolerance takes"),
    ({"SCM_COMPUTE_BINS": "8,", "SCM_CACHE_BINS": "1"}, ENV + "SCM_COMPUTE_BINS", "positive step counts"),
    ({"SCM_COMPUTE_BINS": "8,0", "SCM_CACHE_BINS": "1"}, ENV + "SCM_COMPUTE_BINS", "positive step counts"),
]


@pytest.mark.parametrize(("environment", "field", "words"), BAD_VARIABLES)
def test_a_bad_variable(environment, field, words):
    with pytest.raises(SettingError) as caught:
        read_environment({ENV + suffix: text for suffix, text in environment.items()})
    one_line(caught.value, field, "environment", words)


def one_line(error: SettingError, field: str, origin: str, words: str) -> None:
    line = str(error)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.startswith(f"{field} = ")
    assert origin in error.origin
    assert f"({error.origin})" in line
    assert words in line


def cache(text: str) -> str:
    return "cache_config: {" + text + "}"


FILE = "--cache-dit-config"
BAD_FILES = [
    (cache("max_warmup_stpes: 4"), "max_warmup_stpes", "unknown key; did you mean 'max_warmup_steps'?"),
    ("cache_confg: {}", "cache_confg", "unknown section; did you mean 'cache_config'?"),
    ("cache_config: {}\nextra: 1", "extra", "unknown section"),
    ("5: {}", "5", "unknown section"),
    ("cache_config: false", "cache_config", "expected a mapping"),
    ("cache_config: []", "cache_config", "expected a mapping"),
    ("secondary: ''", "secondary", "expected a mapping"),
    ("profiles: [a]", "profiles", "expected a mapping"),
    ("profiles: {p: 3}", "profiles.p", "expected a mapping"),
    ("profiles: {p: {profile: q}}", "profile", "none is defined"),
    (cache("residual_diff_threshold: abc"), "residual_diff_threshold", "expected a number from 0 to 1"),
    (cache("residual_diff_threshold: .nan"), "residual_diff_threshold", "expected a number from 0 to 1"),
    (cache("residual_diff_threshold: -.inf"), "residual_diff_threshold", "expected a number from 0 to 1"),
    (cache("max_warmup_steps: true"), "max_warmup_steps", "expected a whole number"),
    (cache("max_warmup_steps: '4'"), "max_warmup_steps", "expected a whole number"),
    (cache("max_warmup_steps: null"), "max_warmup_steps", "expected a whole number"),
    (cache("max_warmup_steps: 0x" + "f" * 5000), "max_warmup_steps", "expected a whole number"),
    (cache("enable_taylorseer: 1"), "enable_taylorseer", "expected true or false"),
    (cache("enable_taylorseer: true, enable_dmd: true"), "enable_dmd", "exclude each other"),
    (cache("enable_separate_cfg: sure"), "enable_separate_cfg", "expected true or false"),
    (cache("scm_compute_bins: [8, 3]"), "scm_cache_bins", "together or not at all"),
    (cache("scm_compute_bins: [4, 2], scm_cache_bins: [2, 2, 2]"), "scm_cache_bins", "expected 1 or 2"),
    (cache("scm_compute_bins: [99999999999], scm_cache_bins: [1]"), "scm_compute_bins", "step counts"),
    (cache("scm_compute_bins: [4, 1], scm_cache_bins: [2], num_inference_steps: 8"), "scm_compute_bins",
     "the bins cover 7 steps, expected at least 8"),
    (cache("steps_computation_mask: [1, 0], num_inference_steps: 3"), "steps_computation_mask", "expected 3"),
    (cache("steps_computation_mask: [0, 0]"), "steps_computation_mask", "a list of 0 and 1"),
    (cache("steps_computation_mask: [1, 2]"), "steps_computation_mask", "a list of 0 and 1"),
    (cache("steps_computation_mask: []"), "steps_computation_mask", "a list of 0 and 1"),
    (cache("scm_preset: fast, steps_computation_mask: slow"), "steps_computation_mask", "also as scm_preset"),
    (cache("scm_preset: [1, 0], num_inference_steps: 3"), "scm_preset", "expected 3"),
    ("secondary: {lockstep: true}", "lockstep", "it holds for both transformers"),
    ("", FILE, "empty"),
    ("# nothing\n", FILE, "empty"),
    ("cache_config: [", FILE, "not valid YAML or JSON"),
    ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", FILE, "aliases are not allowed"),
    ("cache_config: !!python/object/apply:os.system [true]", FILE, "not valid YAML or JSON"),
    ("cache_config: !!bool maybe", FILE, "not valid YAML or JSON"),
    ("cache_config: !!int ''", FILE, "not valid YAML or JSON"),
    ("cache_config: !!timestamp soon", FILE, "not valid YAML or JSON"),
    ("cache_config: {}\ncache_config: {}", FILE, "given twice"),
    (cache("max_warmup_steps: 1, max_warmup_steps: 2"), FILE, "given twice"),
    ("? [a]\n: 1", FILE, "not valid YAML or JSON"),
    ("cache_config: " + "[" * 5000, FILE, "not valid YAML or JSON"),
    ("[1, 2]", FILE, "expected sections cache_config"),
    ("just words", FILE, "expected sections cache_config"),
    ("x: " + "y" * (1 << 20), FILE, "larger than"),
]


@pytest.mark.parametrize(("text", "field", "words"), BAD_FILES, ids=[row[0][:40] for row in BAD_FILES])
def test_a_bad_file(tmp_path, text, field, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingError) as caught:
        read_file(str(path))
    one_line(caught.value, field, "command line" if field == FILE and "sections" not in words else "bad.yaml", words)


def test_bytes_that_are_no_text_and_paths_that_are_no_file(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"cache_config: {} # \xe9")
    for path, words in [("latin.yaml", "not UTF-8"), (".", "a folder"), ("absent.yaml", "no such file")]:
        with pytest.raises(SettingError) as caught:
            read_file(str(tmp_path / path))
        one_line(caught.value, FILE, "command line", words)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "expected sections"), ("{", "not valid"), ("", "not valid"), ("null", "empty"),
     ('{"cache_config": {"strict": true, "strict": false}}', "key 'strict' is given twice"),
     ('{"cache_config": {"residual_diff_threshold": NaN}}', "from 0 to 1")],
)
def test_a_bad_json_file(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SettingError, match=words) as caught:
        read_file(str(path))
    assert len(str(caught.value).splitlines()) == 1


GOOD = {
    "cache_config": {"max_warmup_steps": 8, "enable_taylorseer": True, "steps_computation_mask": [1, 0, 1]},
    "secondary": {"max_warmup_steps": 2},
    "attention_backend": "native",
    "profiles": {"draft": {"residual_diff_threshold": 0.5, "secondary": {"Fn_compute_blocks": 2}}},
}


def test_yaml_json_and_a_mapping_read_the_same(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    (tmp_path / "c.yaml").write_text(json.dumps(GOOD))
    from_json, from_yaml = (read_file(str(tmp_path / name)) for name in ("c.json", "c.yaml"))
    from_mapping = read_file(GOOD)
    assert load_file(str(tmp_path / "c.yaml")) == GOOD
    for file, label in [(from_json, "c.json"), (from_yaml, "c.yaml"), (from_mapping, "cache_dit_config")]:
        assert file.source.enabled.value is True
        assert file.passed_on == {"attention_backend": "native"}
        assert not file.warnings
        resolved = resolve(file.profiles["draft"], file.source)
        assert resolved.primary == CacheSettings(
            max_warmup_steps=8, enable_taylorseer=True, steps_computation_mask=(1, 0, 1),
            residual_diff_threshold=0.5,
        )
        assert resolved.secondary.max_warmup_steps == 2
        assert resolved.secondary.Fn_compute_blocks == 2
        assert resolved.origins["max_warmup_steps"] == f"{label} cache_config.max_warmup_steps"
        assert resolved.secondary_origins["max_warmup_steps"] == f"{label} secondary.max_warmup_steps"
        assert resolved.origins["residual_diff_threshold"].startswith(f"{label} profiles.draft")


def test_the_published_misspelling_is_read_with_a_warning():
    file = read_file({"cache_config": {"enable_sperate_cfg": True}})
    assert len(file.warnings) == 1
    assert "enable_sperate_cfg" in file.warnings[0]
    assert "enable_separate_cfg" in file.warnings[0]
    with pytest.raises(SettingError, match="expected true or false"):
        read_file({"cache_config": {"enable_sperate_cfg": "x"}})


def test_a_section_that_is_absent_or_null_says_nothing():
    profiles = {"profiles": {"draft": {"scm_preset": "fast"}}}
    for raw in ({}, {"cache_config": None}, {"attention_backend": "native"}, profiles, {"secondary": {}}):
        assert read_file(raw).source.enabled is None
    assert read_file({"cache_config": {}}).source.enabled.value is True


def test_a_request_names_a_profile_the_server_has():
    assert read_request({"profile": "draft"}, profiles={"draft": 1}).profile == "draft"
    for bad in ("drafd", "", 1, ["draft"], {"draft": 1}, True):
        with pytest.raises(SettingError, match=r"profile = .* expected one of: draft, final"):
            read_request({"profile": bad}, profiles={"draft": 1, "final": 2})


def test_every_knob_says_what_it_is():
    assert all(knob.doc for knob in KNOBS.values())
