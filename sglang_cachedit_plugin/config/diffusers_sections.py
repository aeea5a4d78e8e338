"""Sections of a config file that cache-dit carries out on the diffusers backend: every key, strictly, and whether they
fit the number of ranks, the host's flags, the machine and the model, before weights load.

The keys are those of ``cache_dit.ParallelismConfig`` and ``cache_dit.QuantizeConfig`` (1.5.1 to 1.5.3). cache-dit
ignores keys that it does not know; here they are errors, as are values that contradict each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

from ..errors import SettingError
from .knobs import Choice, Flag, Knob, Whole, entries, json_list, json_object, read_mapping, refuse

Problem = tuple[str, Any, str]
"""Key, value, what is wrong with it."""
MAX_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What an attention backend of diffusers or cache-dit needs and can do.

    Args:
        library: module that must be importable, empty for PyTorch's own.
        device: the kind of device that it runs on, empty for any.
        split: it works on a sequence split over ranks (cache-dit's own backends only).
        lse: it returns the log-sum-exp, which a ring needs.
    """

    library: str = ""
    device: str = "cuda"
    split: bool = False
    lse: bool = False


ATTENTION_BACKENDS: Mapping[str, Backend] = {
    "native": Backend(device="", split=True, lse=True),
    "flash": Backend(library="flash_attn", split=True, lse=True),
    "flash_varlen": Backend(library="flash_attn", split=True),
    "_flash_3": Backend(library="flash_attn_interface", split=True, lse=True),
    "_sdpa_cudnn": Backend(split=True),
    "sage": Backend(library="sageattention", split=True, lse=True),
    "sage3": Backend(library="sageattn3", split=True),
    **dict.fromkeys(("ffpa", "ffpa_fp8", "ffpa_fp4", "ffpa_fp8_per_block"), Backend(library="ffpa_attn", split=True)),
    "_native_npu": Backend(library="torch_npu", device="npu", split=True),
    "_npu_fia": Backend(library="torch_npu", device="npu", split=True, lse=True),
    "_mindiesd_laser": Backend(library="mindiesd", device="npu", split=True),
    **dict.fromkeys(("_native_math", "flex"), Backend(device="")),
    **dict.fromkeys(("_native_efficient", "_native_flash", "_native_cudnn"), Backend()),
    "_native_xla": Backend(library="torch_xla", device="xla"),
    **dict.fromkeys(
        ("flash_hub", "flash_varlen_hub", "_flash_3_hub", "_flash_3_varlen_hub", "sage_hub"), Backend(library="kernels")
    ),
    "_flash_varlen_3": Backend(library="flash_attn_interface"),
    **dict.fromkeys(
        ("sage_varlen", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda",
         "_sage_qk_int8_pv_fp16_triton"), Backend(library="sageattention"),
    ),
    "xformers": Backend(library="xformers"),
    "aiter": Backend(library="aiter"),
}
SIZES = ("ulysses_size", "ring_size", "tp_size")
ULYSSES_VARIANTS = ("ulysses_anything", "ulysses_float8", "ulysses_async")
QUANT_TYPES = (
    "float8_per_row", "float8_per_tensor", "float8_per_block", "float8_weight_only", "nvfp4", "nvfp4_weight_only",
    "int8_per_row", "int8_per_tensor", "int8_weight_only", "int4_weight_only",
)
QUANT_SPELLINGS: Mapping[str, str] = {
    "float8": "float8_per_row", "float8_blockwise": "float8_per_block", "int8": "int8_per_row",
}
"""Names of SGLang's documentation that cache-dit 1.5 no longer takes."""
SVDQ = re.compile(r"svdq_(int4|nvfp4)_r[1-9]\d*_dq")


@dataclass(frozen=True, kw_only=True)
class Ranks(Whole):
    """A number of ranks, or auto: all that the other sizes leave."""

    low: float | None = 1
    high: float | None = MAX_RANKS
    words: ClassVar[str] = "a whole number of at least 1, or auto"

    @property
    def json(self) -> Mapping[str, Any]:
        return {"anyOf": [super().json, {"const": "auto"}]}

    def read(self, value: Any) -> Any:
        return value if isinstance(value, str) and value == "auto" else super().read(value)


class Text(Knob):
    words: ClassVar[str] = "text"
    json: ClassVar[Mapping[str, Any]] = {"type": "string", "pattern": r"\S"}

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise TypeError(value)
        return value


class Names(Knob):
    words: ClassVar[str] = "a list of names"
    json: ClassVar[Mapping[str, Any]] = json_list(Text.json, 0)

    def read(self, value: Any) -> list[str]:
        return [Text().read(each) for each in entries(value, 0)]


@dataclass(frozen=True, kw_only=True)
class QuantType(Knob):
    choices: tuple[str, ...] = QUANT_TYPES
    words: ClassVar[str] = f"one of {', '.join(QUANT_TYPES)}, or svdq_int4_rN_dq, svdq_nvfp4_rN_dq"

    @property
    def json(self) -> Mapping[str, Any]:
        pattern = "|".join([*QUANT_TYPES, *QUANT_SPELLINGS, SVDQ.pattern.replace("\\d", "[0-9]")])
        # For upper and lower case; JSON Schema has no flags.
        pattern = "".join(f"[{each}{each.upper()}]" if each.isalpha() else each for each in pattern)
        return {"anyOf": [{"enum": list(QUANT_TYPES)}, {"type": "string", "pattern": f"^({pattern})$"}]}

    def read(self, value: Any) -> str:
        name = Text().read(value).lower()
        name = QUANT_SPELLINGS.get(name, name)
        if name not in QUANT_TYPES and not SVDQ.fullmatch(name):
            raise ValueError(value)
        return name


@dataclass(frozen=True, kw_only=True)
class Table(Knob):
    """A mapping of text to anything, or to values of one kind."""

    of: Knob | None = None

    @property
    def words(self) -> str:
        return "a mapping" + (" of layer to quant_type" if self.of else "")

    @property
    def json(self) -> Mapping[str, Any]:
        values = {"additionalProperties": self.of.json} if self.of else {}
        return {"type": "object", "propertyNames": Text.json, **values}

    def read(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError(value)
        return {Text().read(key): self.of.read(each) if self.of else each for key, each in value.items()}


class Components(Knob):
    """Names, or a mapping of name to a ``quantize_config`` of its own."""

    words: ClassVar[str] = "a list of components, or a mapping of component to settings"

    @property
    def json(self) -> Mapping[str, Any]:
        return {"anyOf": [Names.json, {**Table().json, "additionalProperties": json_object(COMPONENT)}]}

    def read(self, value: Any) -> Any:
        return Table().read(value) if isinstance(value, Mapping) else Names().read(value)


def _optional(knobs: Mapping[str, Knob]) -> dict[str, Knob]:
    return {name: replace(knob, optional=True) for name, knob in knobs.items()}


ATTENTION: Knob = Choice("Attention backend of the transformer.", choices=tuple(ATTENTION_BACKENDS), optional=True)
PARALLELISM: Mapping[str, Knob] = _optional({
    "ulysses_size": Ranks(
        "Ranks that split the sequence and exchange heads; auto: all that the others leave.", unit="ranks"
    ),
    "ring_size": Ranks("Ranks that split the sequence and pass keys and values round.", unit="ranks"),
    "tp_size": Ranks("Ranks that split the matrices.", unit="ranks"),
    "attention_backend": ATTENTION,
    "ulysses_anything": Flag("Any number of tokens and heads, also ones that the ranks do not divide."),
    "ulysses_float8": Flag("Exchange float8 values, for links slower than NVLink."),
    "ulysses_async": Flag("Overlap exchange and computation."),
    "ring_rotate_method": Choice("How keys and values travel round the ring.", choices=("p2p",)),
    "ring_convert_to_fp32": Flag("Add up the parts of the ring in float32."),
    "extra_parallel_modules": Names(
        "Components besides the transformer that are split too: text_encoder, vae, controlnet."
    ),
    "extra_parallel_kwargs": Table("Options of single model families (cache-dit 1.5.3 or newer)."),
    "backend": Choice(
        "cache-dit's way of splitting; it follows from the sizes.",
        choices=("auto", "cache_dit", "native_diffuser", "native_pytorch", "native_hybrid"),
    ),
})
QUANTIZE: Mapping[str, Knob] = {
    "quant_type": QuantType("Number format of weights and, except weight-only, of activations."),
    **_optional({
        "exclude_layers": Names("Layers whose name contains one of these stay as they are."),
        "verbose": Flag("Log every layer."),
        "backend": Choice(
            "Library: torchao, or cache-dit's own for svdq types.",
            choices=("auto", "ao", "torchao", "cache_dit", "cache-dit", "cachedit"),
        ),
        "regional_quantize": Flag("Only the repeated blocks of the transformer."),
        "repeated_blocks": Names("Classes of the repeated blocks, for models that do not name theirs."),
        "components_to_quantize": Components(
            "Components instead of the transformer, or a mapping of component to its own settings."
        ),
        "per_tensor_fallback": Flag("Layers that cannot take float8 by row or block take it by tensor."),
        "precision_plan": Table("Layer name to its own quant_type.", of=QuantType()),
        "serialize_to": Text("Folder that svdq types are written to."),
        "svdq_kwargs": Table("Options of svdq types."),
    }),
}
COMPONENT = {name: knob for name, knob in QUANTIZE.items() if name != "components_to_quantize"}
SPELLINGS: Mapping[str, str] = {
    "ulysses": "ulysses_size", "ring": "ring_size", "tp": "tp_size",
    **{f"experimental_{name}": name for name in ULYSSES_VARIANTS},
}
"""Other names of keys of ``parallelism_config``."""
_RAY = "SGLang starts the ranks itself"
_CODE = "takes a Python object, which a file cannot hold"
NOT_IN_A_FILE: Mapping[str, str] = {
    "cp_plan": _CODE, "filter_fn": _CODE, "calibrate_fn": _CODE, "use_ray": _RAY, "ray_transfer_fn": _RAY,
    **{
        f"ray_{name}": _RAY
        for name in ("num_workers", "address", "runtime_env", "init_kwargs", "worker_options", "master_port",
                     "auto_shutdown", "transfer_backend", "transfer_custom_obj", "use_flashpack", "use_compile")
    },
}


def read_sections(raw: Mapping[str, Any], label: str, warnings: list[str]) -> dict[str, Any]:
    """The sections that ``raw``, a whole file, holds, checked; sizes may still be ``auto``.

    Args:
        label: name of the file in errors.

    Raises:
        SettingError: a key or value that cannot be used, or two that contradict each other.
    """
    found: dict[str, Any] = {}
    parallelism, quantize = _with_parallel_kwargs(raw, label, warnings), raw.get("quantize_config")
    if parallelism is not None:
        origin = f"{label} parallelism_config"
        values = found["parallelism_config"] = _read(parallelism, PARALLELISM, origin, warnings, SPELLINGS)
        refuse(_parallelism_problems(values, parallelism), origin)
    if quantize is not None:
        origin = f"{label} quantize_config"
        values = found["quantize_config"] = _read(quantize, QUANTIZE, origin, warnings)
        refuse(_quantize_problems(values), origin)
        if isinstance(components := values.get("components_to_quantize"), Mapping):
            values["components_to_quantize"] = {
                name: _read(each, COMPONENT, f"{origin} components_to_quantize.{name}", warnings)
                for name, each in components.items()
            }
    if (backend := ATTENTION.check("attention_backend", raw.get("attention_backend"), label)) is not None:
        found["attention_backend"] = backend
    refuse(_attention_problems(found), label)
    return found


def _with_parallel_kwargs(raw: Mapping[str, Any], label: str, warnings: list[str]) -> Any:
    """``parallelism_config`` with the older ``parallel_kwargs``, at top level or nested, as part of it."""
    parallelism, older = raw.get("parallelism_config"), raw.get("parallel_kwargs")
    if isinstance(parallelism, Mapping) and "parallel_kwargs" in parallelism:
        older = parallelism["parallel_kwargs"]
    if older is None:
        return parallelism
    if not isinstance(older, Mapping) or not isinstance(parallelism, Mapping | None):
        raise SettingError("parallel_kwargs", older, label, "expected a mapping of settings")
    warnings.append(f"parallel_kwargs ({label}) is read as part of parallelism_config")
    return {**older, **{key: value for key, value in (parallelism or {}).items() if key != "parallel_kwargs"}}


def _read(
    raw: Any, knobs: Mapping[str, Knob], origin: str, warnings: list[str], spellings: Mapping[str, str] | None = None
) -> dict[str, Any]:
    values, _ = read_mapping(raw, knobs, origin, warnings, spellings=spellings or {}, refused=NOT_IN_A_FILE)
    if str(old := raw.get("quant_type")).lower() in QUANT_SPELLINGS:
        warnings.append(f"quant_type {old} ({origin}) is read as {values['quant_type']}")
    return {name: value for name, value in values.items() if value is not None}


def _parallelism_problems(values: Mapping[str, Any], raw: Any) -> Iterator[Problem]:
    autos = [name for name in SIZES if values.get(name) == "auto"]
    if len(autos) > 1:
        yield autos[1], "auto", f"{autos[0]} is auto already, only one size can be"
    for name in ULYSSES_VARIANTS:
        if values.get(name) and values.get("ulysses_size", 1) == 1:
            yield name, True, "expected ulysses_size of at least 2 with it"
    if values.get("ulysses_anything") and (ring := values.get("ring_size", 1)) != 1:
        yield "ulysses_anything", True, f"does not work with ring_size {ring}"
    if all(values.get(name, 1) == 1 for name in SIZES):
        yield "parallelism_config", raw, f"expected one of {', '.join(SIZES)} above 1"


def _quantize_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    if "quant_type" not in values:
        yield "quant_type", None, "is missing, " + QUANTIZE["quant_type"].allowed()
    svdq = values["quant_type"].startswith("svdq")
    for name in ("svdq_kwargs", "serialize_to"):
        if name in values and not svdq:
            yield name, values[name], "is for svdq types only"
    for name in ("components_to_quantize", "precision_plan"):
        if name in values and svdq:
            yield name, values[name], "svdq types do not take it"


def _attention_problems(found: Mapping[str, Any]) -> Iterator[Problem]:
    parallelism, backend = found.get("parallelism_config", {}), found.get("attention_backend")
    other = parallelism.get("attention_backend")
    if backend is not None and other not in (None, backend):
        yield "attention_backend", backend, f"contradicts attention_backend {other} of parallelism_config"
    name = other or backend or "native"
    split = [size for size in ("ulysses_size", "ring_size") if parallelism.get(size, 1) != 1]
    abilities = {"split": (split, "does not split sequences"), "lse": ("ring_size" in split, "has no ring kernel")}
    for ability, (needed, problem) in abilities.items():
        able = [known for known, each in ATTENTION_BACKENDS.items() if getattr(each, ability)]
        if needed and name not in able:
            yield "attention_backend", name, f"{problem}, expected one of {', '.join(able)}"


DEGREE_FLAGS: Mapping[str, tuple[str, str]] = {
    "ulysses_size": ("ulysses_degree", "--ulysses-degree"),
    "ring_size": ("ring_degree", "--ring-degree"),
    "tp_size": ("tp_size", "--tp-size"),
}
"""Size in the file -> name and flag of the host's server argument."""

HOST_BACKENDS: Mapping[str, str] = {
    "native": "torch_sdpa", "flash": "fa", "_flash_3": "fa", "flash_varlen": "fa", "_sdpa_cudnn": "torch_cudnn_sdpa",
    "sage": "sage_attn", "sage3": "sage_attn_3",
}
"""Attention backend of the file -> the host's own name of the same kernel."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What sections need to know of the machine.

    Args:
        device: ``cpu``, ``cuda``, ...; None where nobody looked.
        capability: compute capability of a CUDA device.
        has: whether a module can be imported.
        cache_dit: version of cache-dit.
    """

    device: str | None = None
    capability: tuple[int, int] | None = None
    has: Callable[[str], bool] = lambda module: find_spec(module) is not None
    cache_dit: str = ""


def fit(
    sections: Mapping[str, Any], world: int, machine: Machine, label: str, flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``sections`` with their sizes resolved, once everything that can be checked is in order.

    Args:
        world: ranks that the host starts.
        flags: server arguments of the host that were given explicitly.
        label: name of the file in errors.

    Raises:
        SettingError: the first thing that does not fit.
    """
    sections, flags = dict(sections), flags or {}
    origin = f"{label} parallelism_config"
    if parallelism := sections.get("parallelism_config"):
        refuse(_flag_problems(parallelism, flags), origin)
        parallelism = sections["parallelism_config"] = resolve_sizes(parallelism, world, origin)
        refuse(_flag_problems(parallelism, flags), origin)
        refuse(_machine_problems(sections, machine), origin)
    refuse(_backend_problems(sections, machine, flags.get("attention_backend")), label)
    if quantize := sections.get("quantize_config"):
        refuse(_quant_type_problems(quantize, machine), f"{label} quantize_config")
    return sections


def resolve_sizes(parallelism: Mapping[str, Any], world: int, origin: str) -> dict[str, Any]:
    """``parallelism`` with every size a number; SettingError with the arithmetic, where they do not make ``world``.

    Args:
        world: ranks that the host starts.
    """
    sizes = {name: parallelism.get(name, 1) for name in SIZES}
    auto = next((name for name in SIZES if sizes[name] == "auto"), None)
    product = math.prod(size for size in sizes.values() if size != "auto")
    refuse(_size_problems(parallelism, auto, product, world), origin)
    if auto is not None:
        sizes[auto] = world // product
    given = {name: size for name, size in sizes.items() if size > 1}
    return {**{key: value for key, value in parallelism.items() if key not in SIZES}, **given}


def _size_problems(parallelism: Mapping[str, Any], auto: str | None, product: int, world: int) -> Iterator[Problem]:
    words = " x ".join(f"{name} {parallelism[name]}" for name in SIZES if name in parallelism)
    field = auto or next(name for name in SIZES if name in parallelism)
    if auto is not None and world % product:
        yield auto, "auto", f"{words} does not divide {world} (--num-gpus)"
    if auto is None and product != world:
        yield field, parallelism[field], f"{words} makes {product} ranks, but --num-gpus is {world}"
    if world == 1:
        yield field, parallelism[field], "expected --num-gpus of at least 2"
    ulysses = world // product if auto == "ulysses_size" else parallelism.get("ulysses_size", 1)
    for name in ULYSSES_VARIANTS:
        if parallelism.get(name) and ulysses == 1:
            yield name, True, f"ulysses_size is 1: {words} of {world} ranks"


def _flag_problems(parallelism: Mapping[str, Any], flags: Mapping[str, Any]) -> Iterator[Problem]:
    sizes = {name: parallelism.get(name, 1) for name in SIZES}
    for name, (argument, flag) in DEGREE_FLAGS.items():
        if argument in flags and sizes[name] not in ("auto", flags[argument]):
            yield name, sizes[name], f"contradicts {flag} {flags[argument]}"
    ulysses, ring = sizes["ulysses_size"], sizes["ring_size"]
    if "sp_degree" in flags and "auto" not in (ulysses, ring) and flags["sp_degree"] != ulysses * ring:
        words = f"ulysses_size {ulysses} x ring_size {ring}"
        yield "ulysses_size", ulysses, f"{words} contradicts --sp-degree {flags['sp_degree']}"
    if (degree := flags.get("kv_gather_degree", 1)) > 1:
        problem = f"contradicts --kv-gather-degree {degree}, which the diffusers backend does not have"
        yield "ulysses_size", ulysses, problem
    if (replicas := flags.get("dp_size", 1)) > 1:
        problem = f"contradicts --dp-size {replicas}: cache-dit splits the model over all ranks"
        yield "parallelism_config", dict(parallelism), problem


def _machine_problems(sections: Mapping[str, Any], machine: Machine) -> Iterator[Problem]:
    parallelism = sections["parallelism_config"]
    if parallelism.get("ulysses_float8") and machine.device not in (None, "cuda"):
        yield "ulysses_float8", True, f"needs CUDA devices, this machine has {machine.device}"
    if parallelism.get("ulysses_float8") and not machine.has("triton"):
        yield "ulysses_float8", True, "needs triton, which is not installed"
    if parallelism.get("tp_size", 1) > 1 and not machine.has("einops"):
        yield "tp_size", parallelism["tp_size"], "needs einops, which is not installed"
    if (options := parallelism.get("extra_parallel_kwargs")) and machine.cache_dit in ("1.5.1", "1.5.2"):
        yield "extra_parallel_kwargs", options, f"needs cache-dit 1.5.3, {machine.cache_dit} is installed"
    backend = parallelism.get("attention_backend") or sections.get("attention_backend", "native")
    if parallelism.get("ring_size", 1) > 1 and backend == "native" and machine.device == "cpu":
        problem = "attention on the CPU returns no log-sum-exp, which a ring needs; use ulysses_size"
        yield "ring_size", parallelism["ring_size"], problem


def _backend_problems(sections: Mapping[str, Any], machine: Machine, flag: str | None) -> Iterator[Problem]:
    name = sections.get("parallelism_config", {}).get("attention_backend") or sections.get("attention_backend")
    if name is None:
        return
    if flag not in (None, name, HOST_BACKENDS.get(name)):
        yield "attention_backend", name, f"contradicts --attention-backend {flag}"
    backend = ATTENTION_BACKENDS[name]
    if backend.device and machine.device not in (None, backend.device):
        yield "attention_backend", name, f"needs {backend.device} devices, this machine has {machine.device}"
    if backend.library and not machine.has(backend.library):
        yield "attention_backend", name, f"needs {backend.library}, which is not installed"


def _quant_type_problems(quantize: Mapping[str, Any], machine: Machine) -> Iterator[Problem]:
    for name, quant_type in _quant_types(quantize):
        library = "cache_dit" if quant_type.startswith("svdq") else "torchao"
        if not machine.has(library):
            yield name, quant_type, f"needs {library}, which is not installed"
        if machine.device not in (None, "cuda") and quant_type != "int8_weight_only":
            problem = f"needs CUDA devices, this machine has {machine.device}; use int8_weight_only"
            yield name, quant_type, problem
        needed = (8, 9) if "float8" in quant_type else (10, 0) if quant_type.startswith("nvfp4") else (0, 0)
        if machine.capability is not None and machine.capability < needed:
            least, own = (".".join(map(str, each)) for each in (needed, machine.capability))
            yield name, quant_type, f"needs compute capability {least}, this device has {own}"


def _quant_types(quantize: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every number format that a ``quantize_config`` names, with the key that names it."""
    components = quantize.get("components_to_quantize")
    own = [each.get("quant_type") for each in components.values()] if isinstance(components, Mapping) else [None]
    if None in own:
        yield "quant_type", quantize["quant_type"]
    yield from (("components_to_quantize", each) for each in own if each)
    yield from (("precision_plan", each) for each in quantize.get("precision_plan", {}).values())


def check_family(
    parallelism: Mapping[str, Any], transformer: str, splits: Callable[[str], list[str]], origin: str
) -> None:
    """Refuse a way of splitting that cache-dit does not have for a class of transformers.

    Args:
        transformer: name of the class.
        splits: way (``sequence``, ``tensor`` or ``async``) -> beginnings of the class names that have it.
    """
    ways = {
        "ulysses_size": ("sequence", 1), "ring_size": ("sequence", 1), "tp_size": ("tensor", 1),
        "ulysses_async": ("async", False),
    }
    for name, (way, unused) in ways.items():
        if (value := parallelism.get(name, unused)) == unused:
            continue
        known = splits(way)
        if not transformer.startswith(tuple(known)):
            only = f"cache-dit does not have it for {transformer}, only for {', '.join(sorted(known))}"
            raise SettingError(name, value, origin, only)


def native_flags(section: str, value: Any) -> str:
    """The host's own flags for a section, which its native pipelines do not take."""
    if section == "attention_backend":
        return f"--attention-backend {HOST_BACKENDS.get(value, value)}"
    if section == "quantize_config":
        quant_type = value["quant_type"]
        method = "fp8" if quant_type.startswith("float8") else "convrot_int8" if quant_type.startswith("int8") else ""
        words = [f"--quantization {method}" if method else "a quantised checkpoint or --quantization"]
        if value.get("exclude_layers"):
            words.append("--quantization-ignored-layers " + " ".join(value["exclude_layers"]))
        return " ".join(words)
    words = [
        f"{flag} {'N' if value[name] == 'auto' else value[name]}"
        for name, (_, flag) in DEGREE_FLAGS.items() if name in value
    ]
    if value.get("attention_backend"):
        words.append(native_flags("attention_backend", value["attention_backend"]))
    if value.get("extra_parallel_modules"):
        words.append("--encoder-parallel")
    return " ".join(words)
