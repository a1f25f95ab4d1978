"""A draft in a file of your own: the first and the last layers guess, all of them verify.

    shoal generate MODEL "Once" --speculate 'examples/ends.py:first=8;last=4'

A draft is called with the model's `Spec` and answers with a `Chooser`, which names the steps that draft. Whatever it
chooses, the text is that of plain decoding; it only decides how many guesses are right, and what they cost.
"""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.plan import Run, Spec
from shoal.speculating.chooser import Chooser, Fixed


def ends(*, spec: Spec, first: int = 2, last: int = 1) -> Chooser:
    """Draft by the layers 0 to `first` - 1 and the `last` ones."""
    depth = spec.stack("decoder").depth
    if first < 1 or last < 0 or first + last > depth:
        raise UsageError(f"first={first} and last={last} are none of {depth} layers; name fewer", code="U610")
    return Fixed(tuple(Run(layer) for layer in (*range(first), *range(depth - last, depth))))
