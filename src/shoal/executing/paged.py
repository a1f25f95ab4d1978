"""Which plans run under paged attention, the KV cache of transformers' continuous batching (`generate_batch`).

A paged cache has one row of pages for each layer of the stock model, and the attention itself writes to the row of its
own `layer_idx`. So each layer's attention may run once: dropped, reordered and parallel layers, parts, maps and KV
sources are right as they are. Two runs of one layer would share a row, and each would read what the other stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers.generation.continuous_batching import PagedAttentionCache

from shoal.errors import PlanError
from shoal.plan import Run, Step
from shoal.plan.capabilities import Refusal, refusal, refused

Obstacle = Refusal | Literal["policy", "heads"]
"""What keeps a plan from running under paged attention: what the table says of its steps, a policy, or keys and values
of fewer heads than the pages have."""
_KEPT = "_cached_continuous_batching_manager"
"""Where transformers keeps the manager of a call with persistent_manager=True, its filled cache included."""


def paging_obstacle(steps: tuple[Step, ...]) -> Obstacle | None:
    """What would give wrong tokens when these steps of a decoder run under paged attention; None for none."""
    return refusal(steps, "paged")


def refuse_paged(obstacle: Obstacle | None, arguments: Mapping[str, Any]) -> None:
    """Raise `PlanError` P140 when a layer is given a paged cache among its `arguments` in spite of an obstacle."""
    if obstacle is not None and isinstance(arguments.get("cache"), PagedAttentionCache):
        raise _refusal(obstacle)


def _refusal(obstacle: Obstacle) -> PlanError:
    if obstacle == "heads":
        return PlanError(
            "tensors of this plan make fewer heads of keys and values than the pages of a paged cache have; call "
            "generate",
            code="P162",
        )
    no = refused("gate", "paged", Run(0)) if obstacle == "policy" else obstacle
    assert no is not None
    return PlanError(no.message, code=no.code)


class PagedGuard:
    """Lets `generate_batch` refuse where it is called what the running plan cannot do.

    Transformers runs the batch in a thread of its own and turns what is raised there into a field of its answer, so
    the refusal must come before. A manager that is kept while the plan runs goes with the plan.
    """

    def __init__(self, obstacle: Obstacle | None) -> None:
        self.obstacle = obstacle
        self.before: Any = None

    def begin(self, model: Any) -> None:
        """The plan is put on the model."""
        self.before = model.__dict__.get(_KEPT)

    def refuse(self, model: Any, _: tuple[Any, ...], __: dict[str, Any]) -> None:
        """Raise P140 for `obstacle`, P123 for a manager that was kept from before the plan, whose pages other layers
        have filled."""
        if self.obstacle is not None:
            raise _refusal(self.obstacle)
        if self.before is not None and model.__dict__.get(_KEPT) is self.before:
            raise PlanError(
                "the paged KV cache that this model kept was filled under another plan; call "
                "model.destroy_cached_continuous_batching_manager() first",
                code="P123",
            )

    def end(self, model: Any) -> None:
        """The plan was taken away."""
        if model.__dict__.get(_KEPT, self.before) is not self.before:
            model.destroy_cached_continuous_batching_manager()
        self.before = None
