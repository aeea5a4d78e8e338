"""Writes the generated pages and the README's table of versions from the code: ``python docs/generate.py``.

With ``--check`` nothing is written; the status is 1 where a page is not what the code gives.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

from sglang_cachedit_plugin.adapters import DIFFUSERS, NATIVE, Blocks, ModelAdapter
from sglang_cachedit_plugin.config.diffusers_sections import PARALLELISM, QUANT_SPELLINGS, QUANTIZE, SPELLINGS
from sglang_cachedit_plugin.config.json_schema import config_schema
from sglang_cachedit_plugin.config.knobs import Knob
from sglang_cachedit_plugin.config.settings import ALIASES, EITHER_KNOBS, INERT_KNOBS, KNOBS, CacheSettings
from sglang_cachedit_plugin.config.sources import PREFIX, PROFILES
from sglang_cachedit_plugin.hooks import HOOK_POINTS
from sglang_cachedit_plugin.integration import host_contract
from sglang_cachedit_plugin.report import reasons

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
        f"outranks the environment (`{PREFIX}...`), the environment outranks what the host's stage wants by itself "
        "(the quality tier of MiniMax-H3). Variables marked with a star also exist as "
        f"`{PREFIX}SECONDARY_...` for the second transformer; in the file and in requests it has a section "
        "`secondary`. Where nothing is said of the second transformer it follows the first.",
        "",
        f"`{PREFIX}ENABLED` switches caching on for requests that say nothing; so does a file with a `cache_config` "
        "(one that only has `profiles` does not). A request decides for itself with `enable_cache_dit`.",
        "",
        f"`{PREFIX}PROFILE`, or `profile` at the top level of the file, names the profile of requests that name none, "
        f"and switches caching on unless `{PREFIX}ENABLED` says no. Built in are "
        + ", ".join(f"`{name}` (`error_tolerance: {knobs['error_tolerance']:g}`)" for name, knobs in PROFILES.items())
        + "; [profiles](serving.md#profiles) has the rules. Beside an error tolerance only "
        + ", ".join(f"`{name}`" for name in KNOBS if name in EITHER_KNOBS - {"error_tolerance"})
        + " have an effect: other settings in the same source are refused, and across sources the strongest that names "
        "either decides.",
        "",
        f"`{PREFIX}LOG` is `requests` (the default), `changes` or `quiet`: what the [log](serving.md#log) says. "
        f"`{PREFIX}CONTROL_KEY` guards [changes of a running server](serving.md#who-may).",
        "",
        "An empty variable is unset. True is `1`, `true`, `yes`, `y`, `t` or `on`, false `0`, `false`, `no`, `n`, "
        "`f` or `off`, in any case, as SGLang reads them. Any other value that is not accepted ends the start with one "
        "line.",
        "",
        "Steps are those that a run of the denoising loop takes. On the diffusers backend these need not be the steps "
        "asked for: image-to-image with a strength below 1 begins later, and solvers of second order (Heun, DPM2) "
        "evaluate the model twice for each step but the last, which counts as two. Warmup, limits, presets and bins "
        "count the steps of the run. A mask list may have an entry for each step of the run, for each step asked for, "
        "or for each timestep of the scheduler; of the longer ones the run takes the part at its own timesteps.",
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
    lines += ["", "Also read:", ""]
    lines += [f"- `{name}`: {knob.doc}" for name, knob in INERT_KNOBS.items()]
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
    old = {**SPELLINGS, **QUANT_SPELLINGS}
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
    """The table of hook points."""
    lines = [
        "# Where the plugin meets the host",
        "",
        "Generated from `hooks.py` by `python docs/generate.py`. Each hook point's signature is compared with the one "
        "below when the plugin registers; if any differs, the host is left unpatched altogether.",
        "",
        "| hook point | parameters | hook | why |",
        "|---|---|---|---|",
    ]
    for point in HOOK_POINTS:
        target = point.target.removeprefix("sglang.multimodal_gen.runtime.")
        parameters = ", ".join(point.parameters) or "any"
        lines.append(f"| `{target}` | {parameters} | {point.kind} | {point.why} |")
    return "\n".join(lines) + "\n"


def schema() -> str:
    """The JSON Schema of config files."""
    return json.dumps(config_schema(), indent=1) + "\n"


_VERIFIED = {"run": "run", "structure": "structure only", None: "no"}
_FORECASTS = {"blocks": "residual, output", "output": "output", "none": "none"}
_MODELS = """# Models

Generated from `adapters/` by `python docs/generate.py`. A test fails when the host's registry or a pipeline of
diffusers brings a class without a row.

- **blocks**: the block lists whose middle a cached step leaves out, with what their blocks hand from one to the next;
  the decision looks at the one in bold. Lists joined by + share one decision, others decide one after the other.
- **CFG**: `separate`, one forward for each branch; `batched`, one for all; `paired`, a transformer for each branch;
  `none`, guidance is distilled into the model.
- **forecast**: what a cached step may be made of: the blocks' `residual` (the default), the whole `output`
  (`forecast: output`), or nothing.
- **verified**: `run`: built tiny with random weights and run on the CPU by `tests/models`; computed steps are the
  model's own bit for bit, a static schedule runs only the blocks that it should, and with unchanging inputs a cached
  step is the computed one. Classes of diffusers are also run by the call of a real pipeline, uncached and cached, from
  its scheduler to its latents; `image_pipelines.py` and `video_pipelines.py` in `tests/models/on_diffusers` list
  these pipelines. Other pipelines of a family are not run. `structure only`: block lists and signatures are looked
  at, nothing is run.

On the first computed forward of a mount the plugin checks that the blocks are as declared here (the mount probe);
where they are not, generation goes on uncached and the report says why. A class that is not listed is looked up in
cache-dit's own register. [Adding a model](adding-a-model.md) is one row, in your own package if you like.
"""


def _list(blocks: Blocks) -> str:
    streams = ", ".join(f"**{name}**" if name == blocks.measured else name for name in blocks.streams)
    return f"`{blocks.name}` ({streams})"


def _lists(row: ModelAdapter) -> str:
    text = ""
    for blocks in row.blocks:
        text += (" + " if blocks.shares_decision else ", ") * bool(text) + _list(blocks)
    return text


def _class(name: str, row: ModelAdapter) -> str:
    why = row.output_only or row.unsupported
    second = "a second transformer is cached for itself" if row.transformers > 1 and row.cfg != "paired" else ""
    notes = "; ".join(part for part in (f"not cached: {why}" if why else "", row.note, second) if part)
    cells = (
        row.family, f"`{name}`", _lists(row), row.cfg if not row.unsupported else "", _FORECASTS[row.ability],
        "" if row.unsupported else _VERIFIED[row.verified], notes,
    )
    return f"| {' | '.join(cells)} |"


def models() -> str:
    """The tables of model classes."""
    lines = [_MODELS]
    backends = {"SGLang's own classes": NATIVE, "Classes of diffusers (`--backend diffusers`)": DIFFUSERS}
    for title, rows in backends.items():
        cached = sum(bool(row.blocks) for row in rows.values())
        output = sum(row.ability == "output" for row in rows.values())
        lines += [
            f"## {title}", "",
            f"{len(rows)} classes: {cached} cached, {output} by their output only, "
            f"{len(rows) - cached - output} not cached.", "",
            "| family | class | blocks | CFG | forecast | verified | notes |", "|---|---|---|---|---|---|---|",
            *(_class(name, row) for name, row in rows.items()), "",
        ]
    return "\n".join(lines)


_HOW = {"run": "tests run against it", "read": "has all that the plugin needs (read from its wheel, not run)"}


def readme() -> str:
    """The README with its table of versions."""
    text = (HERE / ".." / "README.md").read_text()
    begin, end = "<!-- versions -->\n", "<!-- /versions -->"
    lines = ["| library | version | |", "|---|---|---|"]
    for library, found in host_contract.TRIED.items():
        lines += [f"| {library} | {version} | {_HOW[how]} |" for version, how in found.items()]
    head, _, rest = text.partition(begin)
    return head + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]


PAGES = {
    "../README.md": readme,
    "models.md": models,
    "settings.md": settings,
    "patches.md": patches,
    "troubleshooting.md": reasons.page,
    "cache-dit-config.schema.json": schema,
    "../sglang_cachedit_plugin/cache-dit-config.schema.json": schema,
}


def main(arguments: list[str]) -> int:
    """Write all pages, or check them."""
    pages = {name: page() for name, page in PAGES.items()}
    if "--check" not in arguments:
        for name, text in pages.items():
            (HERE / name).write_text(text)
        return 0
    stale = [name for name, text in pages.items() if (HERE / name).read_text() != text]
    if stale:
        print(f"docs/{', docs/'.join(stale)}: not what the code gives, run: python docs/generate.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
