"""What LaCo's released notebooks compute."""

from __future__ import annotations

from shoal.examples import TransformExamples
from shoal.fitting.merge import merged
from shoal.fitting.result import Job, Transformed

EXAMPLES = TransformExamples(role="merge")


def laco_notebook(job: Job) -> Transformed:
    """Give the layer before each removed span the matrices of the span's last layer, and keep its own norms.

    The notebooks add theta_(l+k) minus the *already updated* theta_l, so that each round replaces the layer: the result
    is the last layer of the group, not the paper's sum. For comparison with numbers made by that code; see
    `difference-sum` for the formula. Merging equal layers changes nothing.

    Source: the notebooks released with LaCo (arXiv 2402.11187).
    """
    return merged(job, "laco-notebook", lambda _, parts, __: parts[-1])
