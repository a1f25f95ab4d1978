"""Every way in checks the same: GGUF files, quantised folders, devices, by every verb, through the command line."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gguf_files import edited_file, raw_file, tiny_model, tiny_tokenizer
from shoal.cli import app
from shoal.errors import ModelError
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.plan import Plan
from shoal.writing.gguf_out.write import convert_model

from .shares import every, pairs

WORDS = ("--length", "16", "--limit", "1")
VERBS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "IN"),
    "measure": ("measure", "IN", *WORDS),
    "evaluate": ("evaluate", "IN", "--window", "16", "--limit", "1"),
    "generate": ("generate", "IN", "hello", "--max-new-tokens", "2"),
    "prune": ("prune", "IN", "--drop", "1", "--method", "position", "--no-assess", "--output", "OUT"),
    "prune --dry-run": ("prune", "IN", "--drop", "1", "--dry-run"),
    "write": ("write", "IN", "--plan", "0-3", "--output", "OUT"),
    "write --dry-run": ("write", "IN", "--plan", "0-3", "--output", "OUT", "--dry-run"),
    "write --stream": ("write", "IN", "--plan", "0-3", "--output", "OUT", "--stream"),
    "write .gguf": ("write", "IN", "--plan", "0-3", "--output", "OUT.gguf"),
    "show": ("show", "0-3", "--model", "IN"),
    "convert": ("convert", "0-3", "--to", "notation", "--model", "IN"),
    "doctor": ("doctor", "IN"),
    "bench": ("bench", "IN"),
    "serve": ("serve", "IN", "--port", "0"),
}


def typed(words: Sequence[str], place: Path, out: Path) -> Any:
    known = {"IN": str(place), "OUT": str(out), "OUT.gguf": f"{out}.gguf"}
    return CliRunner().invoke(app, [known.get(word, word) for word in words], prog_name="shoal")


def code_of(result: Any) -> str:
    """The code of an error that is one sentence."""
    assert result.exit_code == 1, f"{result.output} {result.exception!r}"
    (line,) = [said for said in result.stderr.strip().splitlines() if not said.startswith("shoal: note:")]
    assert line.startswith("shoal: ") and len(line) < 700
    return line[7:].partition(":")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound .gguf file of a Llama of six layers."""
    base = Loaded(tiny_model("llama"), tiny_tokenizer(), "llama")
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    return convert_model(base, Plan.identity(inspect(base.model)), file).file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def without(*names: str) -> Callable[[str], str | None]:
    return lambda name: None if name.startswith(names) else name


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def of_type(number: int) -> Callable[[Path, Path], object]:
    """The first tensor is of a type that no package knows: the number stands behind name and shape."""

    def change(whole: Path, file: Path) -> None:
        data = bytearray(whole.read_bytes())
        name = b"token_embd.weight"
        place = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
        (dims,) = struct.unpack_from("<I", data, place)
        struct.pack_into("<I", data, place + 4 + 8 * dims, number)
        file.write_bytes(bytes(data))

    return change


GGUF: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a part of a split model": (
        lambda whole, file: edited_file(whole, file, rename=without("blk.4.", "blk.5."), extra={"split.count": 2}),
        "W260",
    ),
    "fewer layers than it says": (lambda w, f: edited_file(w, f, rename=without("blk.5.")), "W260"),
    "a layer without its number": (lambda w, f: edited_file(w, f, rename=without("blk.2.")), "W260"),
    "more layers than it says": (lambda w, f: edited_file(w, f, keys={"llama.block_count": 5}), "W260"),
    "a list of another length": (
        lambda w, f: edited_file(w, f, keys={"llama.feed_forward_length": [96] * 7}),
        "W260",
    ),
    "a list of one": (lambda w, f: edited_file(w, f, keys={"llama.attention.head_count": [4]}), "W260"),
    "a layer without its mlp": (lambda w, f: edited_file(w, f, rename=without("blk.3.ffn_up")), "M310"),
    "no layer has values": (
        lambda w, f: edited_file(w, f, rename=lambda n: None if n.endswith("attn_v.weight") else n),
        "M310",
    ),
    "another width than it says": (lambda w, f: edited_file(w, f, keys={"llama.feed_forward_length": 128}), "M336"),
    "no embedding": (lambda w, f: edited_file(w, f, rename=without("token_embd")), "M310"),
    "no last norm": (lambda w, f: edited_file(w, f, rename=without("output_norm")), "M310"),
    "another magic": (lambda w, f: f.write_bytes(b"GGML" + w.read_bytes()[4:]), "M315"),
    "another version": (lambda w, f: f.write_bytes(b"GGUF" + struct.pack("<I", 9) + w.read_bytes()[8:]), "M315"),
    "no byte": (lambda w, f: f.write_bytes(b""), "M315"),
    "cut in its header": (lambda w, f: f.write_bytes(w.read_bytes()[:300]), "M315"),
    "cut at its end": (lambda w, f: f.write_bytes(w.read_bytes()[:-40]), "M315"),
    "a type that nobody knows": (of_type(999), "M315"),
}


@pytest.mark.parametrize(("broken", "verb"), pairs(7, GGUF, VERBS, step=3))
def test_a_broken_gguf_file_has_one_code(broken: str, verb: str, whole: Path, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    GGUF[broken][0](whole, file)
    assert code_of(typed(VERBS[verb], file, tmp_path / "out")) == GGUF[broken][1]
    assert not list(tmp_path.glob("out*"))
    assert not cache.exists() or not list(cache.iterdir())


def test_a_gguf_file_with_more_than_transformers_reads_is_no_model_of_transformers(
    whole: Path, cache: Path, tmp_path: Path
) -> None:
    """llama.cpp would add the biases; a file that is copied keeps them."""
    biased = {f"blk.{i}.attn_q.bias": 64 for i in range(6)}
    file = edited_file(whole, tmp_path / "biased.gguf", more=biased)
    assert code_of(typed(VERBS["inspect"], file, tmp_path / "out")) == "M351"
    assert typed(VERBS["write .gguf"], file, tmp_path / "out").exit_code == 0
    roped = edited_file(whole, tmp_path / "roped.gguf", more={"rope_freqs.weight": 8})
    for verb in ("inspect", "show"):  # the second finds the file converted
        result = typed(VERBS[verb], roped, tmp_path / "out")
        assert result.exit_code == 0
        assert result.stderr.count("shoal: note: ") == 1 and "rope_freqs.weight" in result.stderr


def test_a_model_that_an_older_version_converted_unchecked_is_not_taken(
    whole: Path, cache: Path, tmp_path: Path
) -> None:
    file = edited_file(whole, tmp_path / "bad.gguf", rename=without("blk.3.ffn_up"))
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    tiny_model("llama").save_pretrained(cache / f"bad-{key}")
    assert code_of(typed(VERBS["inspect"], file, tmp_path / "out")) == "M310"


def test_lists_of_a_layer_under_any_name_follow_the_plan(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.gguf", "apertus")
    known = edited_file(base, tmp_path / "known.gguf", keys={"xielu.alpha_p": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    out = tmp_path / "out"
    assert typed(VERBS["write .gguf"], known, out).exit_code == 0
    from .gguf_contents import contents

    assert contents(tmp_path / "out.gguf", "xielu.alpha_p") == [1.0, 2.0, 3.0, 4.0]
    short = edited_file(base, tmp_path / "short.gguf", keys={"xielu.alpha_p": [1.0, 2.0]})
    assert code_of(typed((*VERBS["write .gguf"], "--overwrite"), short, out)) == "W260"
    strange = edited_file(base, tmp_path / "strange.gguf", keys={"apertus.strange": [1, 2]})
    assert code_of(typed((*VERBS["write .gguf"], "--overwrite"), strange, out)) == "W260"


QUANTISED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "M350", "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "M350", "awq, 4 bits"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "M350", "bitsandbytes, 4 bits"),
    "8 bits": ({"load_in_8bit": True}, "M350", "bitsandbytes, 8 bits"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, "M350", "compressed-tensors"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "M350", "torchao"),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "M350", "hqq"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "M350", "quanto"),
    "exl2": ({"quant_method": "exl2", "bits": 4.0}, "M352", "exl2"),
    "no method": ({"bits": 4}, "M352", "by unknown means, 4 bits"),
    "an odd method": ({"quant_method": ["gptq"]}, "M352", "['gptq']"),
}
LOADING = ("measure", "evaluate", "generate", "prune", "write", "bench", "serve", "write .gguf")
SAID = {"write --stream": "W212", "doctor": "M333"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder") / "model"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def copied(folder: Path, place: Path, **fields: Any) -> Path:
    shutil.copytree(folder, place)
    raw = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(raw | fields), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", every(3, QUANTISED))
def test_a_quantised_folder_is_refused_before_it_is_read(name: str, folder: Path, tmp_path: Path) -> None:
    settings, code, words = QUANTISED[name]
    bad = copied(folder, tmp_path / "bad", quantization_config=settings)
    number = list(QUANTISED).index(name)
    verb = LOADING[number % len(LOADING)]  # all verbs load by the same function
    result = typed(VERBS[verb], bad, tmp_path / "out")
    assert code_of(result) == code
    assert words in result.stderr
    for verb, said in SAID.items():
        result = typed(VERBS[verb], bad, tmp_path / "out")
        assert code_of(result) == said
        assert words in result.stderr
    assert f"quantised ({words})" in typed(VERBS["inspect"], bad, tmp_path / "out").stdout
    assert json.loads(typed(("inspect", "IN", "--json"), bad, tmp_path / "out").stdout)["quantised"] == words


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "cpu:cpu", ""])
@pytest.mark.parametrize("verb", ["measure", "write", "generate"])
def test_a_device_that_is_not_there_is_one_sentence(device: str, verb: str, folder: Path, tmp_path: Path) -> None:
    assert code_of(typed((*VERBS[verb], "--device", device), folder, tmp_path / "out")) == "M354"


def test_what_no_part_of_the_model_takes_is_a_note(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = copied(folder, tmp_path / "more")
    tensors = load_file(place / "model.safetensors")
    left = {"model.layers.0.mlp.left.weight": tensors["model.norm.weight"].clone()}
    save_file(tensors | left, place / "model.safetensors", metadata={"format": "pt"})
    for verb in ("inspect", "measure", "show"):
        result = typed(VERBS[verb], place, tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert result.stderr.count("shoal: note: ") == 1
        assert "mlp.left.weight" in result.stderr


def test_a_tokenizer_that_cannot_be_read_is_not_said_to_be_missing(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "odd")
    (place / "tokenizer.json").write_text("{", encoding="utf-8")
    result = typed(VERBS["measure"], place, tmp_path / "out")
    assert code_of(result) == "D440"
    assert f"note: the tokenizer in {place} cannot be read" in result.stderr


def test_a_live_model_is_taken_as_it_is() -> None:
    model = tiny_model("llama")
    assert load(model).model is model
    with pytest.raises(ModelError, match="M307"):
        load("nothing here")
