"""What of a folder may leave this machine: a folder that Shoal wrote, whole, proved, and without what is nobody's
business."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ModelError, UsageError, WriteError
from shoal.executing.weights import FILE as PLAN_WEIGHTS
from shoal.executing.weights import hash_of
from shoal.models.adapter import CONFIG as ADAPTER
from shoal.models.adapter import WEIGHTS as ADAPTER_WEIGHTS
from shoal.models.adapter import adapter_config
from shoal.models.checked_source import check_source
from shoal.models.checkpoint import read_header, read_json
from shoal.models.gguf_source import open_source
from shoal.models.shards import check_folder
from shoal.plan import load_plan, weights_hash
from shoal.plan.file import is_planned
from shoal.writing.left_out import listed
from shoal.writing.proof import FILE as PROOF
from shoal.writing.sent_files import Sent, base_of, sent

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
LEFTOVERS = (".tmp", ".partial", ".old", ".lock", ".incomplete", ".part", "~")


@dataclass(frozen=True, slots=True)
class Sendable:
    """A folder that may be sent."""

    folder: Path
    kind: str
    """stock checkpoint, planned checkpoint, adapter, GGUF, plan or comparison."""
    files: tuple[Sent, ...]
    proof: str
    """passed, failed, missing, or none where a folder of this kind has none."""
    left_out: tuple[str, ...]
    """Hidden files and folders of the system's and of editors, which stay here."""
    newer: tuple[str, ...] = ()
    """Files with weights that were written after the proof."""

    @property
    def bytes(self) -> int:
        """That are sent."""
        return sum(file.size for file in self.files)


def sendable(folder: str | Path, repo: str, *, base: str | None = None, unproved: bool = False) -> Sendable:
    """What `shoal push` sends of `folder` to `repo`, from names, headers and Shoal's own records; no weight is loaded.

    In Shoal's records, in the plan and in an adapter's config the folder's own path becomes `repo`, that of the base
    the Hub id `base` (default: the one that the card names, else the last part of its path), and other paths their last
    part. `unproved`: also a checkpoint whose proof is missing or did not pass.

    Raises `WriteError` W310 for what is no folder that Shoal wrote, W311 for a pickle, W312 for a link that leads out
    of it, W313 for a path of this machine in the card or a config, W314 for what a killed process left, W315 without a
    proof, W316 for a failed one, and what reading the folder's config, headers and plan raises.
    """
    place = _folder_of(folder)
    names, left_out = _names(place)
    kind = _kind(place, names)
    _require_whole(place, kind, names)
    proof = _proof(place, kind, unproved=unproved)
    of = base_of(place, base)
    files = tuple(sent(place, name, repo, of) for name in names)
    return Sendable(place, kind, files, proof, left_out, tuple(_newer(place, names)))


def _folder_of(folder: str | Path) -> Path:
    place = Path(folder).expanduser()
    if place.is_file():
        raise WriteError(f"{folder} is a file; give the folder in which it lies", code="W310")
    if not place.is_dir():
        raise WriteError(f"there is no folder {folder}; give one that shoal wrote", code="W310")
    return place.resolve()


def _names(place: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files to be sent and what stays here."""
    found, hidden = [], []
    for at, folders, files in os.walk(place):
        own = [name for name in sorted((*folders, *files)) if not _is_hidden(name)]
        for name in own:
            path = Path(at) / name
            relative = path.relative_to(place).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(place):
                raise WriteError(
                    f"{relative} is a link to {path.resolve()}, which lies outside of {place.name}; put the file "
                    "itself there or remove the link",
                    code="W312",
                )
            _require_sendable_name(relative, place)
            if path.is_file():
                found.append(relative)
        hidden += [(Path(at) / name).relative_to(place).as_posix() for name in (*folders, *files) if _is_hidden(name)]
        folders[:] = [name for name in folders if name in own]
    return tuple(sorted(found)), tuple(sorted(hidden))


def _is_hidden(name: str) -> bool:
    leftover = ".shoal-" in name
    return not leftover and (name.startswith(".") or name == "__pycache__") and name != ".gitattributes"


def _require_sendable_name(name: str, place: Path) -> None:
    if name.endswith(PICKLES):
        raise WriteError(
            f"{name} of {place.name} is a pickle, which can run code where it is read; convert it to safetensors or "
            "remove it",
            code="W311",
        )
    if name.endswith(LEFTOVERS) or ".shoal-" in name:
        raise WriteError(
            f"{name} of {place.name} was left by a process that did not end; remove it, or write the folder again",
            code="W314",
        )


def _kind(place: Path, names: tuple[str, ...]) -> str:
    if ADAPTER in names:
        return "adapter"
    if "config.json" in names:
        planned = is_planned(place)
        if planned or "shoal/plan.json" in names:
            return "planned checkpoint" if planned else "stock checkpoint"
    elif "shoal/plan.json" in names:
        return "plan"
    elif "cells.jsonl" in names:
        return "comparison"
    elif any(name.endswith(".gguf") for name in names):
        return "GGUF"
    raise WriteError(
        f"{place} is no folder that Shoal wrote ({listed(names[:4]) or 'it is empty'}); give the --output of shoal "
        "prune, write, heal or compare",
        code="W310",
    )


def _require_whole(place: Path, kind: str, names: tuple[str, ...]) -> None:
    """Whether config, headers, plan and the hash of its weights fit together."""
    match kind:
        case "stock checkpoint" | "planned checkpoint":
            # code that came with a model is not run for this: what its files hold is compared with the index alone
            runs_own = "auto_map" in read_json(place / "config.json")
            _ = check_folder(place) if kind == "planned checkpoint" or runs_own else check_source(place)
            _require_weights(place)
        case "plan":
            _require_weights(place)
        case "adapter":
            adapter_config(place)
        case "GGUF":
            for name in names:
                if name.endswith(".gguf") and "shoal.plan" not in open_source(place / name).fields:
                    raise WriteError(
                        f"{name} of {place.name} was not written by Shoal; send it with `hf upload`", code="W310"
                    )
    for name in names:
        if name.endswith(".safetensors"):
            read_header(place / name)
    for at in {Path(name).parent for name in names if Path(name).name == ADAPTER}:
        if not (place / at / ADAPTER_WEIGHTS).is_file():
            raise ModelError(f"{place / at} has no {ADAPTER_WEIGHTS}; write the adapter again", code="M309")


def _require_weights(place: Path) -> None:
    """Raise U550 or U551 where the tensors that a plan names are not those beside it; they are not loaded."""
    if not (place / "shoal" / "plan.json").is_file():
        return
    load_plan(place)
    expected, file = weights_hash(place), place / "shoal" / PLAN_WEIGHTS
    if expected is not None and not file.is_file():
        raise UsageError(f"the plan of {place} needs the file {file}, which is not there; copy it there", code="U550")
    if expected is not None and hash_of(file) != expected:
        raise UsageError(f"{file} is not the file that the plan of {place} was saved with; restore it", code="U551")


def _proof(place: Path, kind: str, *, unproved: bool) -> str:
    """A GGUF file gets its name when it is proved; a plan is its tensors, held to it by their hash."""
    if kind in ("GGUF", "plan", "comparison"):
        return "none"
    of = place.parent if kind == "adapter" else place
    found = read_json(of / PROOF) if (of / PROOF).is_file() else {}
    said = found.get("checks")
    given = said if isinstance(said, list) else []
    checks = [(str(one.get("name")), one.get("passed")) for one in given if isinstance(one, dict)]
    if kind == "adapter" and not any("adapter" in name for name, _ in checks):
        found = {}
    if not found:
        if not unproved:
            raise WriteError(
                f"{place} has no proof ({PROOF.as_posix()}); write it anew with one, or send it as it is with "
                "--unproved",
                code="W315",
            )
        return "missing"
    failed = tuple(name for name, passed in checks if passed is not True)
    if found.get("passed") is True and checks and not failed:
        return "passed"
    if not unproved:
        raise WriteError(
            f"the proof of {place} did not pass ({listed(failed) or 'it holds no checks'}); write the folder anew, or "
            "send it as it is with --unproved",
            code="W316",
        )
    return "failed"


def _newer(place: Path, names: tuple[str, ...]) -> Iterator[str]:
    proof = place / PROOF
    written = proof.stat().st_mtime + 1 if proof.is_file() else float("inf")
    for name in names:
        if name.endswith(".safetensors") and (place / name).stat().st_mtime > written:
            yield name
