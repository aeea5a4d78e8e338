"""Mixed requests and changes of the server, and what each answer must then say."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

SIZES = ("64x64", "96x64", "64x96")
PROMPTS = ("red apple", "blue moon", "small green house")
STEPS = tuple(range(2, 13))
GUIDED = {"negative_prompt": "blue", "true_cfg_scale": 2.0}

KNOBS: tuple[dict[str, Any], ...] = (
    {},
    {"profile": "fast"},
    {"profile": "quality", "corrector_order": 1},
    {"scm_preset": "none", "residual_diff_threshold": 0.9},
    {"scm_preset": "fast", "scm_policy": "static"},
    {"scm_compute_bins": [3, 1, 1, 2], "scm_cache_bins": [2, 2, 2], "steps_computation_policy": "static"},
    {"enable_taylorseer": True, "taylorseer_order": 2, "residual_diff_threshold": 0.8},
    {"enable_dmd": True, "dmd_history": 4, "residual_diff_threshold": 0.8},
    {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1, "max_continuous_cached_steps": 1},
    {"forecast": "output", "forecast_order": 2, "max_cached_steps": 3},
    {"max_warmup_steps": 1, "secondary": {"max_warmup_steps": 2}},
)
BAD: tuple[dict[str, Any], ...] = (
    {"max_warmup_stepz": 1}, {"scm_preset": "fsat"}, {"profile": "drfat"}, {"taylorseer_order": 9},
)


@dataclass(frozen=True)
class Change:
    """A body of PUT. ``number`` is in it as ``dmd_rank``, which changes no picture; 0 is the start-up."""

    number: int
    body: dict[str, Any] = field(default_factory=dict)
    enabled: bool = False

    @property
    def knobs(self) -> dict[str, Any]:
        """Its settings by name."""
        return {key: value for key, value in self.body.items() if key not in ("enabled", "profiles")}


@dataclass(frozen=True)
class Wish:
    """One request: ``fields`` of the JSON body; ``bad``: it must be answered with 400."""

    fields: dict[str, Any]
    bad: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """Its cache settings."""
        return self.fields.get("cache_dit_params") or {}

    @property
    def enable(self) -> bool | None:
        """Its word on caching."""
        return self.fields.get("enable_cache_dit")


class Mix:
    """Requests and changes, the same for the same seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._changes = 0

    def wish(self) -> Wish:
        """The next request."""
        pick = self._random.choice
        steps = pick(STEPS)
        fields: dict[str, Any] = {
            "prompt": pick(PROMPTS), "size": pick(SIZES), "num_inference_steps": steps,
            "seed": self._random.randrange(4), "output_format": "png", "response_format": "b64_json",
        }
        if self._random.random() < 0.1:
            return Wish(fields | {"cache_dit_params": pick(BAD)}, bad=True)
        enable = pick((True, True, True, False, None, None))
        if enable is not None:
            fields["enable_cache_dit"] = enable
        if self._random.random() < 0.1:
            mask = [1, *self._random.choices((0, 1), k=steps - 1)]
            fields["cache_dit_params"] = {"steps_computation_mask": mask, "scm_policy": "static", "max_warmup_steps": 0}
        else:
            fields["cache_dit_params"] = pick(KNOBS)
        if self._random.random() < 0.3:
            fields |= GUIDED
        if self._random.random() < 0.05:
            fields["n"] = 2
        return Wish(fields)

    @staticmethod
    def kinds() -> list[Wish]:
        """One request of each kind: every set of knobs, every size, with and without guidance."""
        plain = {"prompt": PROMPTS[0], "num_inference_steps": 9, "seed": 0, "output_format": "png",
                 "response_format": "b64_json", "enable_cache_dit": True}
        own = [plain | {"size": SIZES[0], "cache_dit_params": knobs} for knobs in KNOBS]
        shapes = [plain | {"size": size, "n": n} | guided for size in SIZES for n in (1, 2) for guided in ({}, GUIDED)]
        return [Wish(fields) for fields in own + shapes]

    def change(self) -> Change:
        """The next change of the server; its settings all follow from its number."""
        number = self._changes = self._changes % 64 + 1
        body = {
            "enabled": number % 3 != 0,
            "dmd_rank": number,
            "max_warmup_steps": 1 + number % 4,
            "residual_diff_threshold": round(0.3 + number % 7 / 10, 1),
            "max_continuous_cached_steps": 1 + number % 3,
        }
        if number % 4 == 1:
            body["profiles"] = {"draft": {"scm_preset": "fast", "scm_policy": "static"}}
        return Change(number, body, bool(body["enabled"]))


def expect(wish: Wish, report: dict[str, Any], possible: list[Change]) -> str | None:
    """What is wrong with an answer's report, None where it is what ``wish`` and one of ``possible`` ask for."""
    if wish.enable is not None and report["enabled"] is not wish.enable:
        return f"enabled {report['enabled']}, asked {wish.enable}"
    if not report["enabled"]:
        return _expect_off(wish, report, possible)
    steps = wish.fields["num_inference_steps"]
    branches = {name for each in report["transformers"].values() for name in each["branches"]}
    if branches != ({"cond", "uncond"} if "true_cfg_scale" in wish.fields else {"cond"}):
        return f"branches {sorted(branches)}"
    if report["computed_steps"] + report["cached_steps"] != steps:
        return f"{report['computed_steps']} + {report['cached_steps']} steps, asked {steps}"
    if report["profile"] != wish.params.get("profile"):
        return f"profile {report['profile']}"
    return _expect_config(wish, report["config"], possible) or _expect_mask(wish, report)


def _expect_off(wish: Wish, report: dict[str, Any], possible: list[Change]) -> str | None:
    if report["reason"] != ("request" if wish.enable is False else "not configured"):
        return f"off: {report['reason']}"
    if wish.enable is None and all(change.enabled for change in possible):
        return "off, and every change that can be in force switches caching on"
    return None


def _expect_config(wish: Wish, config: dict[str, Any], possible: list[Change]) -> str | None:
    names = {"scm_preset": "steps_computation_mask", "scm_policy": "steps_computation_policy"}
    for key, value in wish.params.items():
        if key in ("profile", "secondary"):
            continue
        found = config[names.get(key, key)]
        value = None if value == "none" else value
        if (found["value"], found["origin"]) != (value, f"cache_dit_params.{key}"):
            return f"{key} = {found}, asked {value}"
    if "profile" in wish.params:
        # An error tolerance leaves nothing of the change in force, nor the number that tells which it is.
        return None
    number = config["dmd_rank"]["value"]
    change = next((each for each in possible if each.number == number), None)
    if change is None:
        return f"change {number} is not one of {[each.number for each in possible]}"
    for key, value in change.knobs.items():
        if config[key]["origin"].startswith("control.") and config[key]["value"] != value:
            return f"torn: {key} = {config[key]} under change {number}, which has {value}"
        if key not in wish.params and not config[key]["origin"].startswith("control."):
            return f"torn: {key} = {config[key]} under change {number}"
    if wish.enable is None and not change.enabled:
        return f"cached under change {number}, which switches caching off"
    return None


def _expect_mask(wish: Wish, report: dict[str, Any]) -> str | None:
    mask = wish.params.get("steps_computation_mask")
    if mask is None:
        return None
    cond = report["transformers"]["transformer"]["branches"]["cond"]
    wanted = [step for step, computed in enumerate(mask) if not computed]
    return None if cond["cached"] == wanted else f"cached {cond['cached']}, the mask says {wanted}"
