"""The check of a proof that the papers of a written folder name only files and layers that are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal.errors import ShoalError
from shoal.models.checkpoint import INDEX, PLANNED_INDEX, read_json, read_json_list
from shoal.models.load import load_config
from shoal.models.unread_fields import CODE, unread
from shoal.plan.file import PLANNED
from shoal.writing.checks import Check
from shoal.writing.papers import MODULES, PAPERS, lost_code, lost_modules

CONFIGS = ("config.json", "generation_config.json")
WITHOUT_FILES = ("Normalize",)
"""Classes of sentence-transformers' modules that keep nothing: an empty folder is none on the hub and in a wheel."""


def references_check(folder: Path) -> Check:
    """Do the papers of a written folder name only files and layers that are there?"""
    lost = list(_lost(folder))
    how = "references in its JSON files to code, files and layers that are not there"
    return Check("references", not lost, len(lost), 0, f"{how}: {', '.join(lost[:3])}"[:400] if lost else how)


def _lost(folder: Path) -> Iterator[str]:
    for name in (*CONFIGS, *PAPERS):
        if (folder / name).is_file():
            code = read_json(folder / name).get(CODE)
            yield from (f"{name}: {one}" for one in lost_code(code, folder))
    modules = [one for one in read_json_list(folder / MODULES) if isinstance(one, dict)]
    paths = [
        str(one["path"])
        for one in modules
        if one.get("path") and str(one.get("type")).rpartition(".")[2] not in WITHOUT_FILES
    ]
    yield from (f"{MODULES}: {path}" for path in paths if not (folder / path).is_dir())
    yield from (f"{MODULES}: {kind}" for kind in lost_modules(modules, folder))
    for index in (INDEX, PLANNED_INDEX):
        if (folder / index).is_file():
            files = set(read_json(folder / index).get("weight_map", {}).values())
            yield from (f"{index}: {name}" for name in sorted(files) if not (folder / name).is_file())
    yield from _lost_layers(folder)


def _lost_layers(folder: Path) -> Iterator[str]:
    """Keys of the config that the stock class ignores and that name layers which the model has not."""
    raw = read_json(folder / "config.json")
    if raw.get(CODE) is not None or raw.get("model_type") == PLANNED:
        return  # its own code knows what they mean; in a planned checkpoint they are the base's
    try:
        config = load_config(folder, trust_remote_code=True)  # as many other readers do; there is no code to run
    except ShoalError as error:
        yield f"config.json: {error}"
        return
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    for part in {id(p): p for p in (config, config.get_text_config(decoder=True))}.values():
        for name, value in unread(part).items():
            if "layer" in name and type(depth) is int and isinstance(value, list) and value:
                beyond = [i for i in value if type(i) is int and i >= depth]
                if len(beyond) == len(value):
                    yield f"config.json: {name} {beyond[:3]}"
