"""The metadata of a checkpoint: config, index and headers, of a folder or of a hub id, as they are, wrong or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.models.checked_source import BUILTIN, local_folder
from shoal.models.checkpoint import INDEX, read_json, tensor_headers
from shoal.models.diagnosis.finding import Finding
from shoal.models.folder_kinds import planned_refusal
from shoal.models.hub import fetched
from shoal.models.shards import SINGLE, Stored, read_config, read_places, require_inside, weight_map
from shoal.plan.file import PLANNED

MaybeShape = tuple[int, ...] | None
"""None where only the name of a tensor is known."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says of itself."""

    source: str
    config: dict[str, Any]
    tensors: dict[str, MaybeShape]
    """Of the files that could be read, and of the index."""
    folder: Path | None = None
    """None for a hub id."""
    places: dict[str, Stored] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    """What is wrong with the files themselves."""


def read_metadata(source: str | Path) -> CheckpointMetadata:
    """The metadata of a local folder, or of a hub id, of which config.json and the index are fetched (or, without an
    index, the header of its one file).

    Raises `ModelError`: M302 no config or one that is no JSON object, M307 no such model, M308 weights only as pickle,
    M309 no weights at all.
    """
    place = Path(source).expanduser()
    if str(source) == BUILTIN or place.suffix == ".gguf":
        place = local_folder(source)
    if place.is_dir():
        return _of_folder(str(source), place)
    text = str(source)
    if place.exists():
        raise ModelError(f"{source} is a file; give a folder or a hub id to the doctor", code="M306")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return CheckpointMetadata(text, *fetched(text))
    raise ModelError(f"there is no model {text!r}; give a folder or a hub id (owner/name)", code="M307")


def _of_folder(source: str, folder: Path) -> CheckpointMetadata:
    config = read_config(folder)
    if config.get("model_type") == PLANNED:
        raise planned_refusal(source)
    claimed = index_of(folder)
    if claimed is None and not (folder / SINGLE).is_file():
        tensor_headers(folder)  # says what the folder holds instead
    findings: list[Finding] = []
    if claimed is not None and (folder / SINGLE).is_file() and set(claimed.values()) != {SINGLE}:
        findings.append(Finding(f"the file {SINGLE}", "beside an index of other files", "one or the other", None))
    places = _places(folder, claimed, findings)
    _compare_index(claimed or {}, places, findings)
    tensors: dict[str, MaybeShape] = dict.fromkeys(claimed or {}, None) | {name: s.shape for name, s in places.items()}
    lost = {name for name, file in (claimed or {}).items() if name not in places and (folder / file).is_file()}
    kept = {name: shape for name, shape in tensors.items() if name not in lost}
    return CheckpointMetadata(source, config, kept, folder, places, tuple(findings))


def index_of(folder: Path) -> dict[str, str] | None:
    """{tensor: file} of the index; None when there is no index. Raises M302, M309."""
    index = folder / INDEX
    if not index.is_file():
        return None
    return weight_map(read_json(index), str(index))


def _places(folder: Path, claimed: dict[str, str] | None, findings: list[Finding]) -> dict[str, Stored]:
    """The tensors of all files, those that no index names included: an index that forgot one is mended so."""
    named = sorted(set(claimed.values())) if claimed is not None else [SINGLE]
    shards = folder.glob("model-*-of-*.safetensors") if claimed is not None else ()
    extra = [file.name for file in sorted(shards) if file.name not in named]
    places: dict[str, Stored] = {}
    for name in [*named, *extra]:
        try:
            require_inside(folder, name)
            found = read_places(folder / name)
        except ModelError as error:
            findings.append(Finding(f"the file {name[:80]}", f"not readable ({_why(error)})", "a sound file", None))
            continue
        if name in extra and set(found) <= set(places):
            continue  # nothing that the index does not have already
        for tensor, place in found.items():
            if tensor in places:
                both = f"in {places[tensor].file.name} and in {name}"
                findings.append(Finding(f"the tensor {tensor}", both, "in one file", None))
            places[tensor] = place
    return places


def _compare_index(claimed: dict[str, str], places: dict[str, Stored], findings: list[Finding]) -> None:
    readable = {place.file.name for place in places.values()}
    wrong = [t for t, name in claimed.items() if t in places and places[t].file.name != name]
    lost = [t for t, name in claimed.items() if t not in places and name in readable]
    forgotten = [t for t in places if claimed and t not in claimed]
    new = "a new index is written"
    for tensors, found, wanted in (
        (wrong, "said to be in another file than it is", "where it is"),
        (lost, "named by the index and in no file", "left out of the index"),
        (forgotten, "in a file and not in the index", "named by the index"),
    ):
        if tensors:
            more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
            findings.append(Finding(f"the index entry of {tensors[0]}{more}", found, wanted, new))


def _why(error: ModelError) -> str:
    return str(error).partition(": ")[2].partition(";")[0]
