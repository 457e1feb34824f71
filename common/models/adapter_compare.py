"""Whether the weights of two adapters are the same, whatever their layouts."""

import math

import numpy as np

from common.backend import LoraWeight


def is_same(one: LoraWeight, other: LoraWeight) -> bool:
    """Whether `other` is `one` to the bit, up to padding to a larger rank and a scale multiplied into B."""
    rank = one.rank
    if other.rank < rank or other.A[rank:].any() or other.B[:, rank:].any():
        return False
    folded = one.B if math.isclose(one.scale, other.scale) else one.B * np.float32(one.scale / other.scale)
    if not (np.array_equal(one.A, other.A[:rank]) and np.array_equal(folded, other.B[:, :rank])):
        return False
    if one.magnitude is None or other.magnitude is None:
        return one.magnitude is other.magnitude
    return np.array_equal(one.magnitude, other.magnitude)
