"""Many requests in one forward, under a plan or not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from shoal.decoding.continuous import PAGE, ContinuousWriter, EndedError, continuous, silent
from shoal.decoding.listening import OnTokens
from shoal.errors import PlanError, ShoalWarning, UsageError, first_line
from shoal.executing.weights import Tensors
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.serve.engine import ClosedError
from shoal.serve.generating import Generate, GenerationCounts, GenerationRequest, Prepare, settings, under_plan

TRIED = 4
"""Tokens that are written both ways before the first request."""
_UNFIT = ("U750", "P140", "P141", "P162", "P163")
"""Codes of what has no pages."""
_FAULTS = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError)
"""What a model raises that transformers' continuous batching does not know."""


def batched(
    loaded: Loaded,
    plan: Plan | str | None = None,
    weights: Tensors | None = None,
    *,
    at_once: int = 16,
    cached: int = 16384,
) -> Prepare:
    """Writes for up to `at_once` requests in each forward, with `plan` (and the tensors that it names) running when one
    is given.

    `cached`: tokens, prompts and answers together, whose keys and values there is room for. A request has the text that
    it has alone, as far as rounding in a batch of another size allows. Entering it raises what `shoal.apply` raises,
    P140 to P163 for plans that have no pages, and U750 for a model that continuous batching does not fit: a few tokens
    are written both ways before the first request.
    """

    @contextmanager
    def prepare() -> Iterator[Generate]:
        with ExitStack() as there:
            base = Plan.identity(loaded.opened.spec) if plan is None else plan
            handle = there.enter_context(running(loaded.model, base, weights))
            there.enter_context(evaluating(loaded.model))
            asked = continuous(loaded.model, loaded.tokenizer, handle.bound.paged.sized, at_once=at_once, cached=cached)
            with silent():
                try:
                    writer = _Writer(there.enter_context(asked), at_once)
                    _try(writer, loaded)
                except _FAULTS as error:
                    raise _unfit(loaded, first_line(error)) from error
            yield writer

    return prepare


def where_it_fits(
    loaded: Loaded, plan: Plan | str | None = None, weights: Tensors | None = None, *, at_once: int, cached: int
) -> Prepare:
    """As `batched`, but one request at a time, with a warning that says why, where that does not fit."""

    @contextmanager
    def prepare() -> Iterator[Generate]:
        with ExitStack() as there:
            try:
                generate = there.enter_context(batched(loaded, plan, weights, at_once=at_once, cached=cached)())
            except (UsageError, PlanError) as error:
                if error.code not in _UNFIT:
                    raise
                warnings.warn(ShoalWarning(f"one request at a time: {error.args[0]}", code="U751"), stacklevel=2)
                generate = there.enter_context(under_plan(loaded, plan, weights)())
            yield generate

    return prepare


class _Writer:
    """The way of writing that the engine calls, from several threads."""

    def __init__(self, write: ContinuousWriter, at_once: int) -> None:
        self.write, self.at_once = write, at_once

    def __call__(self, request: GenerationRequest, on_tokens: OnTokens) -> GenerationCounts:
        try:
            self.write(request.ids, on_tokens, seed=request.seed, **settings(request))
        except EndedError as error:
            raise ClosedError(str(error)) from error
        return GenerationCounts()


def _try(writer: Generate, loaded: Loaded) -> None:
    """Raise U750 where a few tokens are not those that the model writes alone."""
    size = loaded.model.get_input_embeddings().num_embeddings
    request = GenerationRequest(tuple(one % size for one in range(3, 3 + PAGE + 2)), TRIED)
    with under_plan(loaded)() as alone:
        wanted = _written(alone, request)
    try:
        found = _written(writer, request)
    except ClosedError as error:
        raise _unfit(loaded, first_line(error)) from error
    if found != wanted:
        raise _unfit(loaded, f"it writes {found} where generate writes {wanted}")


def _written(write: Generate, request: GenerationRequest) -> list[int]:
    text: list[int] = []

    def keep(new: list[int]) -> bool:
        text.extend(new)
        return False

    write(request, keep)
    return text


def _unfit(loaded: Loaded, why: str) -> UsageError:
    return UsageError(
        f"transformers' continuous batching does not fit {loaded.source} ({why}); serve one request at a time with "
        "--max-num-seqs 1",
        code="U750",
    )
