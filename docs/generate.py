"""Writes settings.md and patches.md from the code: ``python docs/generate.py``."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from sglang_cachedit_plugin.hooks import SEAMS
from sglang_cachedit_plugin.schema import config_schema
from sglang_cachedit_plugin.section_knobs import PARALLELISM, QUANT_SPELLINGS, QUANTIZE, SPELLINGS
from sglang_cachedit_plugin.settings import ALIASES, INERT_KNOBS, KNOBS, CacheSettings, Knob
from sglang_cachedit_plugin.sources import PREFIX

HERE = Path(__file__).parent


def _range(knob: Knob) -> str:
    return knob.allowed().removeprefix("expected ")


def settings() -> str:
    """The table of settings."""
    lines = [
        "# Settings",
        "",
        "Generated from `settings.py` by `python docs/generate.py`.",
        "",
        f"A request (`cache_dit_params`) outranks the file (`--cache-dit-config`, section `cache_config`), the file "
        f"outranks the environment (`{PREFIX}...`). Variables marked with a star also exist as "
        f"`{PREFIX}SECONDARY_...` for the second transformer; in the file and in requests it has a section "
        "`secondary`. Where nothing is said of the second transformer it follows the first.",
        "",
        f"`{PREFIX}ENABLED` switches caching on for requests that say nothing; so does a file with a `cache_config`. "
        "A request decides for itself with `enable_cache_dit`.",
        "",
        "| setting | variable | default | accepted | unit | what it does |",
        "|---|---|---|---|---|---|",
    ]
    for each in fields(CacheSettings):
        knob = KNOBS[each.name]
        variable = f"`{PREFIX}{knob.env}`" + ("\\*" if knob.per_transformer else "") if knob.env else ""
        lines.append(
            f"| `{each.name}` | {variable} | `{each.default}` | {_range(knob)} | {knob.unit} | {knob.doc} |"
        )
    lines += ["", "Other spellings: " + ", ".join(f"`{a}` for `{n}`" for a, n in ALIASES.items()) + "."]
    lines += ["", "Read and without effect here:", ""]
    lines += [f"- `{name}`: {why}." for name, why in INERT_KNOBS.items()]
    lines += _sections()
    return "\n".join(lines) + "\n"


def _sections() -> list[str]:
    lines = [
        "",
        "## Sections of the file for the diffusers backend",
        "",
        "`attention_backend` (one of the names below) may also stand at the top level. On SGLang's native pipelines "
        "these sections are refused, with the host's flags to use instead. [recipes.md](recipes.md): complete files.",
    ]
    for title, knobs in (("parallelism_config", PARALLELISM), ("quantize_config", QUANTIZE)):
        lines += ["", f"### `{title}`", "", "| key | accepted | unit | what it does |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {_range(knob)} | {knob.unit} | {knob.doc} |" for name, knob in knobs.items()]
    old = {**SPELLINGS["parallelism_config"], **QUANT_SPELLINGS}
    lines += ["", "Other spellings: " + ", ".join(f"`{a}` for `{n}`" for a, n in old.items()) + "."]
    lines += ["", "## In an editor", "", _EDITOR]
    return lines


_EDITOR = (
    "[cache-dit-config.schema.json](cache-dit-config.schema.json), also in the package and printed by "
    "`sglang-cachedit schema`, describes the whole file. Editors with the YAML language server take it from the first "
    "line: `# yaml-language-server: $schema=PATH_OR_URL`. What a schema cannot say (sizes against `--num-gpus`, "
    "lengths of masks, libraries, devices) `sglang-cachedit doctor --config FILE --num-gpus N` checks."
)


def patches() -> str:
    """The table of seams."""
    lines = [
        "# Where the plugin meets the host",
        "",
        "Generated from `hooks.py` by `python docs/generate.py`. Each seam's signature is compared with the one "
        "below when the plugin registers; if any differs, the host is left unpatched altogether.",
        "",
        "| seam | parameters | hook | why | unnecessary from |",
        "|---|---|---|---|---|",
    ]
    for seam in SEAMS:
        target = seam.target.removeprefix("sglang.multimodal_gen.runtime.")
        parameters = ", ".join(seam.parameters) or "any"
        lines.append(f"| `{target}` | {parameters} | {seam.kind} | {seam.why} | {seam.until} |")
    return "\n".join(lines) + "\n"


def schema() -> str:
    """The JSON Schema of config files."""
    return json.dumps(config_schema(), indent=1) + "\n"


PAGES = {
    "settings.md": settings,
    "patches.md": patches,
    "cache-dit-config.schema.json": schema,
    "../sglang_cachedit_plugin/cache-dit-config.schema.json": schema,
}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page())


if __name__ == "__main__":
    main()
