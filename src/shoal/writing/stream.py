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
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig

from shoal.atomic import publish, staged, sync_path
from shoal.errors import WriteError, first_line
from shoal.evaluation import Progress
from shoal.executing.weights import Tensors, save_weights
from shoal.models.kinds import auto_for
from shoal.models.load import load, load_tokenizer
from shoal.models.own_code import copy_own_code
from shoal.plan import Given, plan_to_json
from shoal.record import environment
from shoal.writing.card import model_card, origin
from shoal.writing.container import Tick, parse_size, write_shards
from shoal.writing.copy_check import CopyCheck, copy_checks
from shoal.writing.lineage import record_lines
from shoal.writing.manifest import Manifest, manifest_of
from shoal.writing.output import (
    disk_errors,
    final_path,
    refuse_output,
    require_apart,
    require_space,
    savable,
    write_text,
)
from shoal.writing.papers import generation_for, settle_papers
from shoal.writing.proof import FILE, Proof, prove
from shoal.writing.reference import quiet
from shoal.writing.side_files import copy_modules, copy_side_files

_GENERATION = "generation_config.json"


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
    left_out: tuple[str, ...] = ()
    """The base's tensors that are no part of its model."""
    zeroed: tuple[str, ...] = ()
    """The halves that are layers of their own, as `2a`: the other part of each is zeroed."""


def stream(
    source: str | Path,
    plan: Given,
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
    trust_remote_code: bool = False,
    weights: Tensors | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Write the stock model of `plan` from the files of the local folder `source`, with dtype and bytes of every tensor
    kept, and compare both folders byte by byte before the new one gets its name.

    `weights`: the tensors that the plan names (default: those beside a plan.json that is given).
    `forward`: afterwards load both and prove the new one as `write` does; needs twice the base's weights in memory.
    Other options as in `write`. Raises before a byte is written `ModelError` M3xx for a folder that is no sound
    checkpoint, `PlanError`, `UsageError` U524 shard size, `WriteError` W201-W210 and W283 of `blueprint`, W212
    quantised, W217 a tensor that cannot be attributed, W218 one of another size, W219 too little memory for `forward`,
    W281 a tensor of the plan's own in whose place the files hold no single one, W220-W225 as in `write`; later W216,
    W223, W226, W227, W230 and W231. Nothing that was not there before is left then.
    """
    parse_size(shard_size)  # before anything is read
    with TemporaryDirectory(prefix="shoal-") as aside:
        with quiet():
            manifest = manifest_of(
                source, plan, zero_parts=zero_parts, trust_remote_code=trust_remote_code, weights=weights,
                aside=Path(aside),
            )  # fmt: skip
        return write_draft(
            manifest, str(source), output, overwrite=overwrite, shard_size=shard_size, forward=forward,
            records=records, card=card, command=command, config=config, progress=progress,
        )  # fmt: skip


def write_draft(
    manifest: Manifest,
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
    """Write, prove and publish what `manifest` says; `source` is the base's name. Options and errors as in `stream`."""
    limit = parse_size(shard_size)
    final = final_path(output)
    require_apart(final, [manifest.folder, Path(source).expanduser()])
    refuse_output(final, overwrite=overwrite)
    require_space(final, manifest.bytes)
    if forward:
        _require_memory(manifest)
    lines = record_lines(manifest.folder, records)
    with disk_errors(final), staged(final) as staging:
        _configs(staging, manifest)
        copies = CopyCheck()
        with _syncing() as settle:
            ticks = _ticks(progress, manifest.bytes, "copy and compare tensors")
            files = write_shards(staging, manifest.items, limit, ticks, copied=copies.add, settle=settle)
            proof = _proved(staging, manifest, copies, forward)
        write_text(staging / "shoal" / "records.jsonl", "".join(f"{line}\n" for line in lines))
        if config is not None:
            write_text(staging / "shoal" / "config.yaml", config)
        write_text(staging / FILE, json.dumps(proof.to_dict(), indent=1) + "\n")
        text = model_card(
            manifest.plan,
            origin(source, manifest.folder),
            title=final.name,
            base_layers=manifest.note.get("base_layers", manifest.plans.slots),
            chain=manifest.note.get("chain", ()),
            auto=auto_for(manifest.plans.config),
            rows=card or _rows(manifest),
            changed=manifest.plans.changed,
            left_out=manifest.left_out,
            command=command,
            proof=proof,
        )
        write_text(staging / "README.md", text)
        publish(staging, final, overwrite=overwrite)
    plans = manifest.plans
    return Streamed(
        final, proof, plans.changed, manifest.params, manifest.bytes, len(files), manifest.left_out, plans.halves
    )


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


def _configs(staging: Path, manifest: Manifest) -> None:
    """Config, generation config, tokenizer, side files and plan."""
    (staging / "shoal").mkdir()
    made = manifest.plans.config
    if manifest.note:
        made.shoal = manifest.note
    with quiet(), savable():
        made.save_pretrained(staging)
        if (manifest.folder / _GENERATION).is_file():  # a model without one gets none, as when it is loaded
            generation_for(_generation_config(manifest.folder), manifest.places).save_pretrained(staging)
        tokenizer = load_tokenizer(manifest.folder, trust_remote_code=manifest.trusted)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    copy_side_files(manifest.folder, staging)
    copy_modules(manifest.folder, staging)
    if manifest.trusted:
        copy_own_code(manifest.folder, staging)
    settle_papers(staging, manifest.places)
    digest = save_weights(staging / "shoal", manifest.plan, manifest.weights) if manifest.weights else None
    write_text(staging / "shoal" / "plan.json", plan_to_json(manifest.plan, weights=digest))


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # its own checks of its fields, and of its syntax
        raise WriteError(
            f"{folder / _GENERATION} cannot be read: {first_line(error)}; mend it, or remove it", code="W270"
        ) from None


def _proved(staging: Path, manifest: Manifest, copies: CopyCheck, forward: bool) -> Proof:
    with quiet():
        wanted = manifest.params
        checks = copy_checks(
            staging, manifest.items, manifest.plans, wanted, copies, trust_remote_code=manifest.trusted
        )
    facts = environment()
    proof = Proof(all(check.passed for check in checks), checks, facts, against="the tensors of its base, byte by byte")
    if proof.passed and forward:
        with quiet():
            base = load(str(manifest.folder), device="cpu", trust_remote_code=manifest.trusted)
            live = prove(
                staging, base.model, manifest.plan, tokenizer=base.tokenizer, plans=manifest.plans,
                weights=manifest.weights,
            )  # fmt: skip
        proof = Proof(live.passed, (*checks, *live.checks), live.environment | facts, live.against)
    if not proof.passed:
        raise WriteError(
            f"the written folder failed its proof, so it was removed: {proof.failures[0]}; "
            "see that nothing else writes to the base or to the disk, then write it again",
            code="W230",
        )
    return proof


def _rows(manifest: Manifest) -> list[dict[str, Any]]:
    """What the card can say without running anything."""
    depth = manifest.spec.stack().depth
    return [
        {"name": "parameters", "dense": manifest.spec.params, "pruned": manifest.params, "how": "by unique storage"},
        {"name": "layers", "dense": depth, "pruned": len(manifest.plans.slots), "how": "counted"},
    ]


def _require_memory(manifest: Manifest) -> None:
    free, needed = _free_memory(), 2 * sum({item.source: item.source.size for item in manifest.items}.values())
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
