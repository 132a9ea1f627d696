"""What the options of the scripts take: how a text becomes a value, and back."""

import argparse
import math
from collections.abc import Callable, Sequence

NORMS = {"1": 1.0, "2": 2.0, "inf": math.inf}


def read_norm(text: str) -> float:
    """Read the name of a norm."""
    if text not in NORMS:
        raise argparse.ArgumentTypeError(f"expected {', '.join(NORMS)}, got {text}")
    return NORMS[text]


def in_words(values: Sequence[float]) -> str:
    """Write numbers as they are typed."""
    return " ".join(f"{value:g}" for value in values)


def number_from(low: float) -> Callable[[str], float]:
    """Make what reads a finite number >= ``low`` from the command line."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number >= {low}, got {text}")
        return value

    parse.__name__ = "number"  # argparse: "invalid number value: 'x'"
    return parse


def whole_number(low: int) -> Callable[[str], int]:
    """Make what reads a whole number >= ``low`` from the command line."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {low}, got {text}")
        return value

    parse.__name__ = "whole number"
    return parse
