"""Whatever a request, a file or a variable holds: a value in range, or SettingError in one line."""

from __future__ import annotations

import enum
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.knobs import MAX_LENGTH, PRESETS
from sglang_cachedit_plugin.config.settings import ALIASES, INERT_KNOBS, KNOBS, CacheSettings
from sglang_cachedit_plugin.config.sources import (
    ENABLED,
    ENABLED_VARIABLE,
    SECONDARY_VARIABLES,
    VARIABLES,
    read_environment,
    read_file,
    read_overrides,
    read_request,
    resolve,
)
from sglang_cachedit_plugin.config.tuned_schedules import FIELDS
from sglang_cachedit_plugin.errors import SettingError, shown


class _Text(str):
    __slots__ = ()


class _Number(enum.IntEnum):
    ONE = 1


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


# Python itself refuses to print these, so hypothesis cannot draw them.
UNPRINTABLE = {"huge": 10**5000, "negative": -(10**5000), "deep": nested(3000), "list": [10**5000]}

SPECIAL = st.sampled_from(
    [None, True, False, 0, 1, -1, 10**18, 10**400, 0.0, 1.0, math.nan, math.inf, "", "nan", "1", "none",
     "fast", "static", "\ud800", "a\nb", "\x1b[31m", _Text("static"), _Text("fast"), _Number.ONE, b"1",
     [], {}, [1, 0], [1, 1.0], [[1]], [None], (1, 0), {"a": 1}, {1: 2}, object(), [10**12], "8,3", "1,",
     "9" * 5000, set(), [True]]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | SPECIAL,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers(-3, 70) | st.floats(-0.5, 1.5)
LISTS = st.lists(st.integers(-1, 3), max_size=8)
NAMES = st.sampled_from([*KNOBS, *ALIASES, *INERT_KNOBS])
KEYS = NAMES | st.text() | st.none() | st.integers() | st.sampled_from(["profile", "secondary", (1,)])
TEXTS = st.sampled_from(
    ["", "none", "1e400", "0x10", "9" * 5000, "\udcff", "true", "1_0", "٣", "2,3", "2,3,", "fast", "high"]
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from([*FIELDS, "step"]), JSON | st.integers(1, 3) | st.sampled_from(["101", "1x1"])),
    max_size=2,
)
VALUES = JSON | ROWS | NUMBERS | LISTS | st.sampled_from(["low", "dynamic", "output", "slow", "2,3"])


def in_range(name: str, value: object) -> bool:
    """An independent reading of each knob's declaration."""
    knob = KNOBS[name]
    if value is None:
        return knob.optional
    kind = type(knob).__name__
    if kind == "Flag":
        return value is True or value is False
    if kind in ("Whole", "Number"):
        if type(value) is not (int if kind == "Whole" else float) or not math.isfinite(value):
            return False
        above = knob.low is None or value >= knob.low
        return above and (knob.high is None or value <= knob.high)
    if kind == "Choice":
        return value in knob.choices
    if kind == "Bins":
        return isinstance(value, tuple) and all(type(run) is int and 0 < run <= MAX_LENGTH for run in value)
    if kind == "Rows":
        return isinstance(value, tuple) and all(len(row.mask) == row.steps and row.mask[0] == 1 for row in value)
    return value in PRESETS[1:] or (isinstance(value, tuple) and 1 in value and set(value) <= {0, 1})


def accepted_or_one_line(read):
    """Read; the error's line must be one line without control characters and fit into UTF-8."""
    refused = None
    try:
        source = read()
    except SettingError as error:
        refused = error
    if refused is not None:
        line = str(refused)
        assert line.isprintable()
        assert line.encode("utf-8")
        assert len(line) < 1000
        return
    for layer in (source.primary, source.secondary):
        for name, given_ in layer.items():
            assert in_range(name, given_.value), (name, given_)
    hash(resolve(source).primary)


@settings(max_examples=400)
@given(name=NAMES, value=VALUES)
@example(name="steps_computation_mask", value=[])
def test_any_value_of_any_knob(name, value):
    accepted_or_one_line(lambda: read_request({name: value}))
    accepted_or_one_line(lambda: read_request({"secondary": {name: value}}))


@settings(max_examples=300)
@given(raw=st.dictionaries(KEYS, VALUES, max_size=4) | VALUES)
@example(raw={"profile": [1]})
def test_any_request(raw):
    accepted_or_one_line(lambda: read_request(raw, profiles={"draft": None}))


@pytest.mark.parametrize("value", UNPRINTABLE.values(), ids=UNPRINTABLE)
def test_what_python_does_not_print_is_refused_all_the_same(value):
    for name in (*KNOBS, "profile"):
        with pytest.raises(SettingError, match=f"{name} = "):
            read_request({name: value})
    for raw in ({"cache_config": value}, {"nonsense": value}):
        with pytest.raises(SettingError):
            read_file(raw)
    with pytest.raises(SettingError):
        read_request({10**5000: value})


@settings(max_examples=200)
@given(
    raw=st.dictionaries(
        st.sampled_from(["cache_config", "secondary", "profiles", "attention_backend"]) | KEYS,
        VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=3,
    )
)
def test_any_file(raw):
    accepted_or_one_line(lambda: read_file(raw).source)


@settings(max_examples=300)
@given(variable=st.sampled_from(sorted(VARIABLES)), text=st.text() | NUMBERS.map(str) | TEXTS)
def test_any_text_of_any_variable(variable, text):
    accepted_or_one_line(lambda: read_environment({variable: text})[0])


BAD = {
    "Flag": ["maybe", 1, [], {}], "Whole": ["x", 1.5, -99, 10**9, True, "1e400"],
    "Number": ["x", -1.0, math.nan, [0.1]], "Choice": ["statik", 3, [], ""], "Bins": ["8,x", [0], [], "0", {}],
    "Mask": ["fats", [2], [0, 0], [], 5], "Rows": ["x", [], [3], [{"steps": 2}], [{"mask": "1x", "steps": 2}]],
}
"""What no setting of a kind takes, -99 and 10**9 where it has a limit there."""


def refusal_of(read) -> SettingError | None:
    try:
        read()
    except SettingError as error:
        return error
    return None


def entrances(key: str) -> dict[str, tuple]:
    """Origin -> what reads ``{key: value}`` there, for every mapping that settings stand in."""
    per_transformer = KNOBS[ALIASES.get(key, key)].per_transformer
    change = Defaults().start_up_profiles
    found = {
        "cache_dit_config cache_config": lambda raw: read_file({"cache_config": raw}),
        "cache_dit_config profiles.mine": lambda raw: read_file({"profiles": {"mine": raw}}),
        "cache_dit_params": lambda raw: Defaults().check({"cache_dit_params": raw}),
        "control": lambda raw: read_overrides(raw, profiles=change),
        "control.cache_config": lambda raw: read_overrides({"cache_config": raw}, profiles=change),
        "control.profiles.mine": lambda raw: read_overrides({"profiles": {"mine": raw}}, profiles=change),
    }
    if per_transformer:
        found |= {
            "cache_dit_config secondary": lambda raw: read_file({"secondary": raw}),
            "cache_dit_config profiles.mine.secondary":
                lambda raw: read_file({"profiles": {"mine": {"secondary": raw}}}),
            "cache_dit_params.secondary": lambda raw: Defaults().check({"cache_dit_params": {"secondary": raw}}),
            "control.secondary": lambda raw: read_overrides({"secondary": raw}, profiles=change),
        }
    return found


def names_it(error: SettingError | None, typed: str, value: object, origin: str, allowed: str) -> None:
    """One line with what was typed, its value (that of a row's field for rows), where, and what is taken."""
    assert error is not None
    line = str(error)
    assert line.isprintable()
    assert line.startswith((f"{typed} = {shown(value)} (", f"{typed}[0]"))
    assert f" ({origin}): " in line
    assert allowed in line or error.field.startswith(f"{typed}[0].")


@pytest.mark.parametrize("key", [*KNOBS, *ALIASES])
def test_a_bad_value_is_named_as_it_was_typed_with_its_origin_and_what_is_allowed(key):
    name = ALIASES.get(key, key)
    knob = KNOBS[name]
    for value in BAD[type(knob).__name__]:
        if (value == -99 and knob.low is None) or (value == 10**9 and knob.high is None):
            continue
        for origin, read in entrances(key).items():
            error = refusal_of(lambda read=read, value=value: read({key: value}))
            names_it(error, key, value, origin, knob.allowed().removesuffix(", or null"))


@pytest.mark.parametrize("variable", [ENABLED_VARIABLE, *VARIABLES, *SECONDARY_VARIABLES])
def test_a_bad_variable_is_named_as_it_was_typed_with_what_it_takes(variable):
    name = {**VARIABLES, **SECONDARY_VARIABLES}.get(variable)
    knob = KNOBS[name] if name else ENABLED
    # A variable takes no list.
    allowed = knob.allowed().partition(" or a list")[0]
    for value in [text for text in BAD[type(knob).__name__] if isinstance(text, str) and text]:
        error = refusal_of(lambda value=value: read_environment({variable: value}))
        names_it(error, variable, value, "environment", allowed)
        assert name is None or f"{name} = " not in str(error)


CONTRADICTIONS = [
    ({"enable_taylorseer": True, "enable_dmd": True}, "enable_dmd"),
    ({"scm_compute_bins": [8, 3]}, "scm_cache_bins"),
    ({"scm_cache_bins": [8, 3]}, "scm_compute_bins"),
    ({"scm_compute_bins": [4], "scm_cache_bins": [2, 2, 2]}, "scm_cache_bins"),
    ({"scm_preset": "fast", "schedules": [{"steps": 2, "mask": "10"}]}, "scm_preset"),
    ({"steps_computation_mask": "fast", "schedules": [{"steps": 2, "mask": "10"}]}, "steps_computation_mask"),
]


@pytest.mark.parametrize(("raw", "typed"), CONTRADICTIONS)
def test_a_contradiction_is_named_as_it_was_typed_wherever_it_stands(raw, typed):
    for origin, read in entrances(typed).items():
        error = refusal_of(lambda read=read: read(raw))
        names_it(error, typed, error.value, origin, error.allowed)
    for variables in (VARIABLES, SECONDARY_VARIABLES):
        typed_there = {ALIASES.get(name, name): variable for variable, name in variables.items()}
        if raw.keys() <= typed_there.keys():
            texts = {typed_there[name]: _text(value) for name, value in raw.items()}
            error = refusal_of(lambda texts=texts: read_environment(texts))
            names_it(error, typed_there[typed], error.value, "environment", error.allowed)
            assert not any(f" {name} " in str(error) for name in KNOBS if "_" in name)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def test_every_default_is_accepted_back():
    given_ = {name: getattr(CacheSettings(), name) for name in KNOBS}
    assert resolve(read_request(given_)).primary == CacheSettings()
