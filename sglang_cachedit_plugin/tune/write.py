"""The config file of a tuning run: profiles for several budgets, the chosen one in force, figures in the header."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config.sources import read_file
from . import selection
from .candidates import OUTPUT
from .job import Result
from .selection import Point


class _Dumper(yaml.SafeDumper):
    """Masks quoted, lists of numbers on one line, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _sequence(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = all(isinstance(each, int | float | str) for each in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


_Dumper.add_representer(list, _sequence)


def config(results: Sequence[Result]) -> dict[str, Any]:
    """The file's contents: every grid's rows in each profile, the chosen rows in ``cache_config``."""
    profiles: dict[str, Any] = {}
    for result in results:
        for name, point in result.profiles.items():
            served = selection.better(result.points, point)
            if name == "chosen":
                continue
            if served is None:
                profile = profiles.setdefault(name, {**result.knobs[point["name"]], "schedules": []})
                profile["schedules"].append(dict(result.rows[point["name"]]))
            elif served["kind"] in selection.CACHE_KINDS and len(results) == 1:
                profiles[name] = dict(served["settings"])
    chosen = [(result, result.chosen["name"]) for result in results if result.chosen is not None]
    knobs = chosen[0][0].knobs[chosen[0][1]] if chosen else OUTPUT
    rows = [dict(result.rows[name]) for result, name in chosen if name in result.rows]
    found = {**knobs, **({"schedules": rows} if rows else {})}
    if results[0].promise is None and len(results) == 1 and chosen:
        served = selection.better(results[0].points, results[0].chosen)
        if served is not None and served["kind"] in selection.CACHE_KINDS:
            found = dict(served["settings"])
    return {"cache_config": found, "profiles": profiles}


def preamble(
    path: Path, results: Sequence[Result], provenance: Mapping[str, Any], model: Mapping[str, Any]
) -> list[str]:
    """What the file is, how it is used and how it came about, as comment lines without the mark."""
    steps = " and ".join(dict.fromkeys(str(result.grid.steps) for result in results))
    schema = _schema_beside(path)
    what = "Schedules tuned" if results[0].promise is None else "Error tolerance calibrated"
    return [
        *([f"yaml-language-server: $schema={schema}"] if schema else []),
        f"{what} for {model['name']} on the {model['backend']} backend, {steps} steps.",
        "Hardware: any.",
        f"  sglang generate --model-path {model['name']} --cache-dit-config {_shown(path)} --num-inference-steps "
        f"{results[0].grid.steps} --prompt \"...\"",
        *(() if results[0].promise else (
            "A request takes another profile with cache_dit_params.profile. For steps or sizes that are not listed the",
            "nearest row is resampled, and the report of the request says so.",
        )),
        f"Made by {provenance['command']}",
        f"{provenance['date']}, {provenance['machine']}, SGLang {provenance['host']}, "
        f"cache-dit {provenance['cache_dit']}, seed {provenance['seed']},",
        f"{provenance['prompts']['tune']} prompts to {'calibrate' if results[0].promise else 'tune'} on, "
        f"{provenance['prompts']['heldout']} held-out prompts that had no say in it.",
    ]


def _schema_beside(path: Path) -> str | None:
    """The schema as seen from the file, where both are in one checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = path.resolve().parent
    if package.parent not in (folder, *folder.parents) or not (package.parent / "pyproject.toml").is_file():
        return None
    return os.path.relpath(package / "cache-dit-config.schema.json", folder)


def _shown(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)


def figures(results: Sequence[Result]) -> list[str]:
    """Held-out figures and the choice, as comment lines without the mark."""
    lines = []
    for result in results:
        lines += ["", f"{result.grid.label}, against the uncached pictures of the held-out prompts:"]
        lines += [f"  {_figures(point)}" for point in sorted(result.points, key=lambda p: (p["computed"], p["name"]))
                  if point["kind"] in ("tuned", "fewer_steps")]
        if result.chosen is not None:
            lines += _wrapped(f"chosen: {selection.describe(result.points, result.chosen)}")
        for name, point in result.profiles.items():
            served = selection.better(result.points, point)
            if served is not None:
                lines += _wrapped(
                    f"profile {name}: {served['label']} was better ({served['psnr']['mean']:.1f} dB), "
                    + ("it is in the file instead" if served["kind"] in selection.CACHE_KINDS and len(results) == 1
                       else "the profile has no schedule for this")
                )
        for text in (*([kept(result.promise)] if result.promise else ()), *result.remarks):
            lines += _wrapped(text)
    return lines


def kept(promise: Mapping[str, Any]) -> str:
    """What was shown about unseen prompts, and with how many."""
    p = promise
    return (
        f"At least {p['share']:.1%} of unseen prompts reach {p['metric'].upper()} {p['least']:g}, with confidence "
        f"{p['confidence']:g} and for prompts like these: {p['missing']} of {p['prompts']} calibration prompts miss "
        f"it, so at most {p['bound']:.1%} do (exact binomial bound). Of {p['heldout']} held-out prompts "
        f"{p['heldout_missing']} miss it"
    )


def _figures(point: Point) -> str:
    psnr = point["psnr"]
    text = (f"{point['label']:<24} PSNR {psnr['mean']:5.1f} dB mean {psnr['p10']:5.1f} 10th percentile "
            f"{psnr['min']:5.1f} worst")
    if point.get("ssim"):
        text += f", SSIM {point['ssim']['mean']:.4f} mean {point['ssim']['min']:.4f} worst"
    return text


def _wrapped(text: str, width: int = 112) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")


def write(path: Path, results: Sequence[Result], provenance: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Write the file, after reading it back the way a server will."""
    lines = [*preamble(path, results, provenance, model), *figures(results)]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    body = config(results)
    text = comments + yaml.dump(body, Dumper=_Dumper, sort_keys=False, width=1000)
    read_file(body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    read_file(str(path))
