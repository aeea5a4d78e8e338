"""What can be known before weights load: flags that contradict the file, libraries and devices that are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..errors import SettingError
from .section_knobs import ATTENTION_BACKENDS, SIZES
from .topology import resolve_sizes

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
    sections = dict(sections)
    if parallelism := sections.get("parallelism_config"):
        origin = f"{label} parallelism_config"
        _check_degrees(parallelism, flags or {}, origin)
        parallelism = sections["parallelism_config"] = resolve_sizes(parallelism, world, origin)
        _check_degrees(parallelism, flags or {}, origin)
        _check_parallelism(parallelism, machine, origin)
    _check_attention(sections, machine, label, (flags or {}).get("attention_backend"))
    if quantize := sections.get("quantize_config"):
        for name, quant_type in _quant_types(quantize):
            _check_quantize(name, quant_type, machine, f"{label} quantize_config")
    return sections


def _check_degrees(parallelism: Mapping[str, Any], flags: Mapping[str, Any], origin: str) -> None:
    sizes = {name: parallelism.get(name, 1) for name in SIZES}
    for name, (argument, flag) in DEGREE_FLAGS.items():
        if argument in flags and sizes[name] != "auto" and flags[argument] != sizes[name]:
            raise SettingError(name, sizes[name], origin, f"contradicts {flag} {flags[argument]}")
    sequence = (sizes["ulysses_size"], sizes["ring_size"])
    if "sp_degree" in flags and "auto" not in sequence and flags["sp_degree"] != sequence[0] * sequence[1]:
        raise SettingError(
            "ulysses_size", sizes["ulysses_size"], origin,
            f"ulysses_size {sequence[0]} x ring_size {sequence[1]} contradicts --sp-degree {flags['sp_degree']}",
        )
    if flags.get("kv_gather_degree", 1) > 1:
        raise SettingError(
            "ulysses_size", sizes["ulysses_size"], origin,
            f"contradicts --kv-gather-degree {flags['kv_gather_degree']}, which the diffusers backend does not have",
        )
    if flags.get("dp_size", 1) > 1:
        raise SettingError(
            "parallelism_config", dict(parallelism), origin,
            f"contradicts --dp-size {flags['dp_size']}: cache-dit splits the model over all ranks",
        )


def _check_parallelism(parallelism: Mapping[str, Any], machine: Machine, origin: str) -> None:
    if parallelism.get("ulysses_float8") and machine.device not in (None, "cuda"):
        raise SettingError("ulysses_float8", True, origin, f"needs CUDA devices, this machine has {machine.device}")
    if parallelism.get("ulysses_float8") and not machine.has("triton"):
        raise SettingError("ulysses_float8", True, origin, "needs triton, which is not installed")
    if parallelism.get("tp_size", 1) > 1 and not machine.has("einops"):
        raise SettingError("tp_size", parallelism["tp_size"], origin, "needs einops, which is not installed")
    if parallelism.get("extra_parallel_kwargs") and machine.cache_dit in ("1.5.1", "1.5.2"):
        raise SettingError(
            "extra_parallel_kwargs", parallelism["extra_parallel_kwargs"], origin,
            f"needs cache-dit 1.5.3, {machine.cache_dit} is installed",
        )


def _check_attention(sections: Mapping[str, Any], machine: Machine, label: str, flag: str | None) -> None:
    parallelism = sections.get("parallelism_config", {})
    name = parallelism.get("attention_backend") or sections.get("attention_backend")
    if parallelism.get("ring_size", 1) > 1 and (name or "native") == "native" and machine.device == "cpu":
        raise SettingError(
            "ring_size", parallelism["ring_size"], f"{label} parallelism_config",
            "attention on the CPU returns no log-sum-exp, which a ring needs; use ulysses_size",
        )
    if name is None:
        return
    if flag is not None and flag not in (name, HOST_BACKENDS.get(name)):
        raise SettingError("attention_backend", name, label, f"contradicts --attention-backend {flag}")
    backend = ATTENTION_BACKENDS[name]
    if backend.device and machine.device not in (None, backend.device):
        raise SettingError(
            "attention_backend", name, label, f"needs {backend.device} devices, this machine has {machine.device}"
        )
    if backend.library and not machine.has(backend.library):
        raise SettingError("attention_backend", name, label, f"needs {backend.library}, which is not installed")


def _quant_types(quantize: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every number format that a ``quantize_config`` names, with the key that names it."""
    components = quantize.get("components_to_quantize")
    own = [each.get("quant_type") for each in components.values()] if isinstance(components, Mapping) else [None]
    if None in own:
        yield "quant_type", quantize["quant_type"]
    yield from (("components_to_quantize", each) for each in own if each)
    yield from (("precision_plan", each) for each in quantize.get("precision_plan", {}).values())


def _check_quantize(name: str, quant_type: str, machine: Machine, origin: str) -> None:
    library = "cache_dit" if quant_type.startswith("svdq") else "torchao"
    if not machine.has(library):
        raise SettingError(name, quant_type, origin, f"needs {library}, which is not installed")
    if machine.device not in (None, "cuda") and quant_type != "int8_weight_only":
        raise SettingError(
            name, quant_type, origin, f"needs CUDA devices, this machine has {machine.device}; use int8_weight_only"
        )
    needed = (8, 9) if "float8" in quant_type else (10, 0) if quant_type.startswith("nvfp4") else (0, 0)
    if machine.capability is not None and machine.capability < needed:
        raise SettingError(
            name, quant_type, origin,
            f"needs compute capability {needed[0]}.{needed[1]}, this device has "
            f"{machine.capability[0]}.{machine.capability[1]}",
        )


def check_family(
    parallelism: Mapping[str, Any], transformer: str, splits: Callable[[str], list[str]], origin: str
) -> None:
    """Refuse a way of splitting that cache-dit does not have for a class of transformers.

    Args:
        transformer: name of the class.
        splits: way (``sequence``, ``tensor`` or ``async``) -> beginnings of the class names that have it.
    """
    wanted = {
        "sequence": next((name for name in ("ulysses_size", "ring_size") if parallelism.get(name, 1) != 1), None),
        "tensor": "tp_size" if parallelism.get("tp_size", 1) != 1 else None,
        "async": "ulysses_async" if parallelism.get("ulysses_async") else None,
    }
    for way, name in wanted.items():
        if name is None:
            continue
        known = splits(way)
        if not any(transformer.startswith(beginning) for beginning in known):
            raise SettingError(
                name, parallelism[name], origin,
                f"cache-dit does not have it for {transformer}, only for {', '.join(sorted(known))}",
            )


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
    words = []
    for name, (_, flag) in DEGREE_FLAGS.items():
        if name in value:
            words.append(f"{flag} {'N' if value[name] == 'auto' else value[name]}")
    if value.get("attention_backend"):
        words.append(native_flags("attention_backend", value["attention_backend"]))
    if value.get("extra_parallel_modules"):
        words.append("--encoder-parallel")
    return " ".join(words)
