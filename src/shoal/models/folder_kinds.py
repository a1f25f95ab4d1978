"""Folders that hold no Hugging Face model but something else that is known: an adapter, a pipeline, GGUF files, ..."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub

from shoal.errors import ModelError

ADAPTER, PIPELINE, MODULES, CONFIG = "adapter_config.json", "model_index.json", "modules.json", "config.json"
OTHER_LIBRARIES = {
    ".h5": "TensorFlow", ".tflite": "TensorFlow Lite", ".msgpack": "Flax", ".onnx": "ONNX", ".mlmodel": "Core ML",
    ".mlpackage": "Core ML", ".engine": "TensorRT", ".nemo": "NeMo", ".ckpt.index": "TensorFlow 1",
}  # fmt: skip
"""Ending of a file or folder -> whose weights it holds; OpenVINO's is found by its pair of files."""
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
"""How pickles of a training that hold no weights begin."""
_MAX_JSON = 1_000_000
_MOST_LISTED = 4


def refuse_other_kind(folder: Path) -> None:
    """Raise a `ModelError` that names what `folder` holds and what to give instead; return for anything unknown.

    To be asked where `folder` lacks a config or weights. M370 an adapter, M371 a pipeline of diffusers, M372 GGUF
    files, M373 weights of another library alone, M374 Meta's or Mistral's own format, M375 a model of
    sentence-transformers in a folder below, M376 several models or checkpoints, M377 a tokenizer alone, M378 the parts
    that a distributed training left.
    """
    for kind in (refuse_adapter, _pipeline, _modules, _gguf, _training, _several, _own_format, _library, _tokenizer):
        kind(folder)


def planned_refusal(source: str) -> ModelError:
    """What is said where a planned checkpoint is given and a base is wanted."""
    return ModelError(
        f"{source} is a planned checkpoint, which runs as it is (generate, evaluate, bench, serve; in Python "
        "shoal.load); give its base for anything else",
        code="M382",
    )


def refuse_adapter(folder: Path) -> None:
    """Raise M370 for a folder with an adapter, beside a model or not: transformers would load the adapter's own base
    and put the adapter on it, whatever else the folder holds."""
    if (folder / ADAPTER).is_file():
        raise _adapter(str(folder), _json(folder / ADAPTER))


def refuse_other_kind_of_hub(hub_id: str) -> None:
    """`refuse_other_kind` for a hub id without a config.json: M370 or M371, by the one file that tells."""
    for name, make in ((ADAPTER, _adapter), (PIPELINE, _pipeline_error)):
        found = _fetched(hub_id, name)
        if found is not None:
            raise make(hub_id, _json(found))


def pickled_weights(folder: Path) -> list[str]:
    """The names of the files of `folder` that hold weights as pickle."""

    def pickled(file: Path) -> bool:
        known = file.name.startswith(_NO_WEIGHTS) or file.with_suffix(".xml").is_file()  # the latter: OpenVINO's
        return file.suffix in (".bin", ".pt", ".pth", ".ckpt") and not known

    return _names(folder, pickled)


def _adapter(where: str, data: Any) -> ModelError:
    kind, base = (_text(data, key) for key in ("peft_type", "base_model_name_or_path"))
    return ModelError(
        f"{where} is an adapter ({kind or 'PEFT'}) of {base or 'a base that it does not name'}, not a model; merge it "
        "first (PeftModel.from_pretrained, then merge_and_unload() and save_pretrained), then give the merged folder",
        code="M370",
    )


def _pipeline(folder: Path) -> None:
    if (folder / PIPELINE).is_file():
        raise _pipeline_error(str(folder), _json(folder / PIPELINE))


def _pipeline_error(where: str, data: Any) -> ModelError:
    members = data.items() if isinstance(data, dict) else ()
    models = [f"{where}/{name}" for name, of in members if isinstance(of, list) and of[:1] == ["transformers"]]
    models = [name for name in models if not name.endswith(("tokenizer", "tokenizer_2", "extractor", "processor"))]
    give = f"give the folder of one, such as {models[0]}" if models else "none of them is a transformers model"
    return ModelError(
        f"{where} is a pipeline of diffusers ({_text(data, '_class_name') or 'of several models'}), not one model; "
        f"{give}",
        code="M371",
    )


def _modules(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    named = _json(folder / MODULES)
    paths = [one.get("path") for one in named if isinstance(one, dict)] if isinstance(named, list) else []
    inner = next((place for place in _folders(folder) if place.name in paths and (place / CONFIG).is_file()), None)
    if inner is not None:
        raise ModelError(
            f"{folder} is a model of sentence-transformers whose transformer lies in a folder of its own; give {inner}",
            code="M375",
        )


def _gguf(folder: Path) -> None:
    files = _names(folder, lambda p: p.suffix == ".gguf" and p.is_file())
    if files:
        raise ModelError(f"{folder} holds GGUF files ({_listed(files)}); give a file: {folder / files[0]}", code="M372")


def _library(folder: Path) -> None:
    for place in (folder, *_folders(folder)):
        for name in _names(place, lambda p: True):
            pair = name.endswith(".xml") and (place / f"{name[:-4]}.bin").is_file()
            library = (
                "OpenVINO" if pair else next((of for end, of in OTHER_LIBRARIES.items() if name.endswith(end)), "")
            )
            if library:
                raise ModelError(
                    f"{folder} has its weights only for {library} ({(place / name).relative_to(folder)}); give the "
                    "folder with safetensors that they were made of, or save them so with an older transformers",
                    code="M373",
                )


def _own_format(folder: Path) -> None:
    files = _names(folder, lambda p: p.name.startswith("consolidated."))
    if files and (folder / "params.json").is_file():
        raise ModelError(
            f"{folder} is in its maker's own format (params.json, {files[0]}); give the folder of the same model for "
            "transformers, or convert it with the script convert_*_weights_to_hf.py of transformers",
            code="M374",
        )


def _training(folder: Path) -> None:
    found = _names(folder, lambda p: p.name.startswith(("global_step", "pytorch_model_fsdp_")) or p.suffix == ".distcp")
    if found:
        raise ModelError(
            f"{folder} holds the parts that a distributed training left ({_listed(found)}); gather them first "
            "(zero_to_fp32.py for DeepSpeed, accelerate merge-weights for FSDP), then give the gathered folder",
            code="M378",
        )


def _several(folder: Path) -> None:
    below = [*_folders(folder / "snapshots"), *_folders(folder)]
    models = [place for place in below if any((place / name).is_file() for name in (CONFIG, ADAPTER))]
    if models:
        what = f"holds {len(models)} models" if len(models) > 1 else "holds a model in a folder below"
        names = _listed([str(place.relative_to(folder)) for place in models])
        raise ModelError(f"{folder} {what} ({names}); give one of them, such as {models[-1]}", code="M376")


def _tokenizer(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    files = _names(folder, lambda p: p.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")))
    if files and not _names(folder, lambda p: p.suffix in (".safetensors", ".bin", ".pt", ".pth")):
        raise ModelError(f"{folder} holds a tokenizer alone ({files[0]}); give the folder of its model", code="M377")


def _names(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    return sorted(place.name for place in folder.iterdir() if wanted(place)) if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder, lambda p: p.is_dir() and not p.name.startswith("."))]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(name[:60] for name in names[:_MOST_LISTED]) + more


def _json(file: Path) -> Any:
    """The content of a file that may be no JSON at all: its name alone tells what the folder is."""
    try:
        return json.loads(file.read_bytes()) if file.stat().st_size <= _MAX_JSON else None
    except (OSError, ValueError, RecursionError):
        return None


def _text(data: Any, key: str) -> str:
    found = data.get(key) if isinstance(data, dict) else None
    return " ".join(found.split())[:100] if isinstance(found, str) else ""


def _fetched(hub_id: str, name: str) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, name))
    except Exception:  # no such file, no network, no such model: then nothing is known of it
        return None
