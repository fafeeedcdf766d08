"""From values in files to gray levels: which value is black and which is white, and whether that was a good choice."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np

COLOURS_OF_16_BITS = "the upper 8 of the 16 bits of colours"

# Below this share of white, the brightest pixel of all images is dark.
_DARK = 0.5


class Levels(NamedTuple):
    """The values that become black and white, as ``--range LOW,HIGH`` gives them. Values beyond them are clipped."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"values from {self.low:g} (black) to {self.high:g} (white)"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``LOW,HIGH``.

        Raises:
            ValueError: not two finite numbers, the first one smaller.
        """
        try:
            low, high = map(float, text.split(","))
        except ValueError:
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{text!r}, expected two numbers LOW,HIGH as in 0,4095, the first one smaller")
        return cls(low, high)

    def to_uint8(self, values: np.ndarray) -> np.ndarray:
        """Gray levels, 0 for ``low`` and 255 for ``high``, rounded; NaN becomes an error.

        Raises:
            ValueError: a value is not a number.
        """
        scaled = (np.asarray(values, dtype=np.float64) - self.low) * (255 / (self.high - self.low))
        if np.isnan(scaled).any():
            raise ValueError("some values are NaN")
        return scaled.clip(0, 255).round().astype(np.uint8)


class DataError(ValueError):
    """Data that is missing or does not fit; the message says what was expected, what came, and what to do."""


@dataclass
class Seen:
    """The smallest and the largest value of all images of each kind of file.

    Args:
        extremes: by the kind, in words, and the value that its files can hold at most.
    """

    extremes: dict[tuple[str, float], tuple[float, float]] = field(default_factory=dict)

    def note(self, kind: str, most: float, values: np.ndarray) -> None:
        """Take account of the values of an image."""
        if values.size:
            self._widen((kind, most), (float(values.min()), float(values.max())))

    def add(self, other: "Seen") -> None:
        """Take account of all that another one has seen."""
        for key, extremes in other.extremes.items():
            self._widen(key, extremes)

    def _widen(self, key: tuple[str, float], extremes: tuple[float, float]) -> None:
        low, high = self.extremes.get(key, extremes)
        self.extremes[key] = min(low, extremes[0]), max(high, extremes[1])

    def warnings(self, levels: Levels | None) -> tuple[str, ...]:
        """What users must know of how their values became gray levels: images all dark, and values that were clipped."""
        found = []
        for (kind, most), (low, high) in sorted(self.extremes.items()):
            black, white = levels or (0.0, most)
            if high < black + _DARK * (white - black):
                advice = f"--range {_next_range(low, high)} spreads these values from black to white"
                if kind == COLOURS_OF_16_BITS:
                    advice = "convert them to gray of 16 bits, for which --range LOW,HIGH says what is white"
                found.append(f"the largest value seen in {kind} is {high:g}, white is {white:g}: all images are dark; {advice}")
            if levels and (low < black or high > white):
                found.append(
                    f"values seen in {kind} go from {low:g} to {high:g}: those beyond --range {black:g},{white:g} are clipped"
                )
        return tuple(found)


def refuse_levels(name: str, levels: Levels | None) -> None:
    """Raise DataError for ``levels``, where a data set has gray levels of 8 bits and no others."""
    if levels is not None:
        raise DataError(f"--range is for image files and arrays of other ranges; {name} has 8 bits, 0 is black and 255 white")


def _next_range(low: float, high: float) -> str:
    """A range that holds the values: for integers the numbers of bits that they need."""
    if low < 0 or high <= 1 or not float(high).is_integer():
        return f"{low:g},{high:g}" if low < high else f"{low - 1:g},{high:g}"
    return f"0,{2 ** int(high).bit_length() - 1}"
