"""The JSON files beside the tensors of a written folder: what they say of layers and of other files must be true."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from shoal.errors import WriteError
from shoal.models.checkpoint import read_json, read_json_list
from shoal.models.layer_references import GONE, Renumbering
from shoal.models.unread_fields import CODE

PAPERS = (
    "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
"""Files that may name code of their own or speak of layers, and that are copied from the base."""
MODULES = "modules.json"
OUTPUTS = ("dola_layers",)
"""Lists of outputs in a generation config: 0 is the input of the layers, i + 1 the output of layer i."""
PAIRS = ("alignment_heads",)
"""Lists of [layer, head] pairs in a generation config (Whisper's, of its decoder)."""


def generation_for(config: GenerationConfig, places: Renumbering) -> GenerationConfig:
    """A copy of `config` whose layers are those of the written model; what names only layers that are gone is left out.
    `places`: of the decoder."""
    made = copy.deepcopy(config)
    standard = vars(GenerationConfig())
    for name, value in vars(config).items():
        if name.startswith("_") or value is None:
            continue
        if name in OUTPUTS or name in PAIRS:
            new = _outputs(value, places) if name in OUTPUTS else _pairs(value, places)
        elif name == "assistant_early_exit" and type(value) is int:
            new = sum(layer < value for layer in places.slots) or GONE
        else:
            new = value if name in standard else replace(places, strict=True).named(name, value)
        if new is GONE and name in standard:
            setattr(made, name, None)
        elif new is GONE:
            delattr(made, name)
        elif new != value:
            setattr(made, name, new)
    return made


def _outputs(value: Any, places: Renumbering) -> Any:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i <= places.depth for i in value):
        return value
    kept = [0 if i == 0 else places.slots.index(i - 1) + 1 for i in value if i == 0 or i - 1 in places.slots]
    return kept or GONE


def _pairs(value: Any, places: Renumbering) -> Any:
    if not isinstance(value, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        return value
    return [[slot, head] for layer, head in value for slot, one in enumerate(places.slots) if one == layer] or GONE


def settle_papers(folder: Path, places: Renumbering) -> list[str]:
    """Mend what was copied into `folder` from its base: references to code that is not there are taken out, numbers of
    layers follow the plan. Returns a sentence for each reference that was taken out.

    Raises `WriteError` W282 for a module beside the model whose weights follow the number of layers.
    """
    said = []
    strict = replace(places, strict=True)
    for name in PAPERS:
        if (folder / name).is_file():
            old = read_json(folder / name)
            new = {key: strict.named(key, value) if key != CODE else value for key, value in old.items()}
            new = {key: value for key, value in new.items() if value is not GONE}
            if lost_code(new.get(CODE), folder):
                said.append(f"{name} names code that is not copied ({CODE}); take it from the base where it is needed")
                del new[CODE]
            if new != old:
                _write(folder / name, new)
    said += _settle_modules(folder, strict)
    return said


def _settle_modules(folder: Path, places: Renumbering) -> list[str]:
    modules = [one for one in read_json_list(folder / MODULES) if isinstance(one, dict)]
    for path in [str(one["path"]) for one in modules if one.get("path")]:
        file = folder / path / "config.json"
        old = read_json(file) if file.is_file() else {}
        counted = next((key for key, value in old.items() if places.named(key, value) != value), None)
        if counted is not None and "model_type" not in old:  # a model of its own counts its own layers
            raise WriteError(
                f"the module {path} of modules.json counts the model's layers ({counted} is {str(old[counted])[:40]}), "
                "and its weights follow them; take it out of modules.json, or keep all layers",
                code="W282",
            )
    strange = lost_modules(modules, folder)
    if strange:
        (folder / MODULES).unlink()
        return [f"{MODULES} names code that is not copied ({strange[0]}), so it is left out"]
    return []


def lost_modules(modules: list[dict[str, Any]], folder: Path) -> list[str]:
    """Classes of modules that are neither sentence-transformers' own nor in a file of the folder."""
    kinds = [str(one.get("type", "")) for one in modules]
    own = [kind for kind in kinds if kind and not kind.startswith("sentence_transformers.")]
    return [kind for kind in own if not (folder / f"{kind.partition('.')[0][:200]}.py").is_file()]


def lost_code(code: Any, folder: Path) -> list[str]:
    """The references of an `auto_map` to files of this folder that are not there."""
    found = code.values() if isinstance(code, dict) else []
    ones = [one for value in found for one in (value if isinstance(value, list) else [value])]
    files = [one for one in ones if isinstance(one, str) and "--" not in one]
    return [one for one in files if not (folder / f"{one.rpartition('.')[0][:200]}.py").is_file()]


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
