"""A plan applied from safetensors files to safetensors files: no weight is loaded, so any size fits any machine.

The model is built on the meta device, where it says what each tensor is; then bytes are copied from file to file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from shoal.atomic import publish, staged, sync_path
from shoal.errors import WriteError
from shoal.evaluation import Progress
from shoal.models.kinds import auto_for
from shoal.models.load import load, load_tokenizer
from shoal.plan import Plan, plan_to_json
from shoal.record import environment
from shoal.writing.card import model_card, origin
from shoal.writing.container import Tick, parse_size, write_shards
from shoal.writing.draft import Draft, draw
from shoal.writing.lineage import record_lines
from shoal.writing.place import (
    disk_errors,
    final_path,
    refuse_output,
    require_apart,
    require_space,
    savable,
    write_text,
)
from shoal.writing.proof import FILE, Proof, prove
from shoal.writing.reference import quiet
from shoal.writing.sides import copy_modules, copy_side_files
from shoal.writing.twins import Twins, compared


@dataclass(frozen=True)
class Streamed:
    """A finished folder."""

    folder: Path
    proof: Proof
    changed: dict[str, tuple[Any, Any]]
    """Config fields, (old, new)."""
    params: int
    """By unique storage."""
    bytes: int
    """Of the tensors."""
    files: int
    """Safetensors files."""


def stream(
    source: str | Path,
    plan: Plan,
    output: str | Path,
    *,
    zero_parts: bool = False,
    overwrite: bool = False,
    shard_size: str = "5GB",
    forward: bool = False,
    records: Iterable[Mapping[str, Any]] = (),
    card: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
    config: str | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Write the stock model of `plan` from the files of the local folder `source`, with dtype and bytes of every tensor
    kept, and compare both folders byte by byte before the new one gets its name.

    `forward`: afterwards load both and prove the new one as `write` does; needs twice the base's weights in memory.
    Other options as in `write`. Raises before a byte is written `ModelError` M3xx for a folder that is no sound
    checkpoint, `PlanError`, `UsageError` U524 shard size, `WriteError` W201-W210 of `blueprint`, W212 quantised, W217
    a tensor that cannot be attributed, W218 one of another size, W219 too little memory for `forward`, W220-W225 as in
    `write`; later W216, W223, W226, W227, W230 and W231. Nothing that was not there before is left then.
    """
    parse_size(shard_size)  # before anything is read
    with quiet():
        draft = draw(source, plan, zero_parts=zero_parts)
    return write_draft(
        draft, str(source), output, overwrite=overwrite, shard_size=shard_size, forward=forward, records=records,
        card=card, command=command, config=config, progress=progress,
    )  # fmt: skip


def write_draft(
    draft: Draft,
    source: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    shard_size: str = "5GB",
    forward: bool = False,
    records: Iterable[Mapping[str, Any]] = (),
    card: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
    config: str | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Write, prove and publish what `draft` says; `source` is the base's name. Options and errors as in `stream`."""
    limit = parse_size(shard_size)
    final = final_path(output)
    require_apart(final, [draft.folder, Path(source).expanduser()])
    refuse_output(final, overwrite=overwrite)
    require_space(final, draft.bytes)
    if forward:
        _require_memory(draft)
    lines = record_lines(draft.folder, records)
    with disk_errors(final), staged(final) as place:
        _configs(place, draft)
        twins = Twins()
        with _syncing() as settle:
            ticks = _ticks(progress, draft.bytes, "copy and compare tensors")
            files = write_shards(place, draft.items, limit, ticks, copied=twins.add, settle=settle)
            proof = _proved(place, draft, twins, forward)
        write_text(place / "shoal" / "records.jsonl", "".join(f"{line}\n" for line in lines))
        if config is not None:
            write_text(place / "shoal" / "config.yaml", config)
        write_text(place / FILE, json.dumps(proof.to_dict(), indent=1) + "\n")
        text = model_card(
            draft.plan,
            origin(source, draft.folder),
            title=final.name,
            base_layers=draft.note.get("base_layers", draft.plans.slots),
            chain=draft.note.get("chain", ()),
            auto=auto_for(draft.plans.config),
            rows=card or _rows(draft),
            changed=draft.plans.changed,
            command=command,
            proof=proof,
        )
        write_text(place / "README.md", text)
        publish(place, final, overwrite=overwrite)
    return Streamed(final, proof, draft.plans.changed, draft.params, draft.bytes, len(files))


def _ticks(progress: Progress | None, total: int, stage: str) -> Tick:
    """From bytes to `progress` in MB."""
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done // 1_000_000, max(1, total // 1_000_000), f"{stage} (MB)")

    return tick


@contextmanager
def _syncing() -> Iterator[Callable[[Path], None]]:
    """What brings a file to the disk while others are copied and compared; otherwise the disk would idle then, and
    everything wait for it at the end. Raises the `OSError` of a file that did not reach it."""
    running: list[Future[None]] = []
    with ThreadPoolExecutor(1) as thread:
        try:
            yield lambda file: running.append(thread.submit(sync_path, file))
        except BaseException:
            thread.shutdown(cancel_futures=True)
            raise
    for future in running:
        future.result()


def _configs(place: Path, draft: Draft) -> None:
    """Config, generation config, tokenizer, side files and plan."""
    (place / "shoal").mkdir()
    made = draft.plans.config
    if draft.note:
        made.shoal = draft.note
    with quiet(), savable():
        made.save_pretrained(place)
        with suppress(OSError):  # a model without one gets none, as when it is loaded
            GenerationConfig.from_pretrained(draft.folder).save_pretrained(place)
        tokenizer = load_tokenizer(draft.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
    copy_side_files(draft.folder, place)
    copy_modules(draft.folder, place)
    write_text(place / "shoal" / "plan.json", plan_to_json(draft.plan))


def _proved(place: Path, draft: Draft, twins: Twins, forward: bool) -> Proof:
    with quiet():
        checks = compared(place, draft.items, draft.plans, draft.params, twins)
    facts = environment()
    proof = Proof(all(check.passed for check in checks), checks, facts, against="the tensors of its base, byte by byte")
    if proof.passed and forward:
        with quiet():
            base = load(str(draft.folder), device="cpu")
            live = prove(place, base.model, draft.plan, tokenizer=base.tokenizer, plans=draft.plans)
        proof = Proof(live.passed, (*checks, *live.checks), live.environment | facts, live.against)
    if not proof.passed:
        raise WriteError(
            f"the written folder failed its proof, so it was removed: {proof.failures[0]}; "
            "see that nothing else writes to the base or to the disk, then write it again",
            code="W230",
        )
    return proof


def _rows(draft: Draft) -> list[dict[str, Any]]:
    """What the card can say without running anything."""
    depth = draft.spec.stack().depth
    return [
        {"name": "parameters", "dense": draft.spec.params, "pruned": draft.params, "how": "by unique storage"},
        {"name": "layers", "dense": depth, "pruned": len(draft.plans.slots), "how": "counted"},
    ]


def _require_memory(draft: Draft) -> None:
    free, needed = _free_memory(), 2 * sum({item.source: item.source.size for item in draft.items}.values())
    if free is not None and needed > free:
        raise WriteError(
            f"the forward check needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; leave it out",
            code="W219",
        )


def _free_memory() -> int | None:
    """Bytes that a process can still take; None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
