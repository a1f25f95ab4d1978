"""A sound copy of a broken folder: layers renumbered, config mended, tensors copied file to file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.core_model_loading import dot_natural_key

from shoal.errors import ModelError, WriteError
from shoal.evaluation import Progress
from shoal.models.diagnosis import CheckpointMetadata, Diagnosis, diagnose, read_metadata
from shoal.models.load import structure
from shoal.models.opened import open_model
from shoal.models.own_code import own_code_known
from shoal.models.stacks import find_stacks
from shoal.plan import Plan, Run
from shoal.writing.blueprint import Blueprint
from shoal.writing.container import Item
from shoal.writing.copy_check import same_bytes
from shoal.writing.lineage import config_note, lineage_of
from shoal.writing.manifest import Manifest
from shoal.writing.reference import quiet
from shoal.writing.stream import Streamed, write_draft

TIE = "tie_word_embeddings"


def repair(
    source: str | Path,
    output: str | Path,
    *,
    kept: Sequence[int] | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
    records: Iterable[Mapping[str, Any]] = (),
    command: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Streamed:
    """Write a sound copy of the local folder `source`, every tensor that stays byte for byte, and prove it byte by
    byte as `stream` does.

    `kept`: which layers of its base the folder holds, in the order of its files, where it does not tell. Raises before
    a byte is written W250 when something cannot be mended, W251 when nothing is wrong, W252 for a
    model of several stacks, `ModelError` M317 for a hub id
    and what `diagnose` raises; further what `stream` raises.
    """
    metadata = read_metadata(source)
    if metadata.folder is None:
        raise ModelError(f"{source} is a hub id, not a local folder; download it and give its folder", code="M317")
    with quiet(), own_code_known(str(source), metadata.folder, metadata.config, trust=trust_remote_code):
        found = diagnose(metadata, kept)
        if not found.findings and not found.carried:
            raise WriteError(f"nothing is wrong with {source}, so there is nothing to repair; use it", code="W251")
        refuse_unrepairable(metadata, found)
        assert found.config is not None
        if len(find_stacks(structure(found.config, source))) > 1:
            raise WriteError(f"{source} has several stacks, which repair cannot write; copy it again", code="W252")
        manifest = replace(_manifest(metadata, found), trusted=trust_remote_code)
    return write_draft(
        manifest, str(source), output, overwrite=overwrite, shard_size=shard_size, records=records, command=command,
        progress=progress,
    )  # fmt: skip


def refuse_unrepairable(metadata: CheckpointMetadata, found: Diagnosis) -> None:
    """Raise W250 for the first finding that cannot be mended."""
    if found.unrepairable:
        first = found.unrepairable[0]
        per_layer = first.what in found.changed
        remedy = (
            'say which layers of its base it holds, as in --kept "0-5,8-11"'
            if per_layer
            else "copy the folder again from where it came"
        )
        raise WriteError(f"{metadata.source} cannot be repaired: {first}; {remedy}", code="W250")


def _manifest(metadata: CheckpointMetadata, found: Diagnosis) -> Manifest:
    assert metadata.folder is not None
    assert found.config is not None
    config, names = _settled(metadata, found)
    base, kept = (found.base, found.kept) if found.kept is not None else (config, None)
    assert base is not None
    _tie(base, getattr(config, TIE, None))
    spec = open_model(structure(base, metadata.source)).spec
    plan = Plan.identity(spec)
    if kept is not None:
        plan = plan.with_steps(tuple(Run(layer) for layer in kept))
    plans = Blueprint(plan, kept or tuple(range(plan.depth())), (), config, found.changed)
    note = config_note(base, plan, plans) if kept is not None or lineage_of(base) is not None else {}
    items = [Item(new, metadata.places[old]) for new, old in names.items()]
    ordered = tuple(sorted(items, key=lambda item: dot_natural_key(item.name)))
    return Manifest(metadata.folder, plan, replace(plans, plan=plan), spec, ordered, note)


def _settled(metadata: CheckpointMetadata, found: Diagnosis) -> tuple[PreTrainedConfig, dict[str, str]]:
    """The config and the names when the bytes have decided whether tied tensors that are both there are one."""
    assert found.config is not None
    names = dict(found.names)
    for target, origin in found.doubtful:
        if same_bytes(metadata.places[target], metadata.places[origin]):
            names.pop(target, None)
        else:
            _tie(found.config, False)
    return found.config, names


def _tie(config: PreTrainedConfig, tied: bool | None) -> None:
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if tied is not None and hasattr(part, TIE):
            setattr(part, TIE, tied)
