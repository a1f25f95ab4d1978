"""Writes the GGUF file of a manifest: beside its place, read again tensor by tensor, and only then given its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.atomic import staged, sweep, sync_path
from shoal.errors import ModelError, WriteError
from shoal.evaluation import Progress
from shoal.models.gguf_source import open_source, plain
from shoal.record import environment
from shoal.writing.checks import Check
from shoal.writing.container import Tick
from shoal.writing.gguf_out.container import digest, write_file
from shoal.writing.gguf_out.copied import GgufManifest
from shoal.writing.output import disk_errors, final_path, require_space
from shoal.writing.proof import Proof

Forward = Callable[[Path], Check]


@dataclass(frozen=True)
class Written:
    """A finished GGUF file."""

    file: Path
    proof: Proof
    arch: str
    """llama.cpp's name of the architecture."""
    base_layers: tuple[int, ...]
    bytes: int
    """Of the whole file."""


def refuse_file(output: str | Path, source: Path | None = None, *, overwrite: bool = False) -> None:
    """Raise W220, W222, W224 or W225 when no GGUF file may or can be written to `output`, W221 when it is the base.
    What killed writes left beside it is removed."""
    final = final_path(output)
    if not final.parent.is_dir():
        raise WriteError(f"there is no folder {final.parent} to write {final.name} into; make it first", code="W222")
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise WriteError(f"no permission to write into {final.parent}; choose another output", code="W224")
    sweep(final)
    if not final.exists():
        return
    if source is not None and source.exists() and final.samefile(source):
        raise WriteError(f"the output {final} is the base itself; choose another output", code="W221")
    if not overwrite:
        raise WriteError(f"{final} exists; pass --overwrite to replace it, or choose another output", code="W220")
    if not (final.is_file() and _is_gguf(final)):
        raise WriteError(f"{final} is no GGUF file, so it is not overwritten; choose another output", code="W225")


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) in (b"GGUF", b"")


def publish_file(
    manifest: GgufManifest,
    output: str | Path,
    *,
    source: Path | None = None,
    overwrite: bool = False,
    forward: Forward | None = None,
    against: str,
    progress: Progress | None = None,
) -> Written:
    """Write, read again, and give the file its name in one step. `source`: the file that is read meanwhile. `forward`:
    one more check, of the written file. `against`: what the proof compares with, in words.

    Raises W220-W225 as `refuse_file`, W223, W226 for a full or failing disk, W227 written twice at once, W230 for a
    failed proof; nothing that was not there before is left under the output's name then.
    """
    final = final_path(output)
    refuse_file(final, source, overwrite=overwrite)
    require_space(final, manifest.bytes)
    with disk_errors(final), staged(final) as place:
        partial = place / final.name
        ticks = _ticks(progress, manifest.bytes)
        sums = write_file(partial, manifest.arch, manifest.pairs, manifest.items, ticks("write tensors"))
        proof = _proved(partial, manifest, sums, forward, against, ticks("compare tensors"))
        size = partial.stat().st_size
        sync_path(partial)
        if final.exists() and not overwrite:
            raise WriteError(f"{final} exists now; pass --overwrite to replace it", code="W220")
        partial.replace(final)
        sync_path(final.parent)
    return Written(final, proof, manifest.arch, manifest.base_layers, size)


def _ticks(progress: Progress | None, total: int) -> Callable[[str], Tick]:
    def stage(name: str) -> Tick:
        done = 0

        def tick(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done // 1_000_000, max(1, total // 1_000_000), f"{name} (MB)")

        return tick

    return stage


def _proved(
    file: Path, manifest: GgufManifest, sums: Mapping[str, str], forward: Forward | None, against: str, tick: Tick
) -> Proof:
    try:
        checks = tuple(_checks(file, manifest, sums, tick))
    except (ModelError, WriteError) as error:
        checks = (Check("loads", False, str(error)[:300], "no error", "the written file, read by gguf.GGUFReader"),)
    if forward is not None and all(check.passed for check in checks):
        checks = (*checks, forward(file))
    proof = Proof(all(check.passed for check in checks), checks, environment(), against)
    if not proof.passed:
        raise WriteError(
            f"the written file failed its proof, so it was removed: {proof.failures[0]}; see that nothing else writes "
            "to the base or to the disk, then write it again",
            code="W230",
        )
    return proof


def _checks(file: Path, manifest: GgufManifest, sums: Mapping[str, str], tick: Tick) -> Iterator[Check]:
    """What is on the disk against what the manifest says."""
    depth = len(manifest.base_layers)
    found = open_source(file)
    yield Check("layers", found.depth == depth, found.depth, depth, "block_count, and tensors of as many layers")
    there = {key: plain(field) for key, field in found.fields.items() if not key.startswith("GGUF.")}
    wrong = sorted(key for key, value in there.items() if manifest.pairs.get(key, value) != value)
    missing = sorted(k for k, v in manifest.pairs.items() if k not in there and v[0] not in ([], b""))
    yield Check("keys", not wrong + missing, len(wrong + missing), 0, f"keys of another value {(wrong + missing)[:3]}")
    tensors = {tensor.name: tensor for tensor in found.tensors}
    stray = sorted(tensors.keys() ^ sums.keys())
    yield Check("tensors", not stray, len(stray), 0, f"tensors missing or too many {stray[:3]}")
    bad = []
    for item in manifest.items:
        tensor = tensors.get(item.name)
        shape = None if tensor is None else tuple(reversed(tensor.shape.tolist()))
        same = tensor is not None and (tensor.tensor_type, shape) == (item.kind, item.shape)
        if tensor is None or not same or digest(tensor.data) != sums[item.name]:
            bad.append(item.name)
        tick(item.bytes)
    yield Check("weights", not bad, len(bad), 0, f"tensors whose type, shape or SHA-256 is another {bad[:3]}")
