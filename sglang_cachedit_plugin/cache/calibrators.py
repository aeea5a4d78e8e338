"""What fills cache-dit's calibrator slots: forecasts of the residual on the real spacing."""

from __future__ import annotations

import torch

from ..config.settings import CacheSettings
from .dmd import DMDForecaster
from .forecast import Extrapolator


class _Forecaster:
    """A calibrator slot of cache-dit that extrapolates on the real spacing."""

    def __init__(self, order: int):
        self._order = order
        self._values: dict[str, Extrapolator] = {}
        self.position = 0.0

    def at(self, step: int, position: float) -> None:
        """Move to a step before it is computed or approximated."""
        self.position = position

    def update(self, value: torch.Tensor, name: str = "default") -> None:
        """Add a computed value."""
        self._values.setdefault(name, Extrapolator(self._order)).update(self.position, value)

    def approximate(self, name: str = "default") -> torch.Tensor:
        """The forecast at the current step."""
        return self._values[name].predict(self.position)

    def repeat(self, step: int, position: float) -> None:
        """The last values once more, as if another step had computed them."""
        self.at(step, position)
        for name, values in self._values.items():
            self.update(values.latest, name)

    def evict_oldest(self) -> None:
        """Drop what the next computed value will push out."""
        for values in self._values.values():
            values.evict_oldest()

    def held_bytes(self) -> int:
        """Bytes of the values kept."""
        return sum(values.held_bytes() for values in self._values.values())


class _SteppedDMD:
    """A calibrator slot of cache-dit that forecasts by the modes of the computed values."""

    def __init__(self, settings: CacheSettings):
        self._settings = settings
        self._values: dict[str, DMDForecaster] = {}
        self._at = (0, 0.0)

    def at(self, step: int, position: float) -> None:
        """Move to a step before it is computed or approximated."""
        self._at = (step, position)

    def update(self, value: torch.Tensor, name: str = "default") -> None:
        """Add a computed value."""
        if name not in self._values:
            settings = self._settings
            self._values[name] = DMDForecaster(
                settings.dmd_history, settings.dmd_rank, settings.dmd_ridge,
                single=settings.dmd_svd_precision == "low",
            )
        self._values[name].update(*self._at, value)

    def approximate(self, name: str = "default") -> torch.Tensor:
        """The forecast at the current step."""
        return self._values[name].predict(*self._at)

    def repeat(self, step: int, position: float) -> None:
        """The last values once more, as if another step had computed them."""
        self.at(step, position)
        for name, values in self._values.items():
            self.update(values.latest, name)

    def evict_oldest(self) -> None:
        """Drop what the next computed value will push out."""
        for values in self._values.values():
            values.evict_oldest()

    def held_bytes(self) -> int:
        """Bytes of the values kept."""
        return sum(values.held_bytes() for values in self._values.values())


def new_calibrator(settings: CacheSettings) -> _Forecaster | _SteppedDMD | None:
    if settings.calibrator == "taylorseer":
        return _Forecaster(settings.taylorseer_order)
    if settings.calibrator == "dmd":
        return _SteppedDMD(settings)
    return None
