"""Draft by a listed set of layers."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Spec, parse_steps
from shoal.speculating.chooser import Chooser, Fixed

EXAMPLES = DraftExamples(("skip:0,2-3",))


def skip(*, spec: Spec, keep: str = "") -> Chooser:
    """Draft by the layers and parts of layers that `keep` names, in depth notation: 0-11,14-29 or 0-9,10a,11a,12-29.

    The draft reads the base model's own KV rows and writes to copies that are dropped after the verification. Layers
    from 0 on that it keeps without a gap are shared with the verification, as an exit draft's are.

    Source: Draft & Verify (Zhang et al., ACL 2024, arXiv 2309.08168).

    How we differ: the paper searches the set by Bayesian optimisation beforehand (here it is given, or chosen by
    `swift`, `clasp`, `knapsack`), and its code verifies through all layers.
    """
    if not keep.strip():
        raise UsageError(
            "the draft skip names no layers; write those that it keeps, as in skip:0-11,14-29", code="U610"
        )
    return Fixed(parse_steps(keep))
