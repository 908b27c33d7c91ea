"""A counter-based hash: the same numbers on every rank and device, whatever the order."""

from __future__ import annotations

from torch import Tensor

# Odd 64-bit multipliers, as signed integers: the finaliser of SplitMix64 (Steele, Lea and Flood,
# OOPSLA 2014), and a distinct odd step per coordinate.
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_STEPS = (
    0x9E3779B97F4A7C15 - (1 << 64),
    0xD1B54A32D192ED03 - (1 << 64),
    0x8CB92BA72F3D8DD7 - (1 << 64),
)


def mixed(state: Tensor, x: Tensor, coordinate: int) -> Tensor:
    """A hash of int64 ``state`` and ``x``, as int64: another one for each of coordinates 0 to 2."""
    return mix(state + (x + 1) * _STEPS[coordinate])


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64 ``x``."""
    x = (x ^ shifted(x, 30)) * _MIX1
    x = (x ^ shifted(x, 27)) * _MIX2
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
