"""The smoothed loss that the terminal, the report and the page of `oribi watch` show."""

SMOOTHING = 0.9  # share of the past


class Smoothed:
    """Exponential mean that starts without a bias towards zero."""

    def __init__(self) -> None:
        self._total, self._weight = 0.0, 0.0

    def add(self, value: float) -> float:
        """The mean with one more value."""
        self._total = SMOOTHING * self._total + (1 - SMOOTHING) * value
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._total / self._weight
