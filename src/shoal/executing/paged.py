"""Which plans run under paged attention, the KV cache of transformers' continuous batching (`generate_batch`).

A paged cache has one row of pages for each layer of the stock model, and the attention itself writes to the row of its
own `layer_idx`. So each layer's attention may run once: dropped, reordered and parallel layers, parts, maps and KV
sources are right as they are. Two runs of one layer would share a row, and each would read what the other stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers.generation.continuous_batching import PagedAttentionCache

from shoal.errors import PlanError
from shoal.plan import Run, Step
from shoal.plan.capabilities import Refusal, refusal, refused

Obstacle = Refusal | Literal["policy"]
"""What keeps a plan from running under paged attention: what the table says of its steps, or a policy."""
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
    no = refused("gate", "paged", Run(0)) if obstacle == "policy" else obstacle
    assert no is not None
    return PlanError(no.message, code=no.code)


def guard_paged(model: Any, obstacle: Obstacle | None) -> Callable[[], None]:
    """Let `generate_batch` refuse where it is called what the running plan cannot do; call the result to end this.

    Transformers runs the batch in a thread of its own and turns what is raised there into a field of its answer, so
    the refusal must come before. P140: `obstacle`. P123: a manager that was kept from before the plan, whose pages
    other layers have filled. A manager that is kept while the plan runs goes with the plan.
    """
    stock = getattr(model, "init_continuous_batching", None)
    if stock is None:
        return lambda: None
    before = model.__dict__.get(_KEPT)

    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        if obstacle is not None:
            raise _refusal(obstacle)
        if before is not None and model.__dict__.get(_KEPT) is before:
            raise PlanError(
                "the paged KV cache that this model kept was filled under another plan; call "
                "model.destroy_cached_continuous_batching_manager() first",
                code="P123",
            )
        return stock(*args, **kwargs)

    def end() -> None:
        model.__dict__.pop("init_continuous_batching", None)
        if model.__dict__.get(_KEPT, before) is not before:
            model.destroy_cached_continuous_batching_manager()

    model.init_continuous_batching = init_continuous_batching
    return end
