"""``sglang-cachedit doctor``: versions, hook points and settings, and what of a model would be cached.

No weights are loaded; without a model the host's runtime is not even imported.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

from .. import hooks
from ..adapters import entry_points
from ..client import differing
from ..config import diffusers_sections, effective
from ..config.diffusers_sections import Machine
from ..config.effective import Defaults
from ..config.sources import file_label, read_environment, read_file
from ..errors import CacheDitError, HostContractError
from ..integration import host_contract, sglang_api
from ..integration.host_contract import untried

_GROUP, _NAME = "sglang.multimodal_gen.plugins", "cachedit"
_PACKAGES = ("sglang", "cache-dit", "torch", "sglang-cachedit-plugin")


def examine(
    config: str | None = None, num_gpus: int | None = None, model_path: str | None = None, model_id: str | None = None
) -> dict[str, Any]:
    """Everything that the doctor says.

    Args:
        config: path of a ``--cache-dit-config`` file.
        num_gpus: ranks that the sizes of the file must make; None leaves them unchecked.
        model_path: folder or repository of a model, as the host's ``--model-path``.
        model_id: as the host's ``--model-id``.
    """
    found: dict[str, Any] = {"ok": True, "problems": [], "warnings": []}
    found["versions"] = _versions(found)
    found["hook_points"] = _points(found)
    _entry_point(found)
    found["warnings"] += [f"rows of other packages: {problem}" for problem in entry_points.load().problems]
    settings, found["settings"] = _settings(config, num_gpus, found)
    if model_path is not None and settings is not None and all(found["versions"].values()):
        from . import model

        found["model"] = model.examine(model_path, model_id, settings, found)
    found["ok"] = not found["problems"]
    return found


def _versions(found: dict[str, Any]) -> dict[str, str | None]:
    versions = {name: sglang_api.version(name) for name in _PACKAGES}
    found["problems"] += [f"{name} is not installed" for name, version in versions.items() if version is None]
    found["warnings"] += untried(sglang_api.version)
    return versions


def _points(found: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        root = hooks.host_root()
    except HostContractError:
        return []
    points = []
    for point in hooks.HOOK_POINTS:
        problem = hooks.check(point, root)
        points.append({"target": point.target, "found": problem is None, "problem": problem})
        if problem is not None:
            found["problems"].append(f"hook point {problem}")
    found["problems"] += [f"host {problem}" for problem in host_contract.missing(root)]
    return points


def _entry_point(found: dict[str, Any]) -> None:
    if not metadata.entry_points(group=_GROUP, name=_NAME):
        found["problems"].append(f"entry point {_NAME} of {_GROUP} is not installed: the host does not see the plugin")
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and _NAME not in allowed:
        found["problems"].append(f"SGLANG_PLUGINS = {','.join(allowed)!r} leaves out {_NAME}: the plugin is not loaded")


def _settings(
    config: str | None, num_gpus: int | None, found: dict[str, Any]
) -> tuple[Defaults | None, dict[str, Any] | None]:
    try:
        environment, warnings = read_environment(host_variables=sglang_api.known_variables)
        file = effective.current().file if config is None else read_file(config)
        settings = Defaults(environment=environment, file=file)
        settings.check_profiles()
        described = settings.describe()
        sections = file.passed_on
        if num_gpus is not None:
            # Devices are left alone: the doctor may well run on a machine without any.
            sections = diffusers_sections.fit(
                sections, num_gpus, Machine(cache_dit=sglang_api.version("cache-dit") or ""), file_label(config)
            )
        described["sections"] = dict(sections)
    except CacheDitError as error:
        found["problems"].append(str(error))
        return None, None
    found["warnings"] += [*warnings, *file.warnings]
    return settings, described


def lines(found: dict[str, Any], *, verbose: bool = False) -> list[str]:
    """``examine``'s result as text: the verdict, what is wrong, what differs from the defaults.

    Args:
        verbose: also versions, hook points and every setting.
    """
    out = ["nothing is wrong" if found["ok"] else f"{len(found['problems'])} wrong"]
    out += [f"error: {text}" for text in found["problems"]]
    out += [f"warning: {text}" for text in found["warnings"]]
    if (settings := found["settings"]) is not None:
        switch, own = settings["enabled"], settings["config"] if verbose else differing(settings)
        out += ["settings", f"  {'caching':<40} {'on' if switch['value'] else 'off'} ({switch['origin']})"]
        out.append(f"  {'profile':<40} {settings['profile'] or 'none'} of {', '.join(settings['profiles'])}")
        out += [f"  {name:<40} {entry['value']} ({entry['origin']})" for name, entry in own.items()]
        for section, value in settings["sections"].items():
            keys = value.items() if isinstance(value, dict) else [("", value)]
            out += [f"  {section + ('.' if key else '') + key:<40} {each}" for key, each in keys]
    if found.get("model"):
        from . import model

        out += model.lines(found["model"])
    if not verbose:
        return out
    out += ["versions", *(f"  {name:<24} {each or 'not installed'}" for name, each in found["versions"].items())]
    out.append("hook points")
    for point in found["hook_points"]:
        name = point["target"].removeprefix("sglang.multimodal_gen.runtime.")
        out.append(f"  {'found' if point['found'] else 'WRONG':<6} {name}")
    return out
