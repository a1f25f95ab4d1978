"""Many requests at once: transformers' continuous batching, under a plan or not.

Its manager packs the tokens of all requests into one forward over a paged KV cache. A request is one call of a function
that waits for its tokens; the manager's thread computes, one more thread hands each token to the call that it is for.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.stopping_criteria import StopStringCriteria

from shoal.decoding.listening import OnTokens
from shoal.errors import PlanError, ShoalWarning, UsageError, first_line
from shoal.executing.weights import Tensors
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.serve.engine import ClosedError
from shoal.serve.generating import Generate, GenerationCounts, GenerationRequest, Prepare, under_plan
from shoal.serve.sampling import RequestSampling

PAGE = 16
"""Tokens of a page of the KV cache."""
STEP = 512
"""Tokens that are read in one forward at most; longer prompts take several."""
TRIED = 4
"""Tokens that are written both ways before the first request."""
_UNFIT = ("U750", "P140", "P141", "P162", "P163")
"""Codes of what has no pages."""
_WAIT = 0.2
"""Seconds after which a call that has heard of no token looks whether its client has left."""


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

    `cached`: tokens, prompts and answers together, whose keys and values there is room for; a request that finds none
    waits, or is read again later. A request with a seed has the tokens that it has alone, as far as rounding in a batch
    of another size allows. Entering it raises what `under_plan` raises, P140 to P163 for plans that have no pages, and
    U750 for a model that continuous batching does not fit: a few tokens are written both ways before the first request.
    """

    @contextmanager
    def prepare() -> Iterator[Generate]:
        with ExitStack() as there:
            base = Plan.identity(loaded.opened.spec) if plan is None else plan
            handle = there.enter_context(running(loaded.model, base, weights))
            there.enter_context(evaluating(loaded.model))
            sampling = RequestSampling(loaded.model)
            try:
                manager = _manager(loaded.model, sampling, at_once, cached)
                handle.bound.paged.sized(loaded.model, manager)
                there.callback(manager.destroy)
                manager.start()
                writer = _Writer(manager, sampling, loaded, at_once)
                there.callback(writer.close)
                with _silent():
                    _try(writer, loaded)
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, ClosedError) as error:
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


def _manager(model: Any, sampling: RequestSampling, at_once: int, cached: int) -> ContinuousBatchingManager:
    """One whose tokens are drawn request by request. It changes the attention's implementation where it must, until it
    is destroyed."""
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=math.ceil(cached / PAGE),
        max_batch_tokens=STEP,
        max_requests_per_batch=at_once,
        max_memory_percent=0.9,
        use_cuda_graph=(False, False),  # a plan decides in Python, and requests draw from generators of their own
        use_async_batching=False,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = ContinuousBatchingManager(model, greedy, config)
    manager.logit_processor = sampling
    return manager


class _Writer:
    """The function that writes for one request; called by several threads."""

    def __init__(
        self, manager: ContinuousBatchingManager, sampling: RequestSampling, loaded: Loaded, at_once: int
    ) -> None:
        self.at_once = at_once
        self._manager, self._sampling, self._loaded = manager, sampling, loaded
        self._numbers = itertools.count()
        self._inboxes: dict[str, queue.SimpleQueue[Any]] = {}
        self._open = True
        self._thread = threading.Thread(target=self._hand_on, name="shoal-tokens", daemon=True)
        self._thread.start()

    def __call__(self, request: GenerationRequest, on_tokens: OnTokens) -> GenerationCounts:
        name, inbox = f"request-{next(self._numbers)}", queue.SimpleQueue[Any]()
        settings = self._sampling.begin(name, request)
        self._inboxes[name] = inbox
        ended = _StopStrings(settings.stop_strings, self._loaded.tokenizer)
        written: list[int] = []
        try:
            self._ask(name, request, settings.eos_token_id)
            while True:
                heard = self._hear(inbox)
                new = [] if heard is None else heard.generated_tokens[len(written) :]
                written += new
                if on_tokens(new) or (new and ended(request.ids, written)):
                    break
                if heard is not None and heard.is_finished():
                    if heard.error is not None:
                        raise RuntimeError(heard.error)
                    break
        finally:
            self._manager.cancel_request(name)  # of one that has ended nothing is left to cancel
            del self._inboxes[name]
            self._sampling.end(name)
        return GenerationCounts()

    def close(self) -> None:
        """No call is heard any more."""
        self._open = False
        self._thread.join()

    def _ask(self, name: str, request: GenerationRequest, eos: int | list[int] | None) -> None:
        asked = self._manager.add_request(
            list(request.ids), request_id=name, max_new_tokens=request.max_new_tokens, streaming=True, eos_token_id=eos
        )
        if asked is None:
            raise ClosedError("continuous batching has ended")

    def _hear(self, inbox: queue.SimpleQueue[Any]) -> Any:
        """What became of a request; None when nothing did for a while."""
        try:
            return inbox.get(timeout=_WAIT)
        except queue.Empty:
            if not self._manager.is_running():
                raise ClosedError("continuous batching has ended") from None
            return None

    def _hand_on(self) -> None:
        while self._open:
            heard = self._manager.get_result(timeout=_WAIT)
            if heard is not None and (inbox := self._inboxes.get(heard.request_id)) is not None:
                inbox.put(heard)
            elif heard is None and not self._manager.is_running():
                threading.Event().wait(_WAIT)


class _StopStrings:
    """Whether a text has come to one of the strings at which the model's own generation config ends it."""

    def __init__(self, strings: str | list[str] | None, tokenizer: Any) -> None:
        self._criterion = StopStringCriteria(tokenizer, strings) if strings else None

    def __call__(self, prompt: tuple[int, ...], written: list[int]) -> bool:
        if self._criterion is None:
            return False
        return bool(self._criterion(torch.tensor([[*prompt, *written]]), None)[0])


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing is logged of a trial that fails."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _try(writer: _Writer, loaded: Loaded) -> None:
    """Raise U750 where a few tokens are not those that the model writes alone."""
    size = loaded.model.get_input_embeddings().num_embeddings
    ids = tuple(one % size for one in range(3, 3 + PAGE + 2))
    with under_plan(loaded)() as alone:
        texts = [_written(write, GenerationRequest(ids, TRIED)) for write in (alone, writer)]
    if texts[0] != texts[1]:
        raise _unfit(loaded, f"it writes {texts[1]} where generate writes {texts[0]}")


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
