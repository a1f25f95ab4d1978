"""Making a compressing cache: `NAME:key=value` and a live model to a KV cache for one batch of texts."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache

from shoal.compressing.job import cache_job
from shoal.compressing.row import refuse_crop
from shoal.errors import UsageError
from shoal.executing.slots import mark_rows, prepare_views
from shoal.spelling import chosen


class CompressingCache(DynamicCache):
    """A KV cache of transformers' own kind with rows that were made for one plan."""

    def __init__(self, rows: list[Any]) -> None:
        Cache.__init__(self, layers=rows)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused, before one of the rows is cut."""
        refuse_crop()


def make_cache(
    model: Any, text: str, mask: torch.Tensor | None = None, ids: torch.Tensor | None = None
) -> CompressingCache:
    """An empty cache for one batch of texts, to be given to the model, or to its `generate`, as `past_key_values`.

    `model`: a causal language model, with the plan on it (`shoal.running`) that will fill the cache. `text`: an entry
    of `shoal ls caches` with its options, as `minicache:start=16,keep=0.05`. `mask` [batch, tokens]: the attention mask
    of the prompt, where some of it is padding; `ids` [batch, tokens]: the prompt, for a cache that looks at it. The
    prefill is the first forward that is given the cache.

    Raises U501 and U502 for names and options that do not exist, U659 for values out of range, M322 for a model that
    continues no text, P161 where its rows cannot be compressed so, and under a policy or a draft.
    """
    entry, options = chosen("caches", text)
    job = cache_job(model, mask, ids)
    cache = CompressingCache(entry.load()(job, **options))
    mark_rows(cache, job.base_rows)
    prepare_views(CompressingCache)
    return cache


def cache_to_write(model: Any, text: str, ids: torch.Tensor) -> CompressingCache:
    """What `make_cache` makes, for a text that `generate` writes behind the prompt `ids` [1, tokens].

    Raises what `make_cache` raises, and U661 where the generation config asks for a cache of another kind: keys and
    values that are quantised, offloaded or of fixed length are held by one cache, not by two.
    """
    asked = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if asked not in (None, "dynamic"):
        raise UsageError(
            f"the generation config asks for the cache {asked!r}, and {text} is another one; take cache_implementation "
            "out of it, or leave --kv-cache out",
            code="U661",
        )
    return make_cache(model, text, ids=ids)
