"""Spherical interpolation between the kept layer and the removed ones."""

from __future__ import annotations

from shoal.examples import TransformExamples
from shoal.fitting.merge import arc, merged, share_in
from shoal.fitting.result import Job, Transformed

EXAMPLES = TransformExamples(role="merge", null={"t": 0.0}, refused=(((2,), {"t": 1.5}, "U558"),))


def slerp(job: Job, *, t: float = 0.5, norms: bool = True) -> Transformed:
    """Merge each removed span into the layer before it along the arc between their tensors.

    For tensors a, b with the angle w between them: (sin((1 - t) w) a + sin(t w) b) / sin w, the straight line where
    they are parallel. Of a longer span the removed layers' mean is b. `t` 0 is dropping, bit for bit; equal layers
    stay as they are for any t. Raises U558 for a t outside 0 to 1.

    Source: Shoemake 1985, as mergekit applies it to weights: each tensor as one vector, lengths not made equal.
    """
    share_in(t, "slerp")
    return merged(
        job, "slerp", lambda _, parts, __: arc(parts[0], sum(parts[2:], parts[1]) / (len(parts) - 1), t), norms=norms
    )
