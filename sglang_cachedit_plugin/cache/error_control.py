"""Which steps are computed, from the error of the forecasts and one tolerance.

At a computed step the forecast of its output is at hand, so its relative error e costs one reduction. Linear
extrapolation from the outputs at a and b errs by kappa * |(s - a)(s - b)| at s, to second order; e gives kappa, and
kappa the error of the steps to come. Each step passes its error on to the latents in proportion to its length in s.
Steps are cached as long as the sum stays within the tolerance. This is the step-size control of multistep ODE solvers
(Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.5), with the step grid given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BEGINNING = 4
"""First steps that are computed: the error of a forecast is known from the third on."""
RESTART = 2
"""Steps computed after a change of the model: as many as the forecast needs."""
LONGEST = 4
"""Most cached steps in a row."""
FORGETTING = 0.25
"""What the last estimate of kappa counts at least: one good forecast is no proof."""
EARLY, EARLY_WEIGHT = 0.25, 10.0
"""In this share of the steps, from the first, errors count so much: they decide what the picture shows."""
LATE = 0.5
"""Later errors count more, by the position to this power: fewer steps are left to make up for them."""


class ErrorControl:
    """Decisions of one denoising loop.

    Args:
        tolerance: error that a run of cached steps may pass on, relative to the output, integrated over the
            positions and divided by their range; 0 computes every step.
        positions: position of each step on the denoising path, and the position where the last step ends. The
            host may move the steps to come.

    Attributes:
        errors: relative error of the forecast at each computed step where one was possible.
        passed_on: estimated error that the cached runs so far pass on, in units of the tolerance.
        problem: why every further step is computed, None where nothing is wrong.
    """

    def __init__(self, tolerance: float, positions: Sequence[float]):
        self.errors: dict[int, float] = {}
        self.problem: str | None = None
        self.passed_on = 0.0
        self.positions, self._tolerance = positions, tolerance
        self._range = abs(positions[0] - positions[-1]) or 1.0
        self._steps = len(positions) - 1
        self._newest: list[int] = []
        self._missing = BEGINNING
        self._kappa: float | None = None
        self._until = 0

    def restart(self) -> None:
        """What is computed from now on comes from another model or with other guidance: forecasts start over."""
        self._newest = []
        self._missing = max(self._missing, RESTART)

    def stop(self, problem: str) -> None:
        """Compute every further step."""
        self.problem = self.problem or problem

    def computes(self, step: int) -> bool:
        """Whether step ``step`` is computed."""
        return self.problem is not None or self._missing > 0 or step >= self._until

    @property
    def measures(self) -> bool:
        """Whether the output of the next computed step can be compared with its forecast: two came before it."""
        return len(self._newest) == 2

    def measured(self, step: int, spread: float, error: float) -> None:
        """The error of the forecast at a computed step.

        Args:
            spread: ``spread`` of the step when it was computed.
            error: norm of the error over that of the output, of the worst prompt.
        """
        if not math.isfinite(error):
            self.stop(f"the error of the forecast at step {step} is {error}")
            return
        self.errors[step] = error
        if spread > 0.0:
            self._kappa = max(error / spread, FORGETTING * (self._kappa or 0.0))

    def computed(self, step: int) -> None:
        """Step ``step`` was computed: decide how many steps after it are cached."""
        self._missing = max(0, self._missing - 1)
        self._newest = [*self._newest, step][-2:]
        self._until = step + 1 + self._gap(step)

    def spread(self, step: int) -> float:
        """|(s - a)(s - b)| for the newest computed steps a and b: what the error of the forecast grows with."""
        return math.prod(abs(self.positions[step] - self.positions[known]) for known in self._newest)

    def _gap(self, step: int) -> int:
        """How many steps after ``step`` are cached."""
        if self._kappa is None or not self.measures or self._tolerance == 0.0:
            return 0
        passed, gap = 0.0, 0
        for later in range(step + 1, min(step + 1 + LONGEST, self._steps - 1)):
            error = self._kappa * self.spread(later) * self._weight(later)
            if not passed + error <= self._tolerance:
                break
            passed, gap = passed + error, gap + 1
        self.passed_on += passed
        return gap

    def _weight(self, step: int) -> float:
        """What a relative error of the output at ``step`` means for the latents at the end."""
        places = self.positions
        length = abs(places[step + 1] - places[step]) / self._range
        left = abs(places[step] - places[-1]) / self._range
        if left == 0.0:
            return math.inf
        early = EARLY_WEIGHT if step < EARLY * self._steps else 1.0
        return early * length / math.pow(left, LATE)
