"""What is compared: uncached, the stock integration, and the plugin with given settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ..config.settings import ALIASES
from ..config.sources import ENABLED_VARIABLE, VARIABLES, read_request
from ..errors import SettingError, nearest
from ..evaluation.host_process import free_ports, without_settings

UNCACHED, STOCK, PLUGIN = "uncached", "stock", "plugin"
STOCK_KNOBS = frozenset({
    "Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "residual_diff_threshold",
    "max_continuous_cached_steps", "enable_taylorseer", "taylorseer_order", "enable_dmd", "dmd_history", "dmd_rank",
    "dmd_ridge", "dmd_svd_precision", "steps_computation_mask", "scm_compute_bins", "scm_cache_bins",
    "steps_computation_policy",
})
"""Settings for which SGLang has an environment variable of its own."""
STOCK_DEFAULTS: Mapping[str, Any] = {
    "Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "residual_diff_threshold": 0.24,
    "max_continuous_cached_steps": 3,
}
"""SGLang's defaults of its variables, for the diffusers backend, which reads a file instead."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One column of the comparison.

    Args:
        kind: ``uncached``, ``stock`` or ``plugin``.
        settings: knobs by name as in ``cache_dit_params``, also ``profile`` and ``secondary``.
        left_out: settings that were asked for and that this kind does not have.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def request(self) -> dict[str, Any]:
        """What its requests say of caching."""
        if self.kind != PLUGIN:
            return {}
        return {"enable_cache_dit": True, "cache_dit_params": dict(self.settings)}

    def environment(self) -> dict[str, str]:
        """The variables that switch the native stock integration on."""
        if self.kind != STOCK:
            return {}
        names = {knob: variable for variable, knob in VARIABLES.items()}
        return {ENABLED_VARIABLE: "true"} | {names[knob]: _text(value) for knob, value in self.settings.items()}

    def stock_file(self) -> dict[str, Any]:
        """The same as a file for the stock diffusers backend."""
        return {"cache_config": {**STOCK_DEFAULTS, **self.settings}}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def parse_settings(text: str, origin: str) -> dict[str, Any]:
    """``k=v,k=v`` as a mapping; values as YAML, commas within brackets stay.

    Raises:
        SettingError: no such form.
    """
    settings: dict[str, Any] = {}
    for part in _split(text):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise SettingError(origin, part, "command line", "expected name=value")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SettingError(key.strip(), value, origin, "expected a YAML value") from None
    return settings


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def parse_variant(text: str, kind: str, profiles: Sequence[str] = ()) -> Variant:
    """``name:k=v,k=v``, or the name alone of one of ``profiles``."""
    name, colon, settings = text.partition(":")
    origin = f"--{'stock' if kind == STOCK else 'variant'} {name}"
    if not name.strip() or "/" in name:
        raise SettingError(origin, text, "command line", "expected name:setting=value,...")
    if not colon and kind == PLUGIN:
        if name.strip() not in profiles:
            allowed = "a name alone is that of a profile; expected name:setting=value,..."
            raise SettingError("--variant", text, "command line", allowed, nearest(name.strip(), profiles))
        settings = f"profile={name.strip()}"
    return Variant(name=name.strip(), kind=kind, settings=parse_settings(settings, origin))


def check(variant: Variant, profiles: Sequence[str]) -> Variant:
    """The variant with its settings checked; a stock variant's unknown settings are left out and named.

    Raises:
        SettingError: a setting that the plugin would refuse.
    """
    origin = f"variant {variant.name}"
    if variant.kind == PLUGIN:
        read_request(variant.settings, origin=origin, profiles=profiles)
        return variant
    canonical = {ALIASES.get(key, key): value for key, value in variant.settings.items()}
    kept = {key: value for key, value in canonical.items() if _stock_takes(key, value)}
    read_request(kept, origin=origin)
    left_out = tuple(sorted(key for key in canonical if key not in kept))
    return Variant(name=variant.name, kind=variant.kind, settings=kept, left_out=left_out)


def _stock_takes(key: str, value: Any) -> bool:
    if key == "steps_computation_mask":
        return isinstance(value, str)
    return key in STOCK_KNOBS


def plan(
    variants: Sequence[str] = (), stock: Sequence[str] = (), settings: Sequence[str] = (), *,
    profile: str | None = None, profiles: Sequence[str] = (), with_stock: bool = True,
) -> list[Variant]:
    """All variants of a run: uncached, stock, plugin. Without any named, the plugin's and stock's defaults.

    Args:
        variants: texts of ``--variant``.
        stock: texts of ``--stock``; without it stock gets what it has of ``settings``.
        settings: texts of ``--set``.
        profile: of ``--profile``.
        profiles: names that exist.

    Raises:
        SettingError: a bad setting, or two variants of one name.
    """
    shared = {key: value for text in settings for key, value in parse_settings(text, "--set").items()}
    own = shared | ({"profile": profile} if profile else {})
    found = [Variant(name=UNCACHED, kind=UNCACHED)]
    if with_stock:
        found += [parse_variant(text, STOCK) for text in stock] or [Variant(name=STOCK, kind=STOCK, settings=own)]
    if own or not variants:
        found.append(Variant(name=profile or PLUGIN, kind=PLUGIN, settings=own))
    found += [parse_variant(text, PLUGIN, profiles) for text in variants]
    checked = [check(variant, profiles) for variant in found]
    names = [variant.name for variant in checked]
    for name in names:
        if names.count(name) > 1:
            raise SettingError("--variant", name, "command line", "two variants have this name")
    return checked


_OF_A_REQUEST: Mapping[str, str] = {
    "steps_computation_mask": "scm_preset", "steps_computation_policy": "scm_policy",
}
"""Names under which SGLang takes in a request what its variables set."""


def steady(variant: Variant) -> dict[str, Any]:
    """A request's settings that say what the variant's host does anyway, in the names that this host knows."""
    if variant.kind != STOCK:
        return dict(variant.settings)
    return {_OF_A_REQUEST.get(key, key): value for key, value in variant.settings.items()}


def changed(variant: Variant) -> dict[str, Any]:
    """The same with one knob changed so little that pictures and decisions stay.

    Every host that takes settings in a request knows the threshold, and stock remounts for any change of it.
    """
    default = STOCK_DEFAULTS["residual_diff_threshold"]
    threshold = float(variant.settings.get("residual_diff_threshold", default))
    return {**steady(variant), "residual_diff_threshold": threshold * (1 - 1e-6) or 1e-6}


def plugins_without_this() -> str:
    """The host's list of allowed plugins (``SGLANG_PLUGINS``) that leaves this plugin out and keeps all others."""
    given = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    installed = [point.name for group in ("sglang.multimodal_gen.plugins", "sglang.multimodal_gen.platforms")
                 for point in metadata.entry_points(group=group)]
    kept = [name for name in (given or installed) if name != "cachedit"]
    return ",".join(dict.fromkeys(kept)) or "none"


def environment(variant: Variant, logs: Path, *, sync: bool) -> dict[str, str]:
    """The environment of a variant's host: the caller's without any cache settings, then the variant's own."""
    kept = without_settings() | {
        "SGLANG_DIFFUSION_STAGE_LOGGING": "1", "SGLANG_PERF_LOG_DIR": str(logs),
        "SGLANG_DIFFUSION_SYNC_STAGE_PROFILING": "1" if sync else "0",
    }
    if variant.kind != PLUGIN:
        kept["SGLANG_PLUGINS"] = plugins_without_this()
    return kept | variant.environment()


def arguments(
    variant: Variant, model_path: str, backend: str, num_gpus: int, host_flags: Sequence[str], config: str | None,
    folder: Path,
) -> list[str]:
    """Host flags of a variant's process; given ones outrank those set here."""
    flags = {
        "--model-path": model_path, "--backend": backend, "--num-gpus": str(num_gpus), "--warmup-mode": "off",
        "--log-level": "error", **{"--" + name.replace("_", "-"): str(port) for name, port in free_ports().items()},
    }
    given = {flag.split("=")[0].replace("_", "-") for flag in host_flags if flag.startswith("--")}
    if variant.kind == PLUGIN and config:
        flags["--cache-dit-config"] = config
    if variant.kind == STOCK and backend == "diffusers":
        path = folder / f"{variant.name}.yaml"
        path.write_text(yaml.safe_dump(_plain(variant.stock_file())), encoding="utf-8")
        flags["--cache-dit-config"] = str(path)
    return [*(text for flag, value in flags.items() if flag not in given for text in (flag, value)), *host_flags]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
