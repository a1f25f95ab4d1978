"""Plans under paged attention, the KV cache of transformers' continuous batching (`generate_batch`).

A paged cache has one row of pages for each layer that a config names, and the attention itself writes to the row of its
own `layer_idx`. A cache that is made while a plan runs is sized for the plan instead: a row for each run that attends,
but for those that take another's keys and values over and attend to all tokens: they read its row. Each run is called
with a view of the cache that leads to its row. A cache that was made for the stock model has the stock rows, which are
right where no layer attends twice; elsewhere each run would read what the other stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers.generation.continuous_batching import PagedAttentionCache

from shoal.errors import PlanError
from shoal.models.lists import Stack
from shoal.plan import Run, Step
from shoal.plan.capabilities import Refusal, refusal, refused
from shoal.plan.steps import key_source, runs

Obstacle = Refusal | Literal["policy", "heads"]
"""What keeps a plan from running under paged attention: what the table says of its steps, a policy, or keys and values
of fewer heads than the pages have."""
_KEPT = "_cached_continuous_batching_manager"
"""Where transformers keeps the manager of a call with persistent_manager=True, its filled cache included."""


_MARK = "_shoal_pages"
"""The attribute of a paged cache that holds the `Pages` for which it was made."""


def paging_obstacle(steps: tuple[Step, ...]) -> Obstacle | None:
    """What would give wrong tokens when these steps of a decoder run under paged attention; None for none."""
    return refusal(steps, "paged")


class Pages:
    """The rows of a paged cache that is made for the steps of one stack's plan."""

    def __init__(self, stack: Stack, steps: tuple[Step, ...]) -> None:
        self.rows: dict[tuple[int, int], int] = {}
        """The row of each run that attends, by (position of the step, branch)."""
        self.layers: list[int] = []
        """For each row the base layer whose type of attention it needs."""
        latest: dict[int, int] = {}
        for position, step in enumerate(steps):
            for branch, run in enumerate(runs((step,))):
                if run.part == "mlp":
                    continue
                # a window's old tokens are gone once the source has stored its new ones
                row = latest.get(_source(run)) if not run.stores and _sees_all(stack.config, run.layer) else None
                if row is None:
                    row = len(self.layers)
                    self.layers.append(run.layer)
                self.rows[position, branch] = latest[run.layer] = row
        self.twice = len({run.layer for run in _attending(steps)}) < len(_attending(steps))
        """Whether a layer attends more than once, so that the rows of the stock model do not do."""
        self.stock = self.layers == list(range(stack.depth)) and len(self.rows) == stack.depth
        """Whether the rows are those of the stock model."""

    def config(self, whole: Any) -> Any:
        """A copy of a model's config by which a paged cache gets these rows."""
        made = copy.deepcopy(whole)
        text = made.get_text_config()
        types = getattr(text, "layer_types", None)
        text.num_hidden_layers = len(self.layers)
        if types is not None:
            text.layer_types = [types[layer] for layer in self.layers]
        return made

    def own(self, cache: PagedAttentionCache) -> None:
        """Note that `cache` has these rows."""
        cache.__dict__[_MARK] = self

    def refuse(self, obstacle: Obstacle | None, arguments: Mapping[str, Any]) -> None:
        """Raise `PlanError` P140 when a layer is given a paged cache among its `arguments` in spite of an obstacle, or
        one that has too few rows."""
        cache = arguments.get("cache")
        if not isinstance(cache, PagedAttentionCache):
            return
        if obstacle is not None:
            raise _refusal(obstacle)
        if cache.__dict__.get(_MARK) is not self and (self.twice or _MARK in cache.__dict__):
            raise PlanError(
                "this paged KV cache was made before the plan was put on the model, and has not one row for each run "
                "that attends; begin continuous batching while the plan runs",
                code="P140",
            )

    def seen_by(self, at: tuple[int, int], arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer, with a view of the paged cache among them that leads the run `at` to its row."""
        cache = arguments.get("cache")
        if isinstance(cache, PagedAttentionCache) and cache.__dict__.get(_MARK) is self and at in self.rows:
            return arguments | {"cache": _OneRow(cache, self.rows[at])}
        return arguments


class _OneRow(PagedAttentionCache):
    """A paged cache in which whoever attends is led to one row."""

    def __init__(self, cache: PagedAttentionCache, row: int) -> None:
        self.__dict__.update(cache.__dict__)
        self.__dict__["_row"] = row

    def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        """Called by the attention, with the number of its layer in the stock model."""
        return super().update(key_states, value_states, self.__dict__["_row"], kwargs)


def _attending(steps: tuple[Step, ...]) -> list[Run]:
    return [run for run in runs(steps) if run.part != "mlp"]


def _sees_all(config: Any, layer: int) -> bool:
    """Whether a layer attends to all tokens, by what transformers goes by."""
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is None if types is None else types[layer] == "full_attention"


def _source(run: Run) -> int:
    """The layer whose keys and values a run takes over; -1 for one that takes none."""
    source = key_source(run)
    return -1 if source is None else source


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
    """Sizes the paged cache of `generate_batch` for the running plan, and lets it refuse where it is called what the
    plan cannot do.

    Transformers runs the batch in a thread of its own and turns what is raised there into a field of its answer, so
    the refusal must come before. A manager that is kept while the plan runs goes with the plan.
    """

    def __init__(self, obstacle: Obstacle | None, pages: Pages) -> None:
        self.obstacle, self.pages = obstacle, pages
        self.before: Any = None

    def begin(self, model: Any) -> None:
        """The plan is put on the model."""
        self.before = model.__dict__.get(_KEPT)

    def asked(self, model: Any, _: tuple[Any, ...], __: dict[str, Any]) -> Callable[[Any], None] | None:
        """Called in front of `init_continuous_batching`; what is returned is called with its manager. Raises P140 for
        `obstacle`, P123 for a manager that was kept from before the plan, whose pages other layers have filled."""
        if self.obstacle is not None:
            raise _refusal(self.obstacle)
        if self.before is not None and model.__dict__.get(_KEPT) is self.before:
            raise PlanError(
                "the paged KV cache that this model kept was filled under another plan; call "
                "model.destroy_cached_continuous_batching_manager() first",
                code="P123",
            )
        return None if self.pages.stock else lambda manager: self.sized(model, manager)

    def sized(self, model: Any, manager: Any) -> None:
        """Let a manager of continuous batching that has no cache yet make one for the plan: it reads the model's config
        for that. Raises P140 for `obstacle`."""
        if self.obstacle is not None:
            raise _refusal(self.obstacle)
        if manager is None or manager.batch_processor is not None:
            return
        config = model.config
        model.config = self.pages.config(config)
        try:
            manager.warmup()  # makes the cache
            processor: Any = manager.batch_processor
            self.pages.own(processor.cache)
        finally:
            model.config = config

    def end(self, model: Any) -> None:
        """The plan was taken away."""
        if model.__dict__.get(_KEPT, self.before) is not self.before:
            model.destroy_cached_continuous_batching_manager()
        self.before = None
