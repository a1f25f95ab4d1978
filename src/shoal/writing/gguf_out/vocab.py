"""The tokenizer's keys of a GGUF file: from a byte-level BPE tokenizer, or from another GGUF file as they are."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from shoal.errors import WriteError
from shoal.models.gguf_source import plain, read_fields
from shoal.writing.gguf_out.container import Pairs

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _LETTERS + r"\p{N}{1,3}" + _REST
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _LETTERS + r"\p{N}" + _REST
PRE_TOKENIZERS = {
    ((("bytes", True),), False): "gpt-2",
    ((("digits", True), ("bytes", True)), False): "smollm",
    ((("split", _LLAMA3), ("bytes", False)), True): "llama-bpe",
    ((("split", _LLAMA3), ("bytes", False)), False): "smaug-bpe",
    ((("split", _QWEN2), ("bytes", False)), False): "qwen2",
}
"""((pre-tokenizers in order), does it ignore merges for whole tokens): llama.cpp's name of them."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_REMEDY = "take them from a GGUF file of the same base with --tokenizer-from"


def from_file(file: Path, rows: int) -> Pairs:
    """The keys `tokenizer.*` of another GGUF file, for a model with `rows` token embeddings.

    Raises `ModelError` M307, M315, and `WriteError` W267 when its vocabulary is another.
    """
    found = {k: plain(f) for k, f in read_fields(file).fields.items() if k.startswith("tokenizer.")}
    tokens: list[bytes] = found["tokenizer.ggml.tokens"][0] if "tokenizer.ggml.tokens" in found else []
    if len(tokens) != rows:
        raise WriteError(
            f"{file} has {len(tokens)} tokens and the model {rows}; give a GGUF file of the same base", code="W267"
        )
    return found


def add_vocab(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Add the keys of a byte-level BPE tokenizer, for a model with `rows` token embeddings.

    Raises `WriteError` W266 for no tokenizer that can be read and for one that llama.cpp has no name for.
    """
    if tokenizer is None:
        raise WriteError(
            f"the model has no tokenizer that can be read, and a GGUF file needs its keys; {_REMEDY}", code="W266"
        )
    with tempfile.TemporaryDirectory(prefix="shoal-tokenizer-") as place:
        tokenizer.save_pretrained(place)
        file = Path(place) / "tokenizer.json"
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        name = _pre_name(data)
        special = SpecialVocab(place, load_merges=True)
    texts, kinds = _tokens(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
    special.special_token_ids = {kind: i for kind, i in ids.items() if isinstance(i, int)}
    encoded = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": ids["bos"] is not None and encoded[0] == ids["bos"],
        "eos": ids["eos"] is not None and encoded[-1] == ids["eos"],
    }
    special.add_to_gguf(writer, quiet=True)


def _pre_name(data: dict[str, Any]) -> str:
    model = data.get("model") or {}
    normal = (data.get("normalizer") or {}).get("type")
    steps = tuple(_step(one) for one in _flat(data.get("pre_tokenizer")))
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if model.get("type") != "BPE" or model.get("byte_fallback") or normal not in (None, "NFC") or name is None:
        said = ", ".join(str(step[0]) for step in steps) or "nothing"
        raise WriteError(
            f"a {model.get('type', 'slow')} tokenizer split by {said} is none that llama.cpp has a name for here; "
            f"{_REMEDY}",
            code="W266",
        )
    return name


def _flat(step: Any) -> list[dict[str, Any]]:
    if not isinstance(step, dict):
        return []
    return [one for part in step["pretokenizers"] for one in _flat(part)] if step["type"] == "Sequence" else [step]


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ("bytes", step.get("use_regex", True))
        case {"type": "Digits"}:
            return ("digits", step["individual_digits"])
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return ("split", regex)
    return (step["type"], "other")


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of each of `rows` tokens; embeddings without a token get one that is never used."""
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise WriteError(
            f"the tokenizer has a token {max(by_id)} and the model {rows} embeddings; {_REMEDY}", code="W266"
        )
    added = tokenizer.added_tokens_decoder
    texts: list[str] = []
    kinds: list[int] = []
    for i in range(rows):
        texts.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            kinds.append(TokenType.UNUSED)
        elif i in added:
            kinds.append(TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    return texts, kinds
