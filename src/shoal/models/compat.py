"""Every touch of transformers that may change with its version or that is global: one function each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING


def hide_own_bars() -> None:
    """Switch the progress bars of transformers off for this process; Shoal shows its own."""
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def hide_offload_note() -> Iterator[None]:
    """Meanwhile accelerate does not tell that parameters are offloaded, which was asked for, nor transformers that a
    device map names a parameter that stands beside the modules (CLIP's `logit_scale`), which is right."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            yield
    finally:
        logger.setLevel(level)


def decoded(raw: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with infinities and NaN, which JSON cannot say, as numbers again."""
    found: dict[str, Any] = transformers.PreTrainedConfig._decode_special_floats(raw)
    return found


def knows_quantisation(settings: dict[str, Any]) -> bool:
    """Does transformers have a reader for the `quantization_config` of a checkpoint? One that it has not is left aside
    with a log line, and the packed tensors would be taken for missing ones."""
    method = settings.get("quant_method")
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        method = f"bitsandbytes_{4 if settings.get('load_in_4bit') else 8}bit"
    return isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING


@contextmanager
def registered(config: Any, models: dict[str, Any]) -> Iterator[None]:
    """Until the end of the block AutoConfig knows the class `config`, and each Auto class of `models` its class for it;
    registration itself is for good, and would let others run code that they were not asked about."""
    mappings = [getattr(transformers, name)._model_mapping for name in models]
    before = [(mapping, dict(mapping._extra_content)) for mapping in (CONFIG_MAPPING, *mappings)]
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name, kind in models.items():
        getattr(transformers, name).register(config, kind, exist_ok=True)
    try:
        yield
    finally:
        for mapping, content in before:
            mapping._extra_content.clear()
            mapping._extra_content.update(content)


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Until the end of the block a GGUF file has one reader, and a kind of model one table of tensor names.

    transformers opens the file anew for the config, the model and the tokenizer, and makes the table for each module.
    Of the 50 s that 135M parameters took to convert this was two thirds: the reader goes through a vocabulary entry by
    entry. Whoever looks the reader up in the package (`gguf.GGUFReader`) when it is called gets the one.
    """
    import gguf

    own = (gguf.GGUFReader, gguf.get_tensor_name_map)
    reader = lru_cache(gguf.GGUFReader)
    gguf.GGUFReader = lambda path, mode="r": reader(str(path), mode)  # type: ignore[misc,assignment]
    gguf.get_tensor_name_map = lru_cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own  # type: ignore[misc]
