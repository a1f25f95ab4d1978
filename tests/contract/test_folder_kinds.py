"""Folders that hold something else than a Hugging Face model: each is called what it is, by every verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .broken import shoal
from .shares import every

Make = Callable[[Path], object]


def put(*names: str, **content: object) -> Make:
    """Files with these names; `config` stands for config.json."""

    def make(folder: Path) -> None:
        files = {f"{name}.json": json.dumps(value) for name, value in content.items()}
        for name, text in (dict.fromkeys(names, "x") | files).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    return make


LLAMA = {"model_type": "llama"}
LORA = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
DIFFUSERS = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
MODULES = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling"}]
KINDS: dict[str, tuple[Make, str, str]] = {
    "an adapter": (put("adapter_model.safetensors", adapter_config=LORA), "M370", "an adapter (LORA) of owner/base"),
    "an adapter that tells nothing": (put("adapter_config.json"), "M370", "a base that it does not name"),
    "an adapter beside a config": (put(adapter_config=LORA, config=LLAMA), "M370", "merge it first"),
    "a pipeline": (put("unet/config.json", model_index=DIFFUSERS), "M371", "/text_encoder"),
    "a pipeline of no model": (put(model_index={"_class_name": "X"}), "M371", "none of them"),
    "GGUF files": (put("a-q4.gguf", "b-q8.gguf", "README.md"), "M372", "/a-q4.gguf"),
    "GGUF files beside a config": (put("a.gguf", config=LLAMA), "M372", "/a.gguf"),
    "TensorFlow alone": (put("tf_model.h5", config=LLAMA), "M373", "only for TensorFlow (tf_model.h5)"),
    "Flax alone": (put("flax_model.msgpack", config=LLAMA), "M373", "only for Flax"),
    "ONNX in a folder": (put("onnx/model.onnx", "tokenizer.json", config=LLAMA), "M373", "(onnx/model.onnx)"),
    "OpenVINO alone": (put("openvino_model.xml", "openvino_model.bin", config=LLAMA), "M373", "only for OpenVINO"),
    "pickles alone": (put("pytorch_model.bin", "tf_model.h5", config=LLAMA), "M308", "pytorch_model.bin"),
    "the rest of a training": (put("optimizer.pt", "global_step5/x", config=LLAMA), "M378", "zero_to_fp32"),
    "its maker's format": (put("consolidated.00.pth", "params.json"), "M374", "its maker's own format"),
    "sentence-transformers": (put("0_Transformer/config.json", modules=MODULES), "M375", "/0_Transformer"),
    "several models": (put("a/config.json", "b/config.json"), "M376", "holds 2 models (a, b)"),
    "the hub's cache": (put("refs/main", "snapshots/0123/config.json"), "M376", "/snapshots/0123"),
    "a tokenizer": (put("tokenizer.json", "tokenizer_config.json"), "M377", "a tokenizer alone"),
    "nothing": (put("notes.txt"), "M302", "no config.json"),
    "a config alone": (put(config=LLAMA), "M309", "no weights"),
}


@pytest.mark.parametrize("name", every(2, KINDS))
def test_a_folder_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    make, code, says = KINDS[name]
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    out = str(tmp_path / "out")
    for words in (
        ["inspect", str(folder)],
        ["doctor", str(folder)],
        ["write", str(folder), "--plan", "0", "--output", out],
        ["write", str(folder), "--plan", "0", "--output", out, "--stream"],
        ["prune", str(folder), "--drop", "1", "--output", out],
    ):
        said = shoal(*words, code=1)
        assert f"shoal: {code}: " in said and says in said, said
    assert not Path(out).exists()
