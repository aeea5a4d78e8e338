"""Every key of the sections that cache-dit carries out on the diffusers backend: type, values, what it does.

The keys are those of ``cache_dit.ParallelismConfig`` and ``cache_dit.QuantizeConfig`` (1.5.1 to 1.5.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import nearest
from .settings import MAX_LENGTH, Knob

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
    "ffpa": Backend(library="ffpa_attn", split=True),
    "ffpa_fp8": Backend(library="ffpa_attn", split=True),
    "ffpa_fp4": Backend(library="ffpa_attn", split=True),
    "ffpa_fp8_per_block": Backend(library="ffpa_attn", split=True),
    "_native_npu": Backend(library="torch_npu", device="npu", split=True),
    "_npu_fia": Backend(library="torch_npu", device="npu", split=True, lse=True),
    "_mindiesd_laser": Backend(library="mindiesd", device="npu", split=True),
    "_native_math": Backend(device=""),
    "_native_efficient": Backend(),
    "_native_flash": Backend(),
    "_native_cudnn": Backend(),
    "_native_xla": Backend(library="torch_xla", device="xla"),
    "flex": Backend(device=""),
    "flash_hub": Backend(library="kernels"),
    "flash_varlen_hub": Backend(library="kernels"),
    "_flash_3_hub": Backend(library="kernels"),
    "_flash_3_varlen_hub": Backend(library="kernels"),
    "_flash_varlen_3": Backend(library="flash_attn_interface"),
    "sage_hub": Backend(library="kernels"),
    "sage_varlen": Backend(library="sageattention"),
    "_sage_qk_int8_pv_fp8_cuda": Backend(library="sageattention"),
    "_sage_qk_int8_pv_fp8_cuda_sm90": Backend(library="sageattention"),
    "_sage_qk_int8_pv_fp16_cuda": Backend(library="sageattention"),
    "_sage_qk_int8_pv_fp16_triton": Backend(library="sageattention"),
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
class SectionKnob(Knob):
    """A setting of a section; besides the kinds of ``Knob``: ``size`` (ranks, or auto), ``names`` (a list),
    ``mapping``, ``text``, ``quant_type``, ``plan`` (layer to quant_type) and ``components``.
    """

    def allowed(self) -> str:
        """What is accepted, in words."""
        words = {
            "size": "expected a whole number of at least 1, or auto",
            "names": "expected a list of names",
            "mapping": "expected a mapping",
            "text": "expected text",
            "quant_type": f"expected one of {', '.join(QUANT_TYPES)}, or svdq_int4_rN_dq, svdq_nvfp4_rN_dq",
            "plan": "expected a mapping of layer to quant_type",
            "components": "expected a list of components, or a mapping of component to settings",
        }.get(self.kind)
        return super().allowed() if words is None else words + (", or null" if self.optional else "")

    def near(self, value: str) -> str | None:
        """A known value close to ``value``."""
        return nearest(value, QUANT_TYPES) if self.kind == "quant_type" else super().near(value)

    def _check_size(self, value: Any) -> int | str:
        if isinstance(value, str) and value == "auto":
            return "auto"
        size = self._check_int(value)
        if not 1 <= size <= MAX_RANKS:
            raise ValueError(value)
        return size

    def _check_names(self, value: Any) -> list[str]:
        if not isinstance(value, list | tuple) or len(value) > MAX_LENGTH:
            raise TypeError(value)
        return [self._check_text(each) for each in value]

    def _check_text(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise TypeError(value)
        return value

    def _check_mapping(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError(value)
        return {self._check_text(key): each for key, each in value.items()}

    def _check_quant_type(self, value: Any) -> str:
        name = self._check_text(value).lower()
        if name not in QUANT_TYPES and not SVDQ.fullmatch(name):
            raise ValueError(value)
        return name

    def _check_plan(self, value: Any) -> dict[str, str]:
        return {layer: self._check_quant_type(each) for layer, each in self._check_mapping(value).items()}

    def _check_components(self, value: Any) -> list[str] | dict[str, Any]:
        return self._check_mapping(value) if isinstance(value, Mapping) else self._check_names(value)


ATTENTION = SectionKnob(
    kind="choice", doc="Attention backend of the transformer.", choices=tuple(ATTENTION_BACKENDS), optional=True
)
PARALLELISM: Mapping[str, SectionKnob] = {
    "ulysses_size": SectionKnob(
        kind="size", doc="Ranks that split the sequence and exchange heads; auto: all that the others leave.",
        unit="ranks", optional=True,
    ),
    "ring_size": SectionKnob(
        kind="size", doc="Ranks that split the sequence and pass keys and values round.", unit="ranks", optional=True
    ),
    "tp_size": SectionKnob(kind="size", doc="Ranks that split the matrices.", unit="ranks", optional=True),
    "attention_backend": ATTENTION,
    "ulysses_anything": SectionKnob(
        kind="bool", doc="Any number of tokens and heads, also ones that the ranks do not divide.", optional=True
    ),
    "ulysses_float8": SectionKnob(
        kind="bool", doc="Exchange float8 values, for links slower than NVLink.", optional=True
    ),
    "ulysses_async": SectionKnob(kind="bool", doc="Overlap exchange and computation.", optional=True),
    "ring_rotate_method": SectionKnob(
        kind="choice", doc="How keys and values travel round the ring.", choices=("p2p",), optional=True
    ),
    "ring_convert_to_fp32": SectionKnob(kind="bool", doc="Add up the parts of the ring in float32.", optional=True),
    "extra_parallel_modules": SectionKnob(
        kind="names", doc="Components besides the transformer that are split too: text_encoder, vae, controlnet.",
        optional=True,
    ),
    "extra_parallel_kwargs": SectionKnob(
        kind="mapping", doc="Options of single model families (cache-dit 1.5.3 or newer).", optional=True
    ),
    "backend": SectionKnob(
        kind="choice", doc="cache-dit's way of splitting; it follows from the sizes.",
        choices=("auto", "cache_dit", "native_diffuser", "native_pytorch", "native_hybrid"), optional=True,
    ),
}
QUANTIZE: Mapping[str, SectionKnob] = {
    "quant_type": SectionKnob(
        kind="quant_type", doc="Number format of weights and, except weight-only, of activations."
    ),
    "exclude_layers": SectionKnob(
        kind="names", doc="Layers whose name contains one of these stay as they are.", optional=True
    ),
    "verbose": SectionKnob(kind="bool", doc="Log every layer.", optional=True),
    "backend": SectionKnob(
        kind="choice", doc="Library: torchao, or cache-dit's own for svdq types.",
        choices=("auto", "ao", "torchao", "cache_dit", "cache-dit", "cachedit"), optional=True,
    ),
    "regional_quantize": SectionKnob(kind="bool", doc="Only the repeated blocks of the transformer.", optional=True),
    "repeated_blocks": SectionKnob(
        kind="names", doc="Classes of the repeated blocks, for models that do not name theirs.", optional=True
    ),
    "components_to_quantize": SectionKnob(
        kind="components", doc="Components instead of the transformer, or a mapping of component to its own settings.",
        optional=True,
    ),
    "per_tensor_fallback": SectionKnob(
        kind="bool", doc="Layers that cannot take float8 by row or block take it by tensor.", optional=True
    ),
    "precision_plan": SectionKnob(kind="plan", doc="Layer name to its own quant_type.", optional=True),
    "serialize_to": SectionKnob(kind="text", doc="Folder that svdq types are written to.", optional=True),
    "svdq_kwargs": SectionKnob(kind="mapping", doc="Options of svdq types.", optional=True),
}
SPELLINGS: Mapping[str, Mapping[str, str]] = {
    "parallelism_config": {
        "ulysses": "ulysses_size", "ring": "ring_size", "tp": "tp_size",
        **{f"experimental_{name}": name for name in ULYSSES_VARIANTS},
    },
    "quantize_config": {},
}
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
