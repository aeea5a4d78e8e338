"""cache-dit's context of one block list and CFG branch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from cache_dit import DBCacheConfig, DMDCalibratorConfig, TaylorSeerCalibratorConfig
from cache_dit.caching.cache_contexts.cache_context import CachedContext

from ..config.settings import CacheSettings
from .calibrators import new_calibrator
from .runtime import TransformerSpec


def _calibrator_config(settings: CacheSettings) -> TaylorSeerCalibratorConfig | DMDCalibratorConfig | None:
    if settings.calibrator == "taylorseer":
        return TaylorSeerCalibratorConfig(taylorseer_order=settings.taylorseer_order)
    if settings.calibrator == "dmd":
        return DMDCalibratorConfig(
            dmd_history=settings.dmd_history,
            dmd_rank=settings.dmd_rank,
            dmd_ridge=settings.dmd_ridge,
            dmd_svd_precision=settings.dmd_svd_precision,
        )
    return None


@dataclass
class BranchContext(CachedContext):
    """cache-dit's context of one block list and branch, with what our decision needs on top."""

    blocks: str = ""
    branch: str = ""
    last_step: int = -1
    last_diff: tuple[int, float] | None = None
    has_reference: bool = False
    absent: set[str] = field(default_factory=set)
    residual_shape: torch.Size | None = None

    def evict_oldest(self) -> None:
        """Free what the computed step that begins now will replace, before its blocks run."""
        for name in [name for name in self.buffers if "_Bn_" in name]:
            del self.buffers[name]
        for calibrator in self.get_calibrators():
            if calibrator is not None:
                calibrator.evict_oldest()

    def start_over(self, settings: CacheSettings) -> None:
        """Forget what was computed, and free it; what was counted stays."""
        self.buffers.clear()
        self.absent.clear()
        self.has_reference, self.residual_shape = False, None
        self.calibrator, self.encoder_calibrator = new_calibrator(settings), new_calibrator(settings)

    @classmethod
    def create(cls, name: str, blocks: str, branch: str, spec: TransformerSpec) -> BranchContext:
        """An empty context of block list ``blocks`` and a CFG branch for one request."""
        settings = spec.settings
        context = cls(
            name=name,
            blocks=blocks,
            branch=branch,
            cache_config=DBCacheConfig(
                Fn_compute_blocks=settings.Fn_compute_blocks,
                Bn_compute_blocks=settings.Bn_compute_blocks,
                residual_diff_threshold=settings.residual_diff_threshold,
                enable_separate_cfg=False,
            ),
            calibrator_config=_calibrator_config(settings),
        )
        context.start_over(settings)
        return context

    def held_bytes(self) -> int:
        """Bytes of the tensors kept, those of the calibrators among them."""
        buffers = [each for each in self.buffers.values() if isinstance(each, torch.Tensor)]
        calibrators = [each for each in self.get_calibrators() if each is not None]
        return sum(each.numel() * each.element_size() for each in buffers) + sum(c.held_bytes() for c in calibrators)
