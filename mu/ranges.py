"""Ranges of the numbers that users set, and the errors for numbers outside them."""

import math
from dataclasses import dataclass

INF = math.inf


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both finite numbers or unlimited."""

    low: float = -INF
    high: float = INF
    example: object = 1  # for the message
    whole: bool = False  # integers only
    open_low: bool = False  # `low` itself is not allowed
    open_high: bool = False  # nor is `high`
    pair: bool = False  # [lowest, highest], or one number for both

    def __str__(self):
        kind = "whole number" if self.whole else "number"
        parts = [f"a pair of a lower and a higher {kind}" if self.pair else f"a {kind}"]
        if self.low > -INF:
            parts.append(f"{'above' if self.open_low else 'from'} {self.low:g}")
        if self.high < INF:
            parts.append(f"{'below' if self.open_high else 'to'} {self.high:g}")
        return " ".join(parts)

    def allows(self, value):
        """Return whether a value is in the range."""
        if self.pair and isinstance(value, (list, tuple)):
            fits = len(value) == 2 and all(map(self._allows_one, value))
            return fits and value[0] <= value[1]
        return self._allows_one(value)

    def _allows_one(self, value):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        low = value > self.low if self.open_low else value >= self.low
        return low and (value < self.high if self.open_high else value <= self.high)


def check_ranges(values, ranges):
    """Raise ValueError for the first of the named values that is outside its range."""
    for name in (name for name in values if name in ranges):
        value, allowed = values[name], ranges[name]
        if not allowed.allows(value):
            raise ValueError(
                f"{name} is {value!r}, allowed is {allowed}: set it to {allowed.example!r}, for "
                "example"
            )


def count(low=1, example=8):
    """Return the range of whole numbers from `low` on."""
    return Range(low, example=example, whole=True)


def positive(example):
    """Return the range of numbers above 0."""
    return Range(0, example=example, open_low=True)


ANY = Range(example=1.0)  # a weight: of any sign
NOT_NEGATIVE = Range(0, example=1.0)
SHARE = Range(0, 1, example=0.5)
