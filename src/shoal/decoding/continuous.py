"""Transformers' continuous batching: the texts of many requests, each as `generate` writes it alone.

Its manager packs the tokens of all requests into one forward over a paged KV cache. A request is one call that waits
for its tokens; the manager's thread computes, one more thread hands each token to the call that it is for.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.stopping_criteria import StopStringCriteria

from shoal.decoding.listening import OnTokens
from shoal.decoding.request_sampling import RequestSampling

PAGE = 16
"""Tokens of a page of the KV cache."""
STEP = 512
"""Tokens that are read in one forward at most; longer prompts take several."""
WAIT = 0.2
"""Seconds after which a call that has heard of no token looks whether anybody still waits for it."""


class EndedError(RuntimeError):
    """Nothing is written any more, whoever asks: a forward failed, or the manager was stopped."""


@contextmanager
def continuous(
    model: Any, tokenizer: Any, sized: Callable[[Any, Any], None], *, at_once: int, cached: int
) -> Iterator[ContinuousWriter]:
    """What writes for up to `at_once` requests in each forward, until the end of the block.

    `sized` is called with the model and the manager before its KV cache is made, as `PagedGuard.sized`. `cached`:
    tokens, prompts and answers together, whose keys and values there is room for; a request that finds none waits, or
    is read again later. Whatever the model and transformers raise where the two do not go together is raised here or by
    the first request.
    """
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=math.ceil(cached / PAGE),
        max_batch_tokens=STEP,
        max_requests_per_batch=at_once,
        max_memory_percent=0.9,
        use_cuda_graph=(False, False),  # a plan decides in Python, and requests draw from generators of their own
        use_async_batching=False,
    )
    sampling = RequestSampling(model)
    manager = ContinuousBatchingManager(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
    try:
        manager.logit_processor = sampling
        sized(model, manager)
        manager.start()
        writer = ContinuousWriter(manager, sampling, tokenizer)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        manager.destroy()  # the attention's implementation is the model's own again


class ContinuousWriter:
    """Writes for one request; several threads may call it at the same time."""

    def __init__(self, manager: ContinuousBatchingManager, sampling: RequestSampling, tokenizer: Any) -> None:
        self.manager, self.sampling, self._tokenizer = manager, sampling, tokenizer
        self._numbers = itertools.count()
        self.inboxes: dict[str, queue.SimpleQueue[Any]] = {}
        """Of the requests that are being written, what is heard of each."""
        self._open = True
        self._thread = threading.Thread(target=self._hand_on, name="shoal-tokens", daemon=True)
        self._thread.start()

    def __call__(self, ids: tuple[int, ...], on_tokens: OnTokens, *, seed: int | None, **settings: Any) -> None:
        """Hand over each new token behind the prompt `ids` at once, until the text ends or `on_tokens` says so.

        `settings`: those of `generate`, `max_new_tokens` among them; `seed`: of a request that draws; None draws one.
        Raises `EndedError`, and `RuntimeError` for a request that failed.
        """
        name, inbox = f"request-{next(self._numbers)}", queue.SimpleQueue[Any]()
        config = self.sampling.begin(name, ids, seed, settings)
        self.inboxes[name] = inbox
        ended = _StopStrings(config.stop_strings, self._tokenizer)
        written: list[int] = []
        try:
            self._ask(name, ids, config)
            while True:
                heard = self._hear(inbox)
                new = [] if heard is None else heard.generated_tokens[len(written) :]
                written += new
                if on_tokens(new) or (new and ended(ids, written)):
                    break
                if heard is not None and heard.is_finished():
                    if heard.error is not None:
                        raise RuntimeError(heard.error)
                    break
        finally:
            self.manager.cancel_request(name)  # of one that has ended nothing is left to cancel
            del self.inboxes[name]
            self.sampling.end(name)

    def close(self) -> None:
        """No call is heard any more."""
        self._open = False
        self._thread.join()

    def _ask(self, name: str, ids: tuple[int, ...], config: GenerationConfig) -> None:
        asked = self.manager.add_request(
            list(ids), request_id=name, max_new_tokens=config.max_new_tokens, streaming=True,
            eos_token_id=config.eos_token_id,
        )  # fmt: skip
        if asked is None:
            raise EndedError("continuous batching has ended")

    def _hear(self, inbox: queue.SimpleQueue[Any]) -> Any:
        """What became of a request; None when nothing did for a while."""
        try:
            return inbox.get(timeout=WAIT)
        except queue.Empty:
            if not self.manager.is_running():
                raise EndedError("continuous batching has ended") from None
            return None

    def _hand_on(self) -> None:
        pause = threading.Event()
        while self._open:
            heard = self.manager.get_result(timeout=WAIT)
            if heard is not None and (inbox := self.inboxes.get(heard.request_id)) is not None:
                inbox.put(heard)
            elif heard is None and not self.manager.is_running():
                pause.wait(WAIT)


class _StopStrings:
    """Whether a text has come to one of the strings at which the model's own generation config ends it."""

    def __init__(self, strings: str | list[str] | None, tokenizer: Any) -> None:
        self._criterion = StopStringCriteria(tokenizer, strings) if strings else None

    def __call__(self, prompt: tuple[int, ...], written: list[int]) -> bool:
        if self._criterion is None:
            return False
        return bool(self._criterion(torch.tensor([[*prompt, *written]]), None)[0])


@contextmanager
def silent() -> Iterator[None]:
    """Continuous batching logs nothing: of a trial that may fail."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
