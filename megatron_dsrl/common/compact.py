"""Numbers of many tokens as machine words: 4 bytes each, where a tuple of Python numbers takes 32 to 36.

Arrays are pickled, compared, sliced and concatenated at the speed of memory, and PyTorch and NumPy read them without a
copy. Unlike tuples they have no hash, and are equal to arrays only.
"""

from array import array
from collections.abc import Iterable


def int_array(values: "Iterable[int] | array[int]") -> "array[int]":
    """32-bit integers; an array is returned as it is."""
    return values if isinstance(values, array) else array("i", values)


def float_array(values: "Iterable[float] | array[float]") -> "array[float]":
    """32-bit floats, the precision of engines' log-probs; an array is returned as it is."""
    return values if isinstance(values, array) else array("f", values)
