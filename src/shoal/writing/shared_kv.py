"""Runs that read the KV of an earlier layer, where the family's own class has them, by a field of its config."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from shoal.models.families import family_of
from shoal.models.opened import open_model
from shoal.models.stacks import Stack
from shoal.plan.steps import Step, key_source, runs

Readers = tuple[tuple[int, int], ...]
"""(slot, base layer whose keys and values it reads)."""


def native_readers(model: PreTrainedModel, stack: Stack, steps: tuple[Step, ...]) -> Readers:
    """The last slots, where each reads the KV of the last slot of its kind that stores its own, and the config of the
    family can say so; none where a plan reads otherwise, or no more than the base does."""
    if getattr(stack.config, family_of(stack.config).shares_kv or "", None) is None:
        return ()
    layers = open_model(model).spec.stack(stack.name).layers
    found = list(runs(steps))
    asked = [key_source(run) for run in found]
    sources = [
        next(iter(layers[run.layer].needs), None) if read is None else read
        for run, read in zip(found, asked, strict=True)
    ]
    first = next((slot for slot, source in enumerate(sources) if source is not None), len(found))
    owners = {layers[run.layer].kind: run.layer for run in found[:first]}
    readers = tuple(
        (slot, source)
        for slot, source in enumerate(sources)
        if source is not None and source == owners.get(layers[found[slot].layer].kind)
    )
    whole = all(run.part == "layer" for run in found)
    more = any(read is not None for read in asked)
    return readers if more and whole and len(readers) == len(found) - first else ()


def with_readers(config: PreTrainedConfig, stack: Stack, readers: Readers) -> dict[str, tuple[int, int]]:
    """Let `config`, that of the stack in its new depth, say that so many layers read; {field: (old, new)}."""
    field = family_of(stack.config).shares_kv
    if field is None or not readers:
        return {}
    setattr(config, field, len(readers))
    return {field: (getattr(stack.config, field), len(readers))}
