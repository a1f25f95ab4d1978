"""Tiny tokenizers, models and GGUF files for the tests of the GGUF output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from shoal.models import gguf_rules as rules

TEXT = "the cat sat on the mat and the dog ran 12 345 times over the hill, didn't it?"
VOCAB = 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama wide": {"head_dim": 32},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "llama scaled": {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 32, **_ROPE}},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
}
"""What differs from a plain model of the family, which is the first word."""


def tiny_model(name: str, **other: Any) -> PreTrainedModel:
    """A random model of 6 layers that matter, of the family that `name` begins with."""
    config = AutoConfig.for_model(name.split(maxsplit=1)[0], **{**_BASE, **MODELS[name], **other})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.15 if parameter.dim() > 1 else 0.3)
    return model


def tiny_tokenizer(split: Any = DIGITS, **model: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens; `model`: options of the BPE."""
    made = Tokenizer(models.BPE(**model))
    made.pre_tokenizer = split
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 20, trainer)
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def raw_file(
    file: Path,
    arch: str = "openelm",
    depth: int = 6,
    *,
    arrays: dict[str, list[Any]] | None = None,
    numbers: dict[str, int] | None = None,
    stated: int | None = None,
    strings: dict[str, str] | None = None,
) -> Path:
    """A GGUF file of `depth` layers with one Q8_0 matrix and one vector each (and vectors for what else a known
    architecture needs), every one different, and metadata."""
    writer = GGUFWriter(None, arch)
    writer.add_block_count(depth if stated is None else stated)
    writer.add_embedding_length(32)
    writer.add_uint32("general.file_type", 7)
    writer.add_array("general.tags", ["tiny"] * depth)  # as long as the layers are many, and no business of theirs
    for key, value in (strings or {}).items():
        writer.add_string(key, value)
    for key, number in (numbers or {}).items():
        writer.add_uint32(f"{arch}.{key}", number)
    for key, values in (arrays or {}).items():
        writer.add_array(f"{arch}.{key}", values)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(8)])
    random = np.random.default_rng(0)
    kind = GGMLQuantizationType.Q8_0

    def matrix(name: str, rows: int) -> None:
        writer.add_tensor(name, quantize(random.normal(size=(rows, 32)).astype(np.float32), kind), raw_dtype=kind)

    matrix("token_embd.weight", 8)
    for layer in range(depth):
        matrix(f"blk.{layer}.attn_q.weight", 4)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", random.normal(size=32).astype(np.float32))
        for name in rules.NEEDED.get(arch, ()):
            if name not in ("attn_q.weight", "attn_norm.weight"):
                writer.add_tensor(f"blk.{layer}.{name}", random.normal(size=32).astype(np.float32))
    writer.add_tensor("output_norm.weight", random.normal(size=32).astype(np.float32))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def edited_file(
    source: Path,
    file: Path,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, int] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A copy of a .gguf file with tensors renamed (None: left out), `keys` exchanged, integer keys `extra` added, and
    tensors `more` of zeros of a size added."""
    reader = GGUFReader(source)
    keys = dict(keys or {})
    arch = str(keys.pop("general.architecture", reader.fields["general.architecture"].contents()))
    writer = GGUFWriter(file, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = keys.pop(name, field.contents())
        if isinstance(value, list):
            writer.add_array(name, value)
        elif field.types[0] == GGUFValueType.STRING:
            writer.add_string(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    for name, value in keys.items():
        writer.add_array(name, value)
    for name, number in (extra or {}).items():
        writer.add_uint32(name, number)
    for tensor in reader.tensors:
        if (new := rename(tensor.name)) is not None:
            writer.add_tensor(new, tensor.data, raw_dtype=tensor.tensor_type)
    for name, size in (more or {}).items():
        writer.add_tensor(name, np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
