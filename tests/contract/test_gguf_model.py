"""A model written as .gguf: types, tokenizers, what transformers reads back, the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gguf_files import MODELS, TEXT, VOCAB, raw_file, tiny_model, tiny_tokenizer
from shoal.cli import app
from shoal.models import gguf_rules as rules
from shoal.models.compat import gguf_read_once
from shoal.models.gguf_source import read_fields
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, parse_plan, save_plan
from shoal.writing.gguf_out import converted as converted_module
from shoal.writing.gguf_out import vocab
from shoal.writing.gguf_out.converted import converted, sketched
from shoal.writing.gguf_out.families import FAMILIES, family_of
from shoal.writing.gguf_out.write import convert_model

from .gguf_contents import contents, refused


@pytest.fixture(scope="module")
def loaded() -> Callable[..., Loaded]:
    tokenizer = tiny_tokenizer()
    return lambda name, **other: Loaded(tiny_model(name, **other), tokenizer, name)


def plan_of(base: Loaded, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(base.model)))


READ = ("llama", "llama biased", "qwen2", "qwen3", "gemma2", "gemma3_text")


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_the_live_plan_back(name: str, loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    base = loaded(name)
    written = convert_model(base, plan_of(base, "0,3,2,2,5"), tmp_path / "out.gguf", forward=True)
    logits = written.proof.checks[-1]
    assert (logits.name, logits.passed) == ("logits", True)
    assert logits.limit == pytest.approx(1e-4)


def test_every_family_has_a_tiny_model_here() -> None:
    assert FAMILIES.keys() == {name.split(maxsplit=1)[0] for name in MODELS}
    assert {family.arch for family in FAMILIES.values()} <= rules.UNIFORM | rules.WINDOWS.keys()


def test_the_forward_check_sees_rows_left_as_they_were(
    loaded: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded("llama")
    monkeypatch.setattr(converted_module, "changed", lambda name, values, *_: values.float())
    plan = plan_of(base, "0-3")
    for outtype in (None, "q8_0"):
        said = refused(
            "W230",
            lambda outtype=outtype: convert_model(base, plan, tmp_path / "out.gguf", outtype=outtype, forward=True),  # type: ignore[misc]
        )
        assert "logits" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_types_are_written_and_sized_beforehand(outtype: str, loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    base, out = loaded("llama"), tmp_path / "out.gguf"
    plan = plan_of(base, "0-3")
    written = convert_model(base, plan, out, outtype=outtype, forward=True)
    logits = written.proof.checks[-1]
    assert logits.passed
    assert logits.limit == pytest.approx(1e-4)
    assert ("rounding" in logits.how) == (outtype != "f32")
    kinds = {t.tensor_type.name for t in GGUFReader(out).tensors if len(t.shape) > 1}
    assert kinds == {outtype.upper()}
    sketch = sketched(base.model.config, plan, outtype=outtype)
    assert sketch.bytes == sum(int(t.n_bytes) for t in GGUFReader(out).tensors)
    assert sketch.tensors == len(GGUFReader(out).tensors)


def test_a_bfloat16_model_keeps_its_type(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    base = Loaded(tiny_model("qwen3").to(torch.bfloat16), loaded("llama").tokenizer, "x")
    convert_model(base, plan_of(base, "1-4"), tmp_path / "out.gguf")
    assert contents(tmp_path / "out.gguf", "general.file_type") == 32
    data = next(t for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == "blk.0.ffn_up.weight").data
    want = base.model.model.layers[1].mlp.up_proj.weight.detach().view(torch.int16).numpy()
    assert np.array_equal(data.reshape(-1).view(np.int16), want.reshape(-1))


def test_zeroed_parts_and_the_note_of_a_pruned_base(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    base, out = loaded("llama"), tmp_path / "out.gguf"
    refused("W201", lambda: convert_model(base, plan_of(base, "0,1a,2"), out))
    convert_model(base, plan_of(base, "0,1a,2"), out, zero_parts=True, forward=True)
    assert contents(out, "shoal.plan") == "0,1a,2"
    assert contents(out, "shoal.base_layers") == [0, 1, 2]
    down = next(t for t in GGUFReader(out).tensors if t.name == "blk.1.ffn_down.weight")
    assert not down.data.any()


def test_the_tokenizer_is_read_back_as_it_was(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    base, out = loaded("llama"), tmp_path / "out.gguf"
    base.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    convert_model(base, plan_of(base, "0-3"), out)
    assert contents(out, "tokenizer.ggml.pre") == "smollm"
    assert contents(out, "tokenizer.chat_template") == base.tokenizer.chat_template
    ids = {kind: contents(out, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert contents(out, "tokenizer.ggml.add_bos_token") is False
    texts, kinds = contents(out, "tokenizer.ggml.tokens"), contents(out, "tokenizer.ggml.token_type")
    assert len(texts) == len(kinds) == VOCAB
    assert (texts[VOCAB - 1], kinds[VOCAB - 1], kinds[0], kinds[50]) == (f"[PAD{VOCAB - 1}]", 5, 3, 1)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=out.name)
    assert again(TEXT).input_ids == base.tokenizer(TEXT).input_ids
    other = tmp_path / "taken.gguf"
    convert_model(base, plan_of(base, "0-1"), other, tokenizer_from=out)
    assert contents(other, "tokenizer.ggml.merges") == contents(out, "tokenizer.ggml.merges")
    assert contents(other, "tokenizer.chat_template") == base.tokenizer.chat_template
    few = raw_file(tmp_path / "few.gguf")
    refused("W267", lambda: convert_model(base, plan_of(base, "0-1"), tmp_path / "x.gguf", tokenizer_from=few))


def _split(regex: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("split", "options", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {}, "gpt-2"),
        (_split(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        (_split(LLAMA3), {}, "smaug-bpe"),
        (_split(LLAMA3.replace("{1,3}", "")), {}, "qwen2"),
        (_split(r"\w+"), {}, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {"byte_fallback": True}, None),
    ],
)
def test_pre_tokenizers_have_a_name_or_are_refused(split: Any, options: dict[str, bool], name: str | None) -> None:
    writer = GGUFWriter(None, "llama")
    tokenizer = tiny_tokenizer(split, **options)
    if name is None:
        assert "--tokenizer-from" in refused("W266", lambda: vocab.add_vocab(writer, tokenizer, VOCAB))
        return
    vocab.add_vocab(writer, tokenizer, VOCAB)
    assert writer.kv_data[0]["tokenizer.ggml.pre"].value == name


def test_what_llama_cpp_cannot_be_told_is_refused(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    def wrong(code: str, name: str, **other: Any) -> str:
        return refused(code, lambda: family_of(tiny_model(name, **other).config))

    assert "gelu" in wrong("W265", "llama", hidden_act="gelu")
    wrong("W265", "qwen3", attention_bias=True)
    wrong("W265", "gemma2", attn_logit_softcapping=None)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    wrong("W265", "llama", rope_parameters=rope)
    wrong("W263", "gemma2", query_pre_attn_scalar=16)
    base = loaded("llama")
    no_words = Loaded(base.model, None, "x")
    assert "no tokenizer that can be read" in refused("W266", lambda: converted(no_words, plan_of(base, "0-3")))
    refused("W266", lambda: vocab.add_vocab(GGUFWriter(None, "llama"), base.tokenizer, 200))
    refused("W264", lambda: convert_model(base, plan_of(base, "0-3"), tmp_path / "x.gguf", outtype="q2_k"))
    other = loaded("mistral")
    refused("W269", lambda: convert_model(other, plan_of(other, "0-3"), tmp_path / "x.gguf", forward=True))
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_does_not_know_cuts_the_context(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    base = loaded("mistral", sliding_window=16)
    convert_model(base, plan_of(base, "0-3"), tmp_path / "out.gguf")
    assert contents(tmp_path / "out.gguf", "llama.context_length") == 16


def shoal(words: Sequence[str], code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="shoal")
    assert result.exit_code == code, f"{result.output}{result.stderr}{result.exception!r}"
    return result.stderr if code else result.stdout


def test_the_command_line(loaded: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    base, folder = loaded("llama"), tmp_path / "base"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    assert json.loads(shoal(["write", folder, "--output", whole, "--dry-run", "--json"]))["tensors"] == 57
    assert not whole.exists()
    said = json.loads(shoal(["write", folder, "--output", whole, "--json"]))
    assert (said["plan"], said["arch"], said["base_layers"]) == ("0-5", "llama", list(range(6)))
    assert "as stored" in shoal(["write", whole, "--plan", "0,2-5", "--output", out, "--dry-run"])
    assert "proved" in shoal(["write", whole, "--plan", "0,2-5", "--output", out, "--forward"])
    streamed = shoal(["write", out, "--plan", "1-3", "--output", tmp_path / "folder", "--stream"])
    assert "float32 copy of the .gguf file" in streamed
    note = json.loads((tmp_path / "folder" / "config.json").read_text())["shoal"]
    assert (note["base_layers"], note["base"]["layers"]) == ([2, 3, 4], {"decoder": 6})
    save_plan(Plan.identity(inspect(base.model)), tmp_path / "plan.json")  # the folder's fingerprint is the file's
    shoal(["write", whole, "--plan", tmp_path / "plan.json", "--output", out, "--overwrite"])
    assert "U525" in shoal(["write", whole, "--output", out, "--device", "cpu"], 1)
    assert "U525" in shoal(["write", folder, "--output", out, "--stream"], 1)
    assert "U525" in shoal(["write", folder, "--plan", "0-3", "--output", tmp_path / "f", "--outtype", "f16"], 1)
    assert "W220" in shoal(["write", whole, "--output", out], 1)


def test_while_a_file_is_converted_it_is_read_once(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "base.gguf")
    own = (gguf.GGUFReader, gguf.get_tensor_name_map)
    with gguf_read_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(str(file), "r") is read_fields(file)
        arch = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(arch, 3) is gguf.get_tensor_name_map(arch, 3)
        assert gguf.get_tensor_name_map(arch, 3).mapping == own[1](arch, 3).mapping
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    assert read_fields(file) is not read_fields(file)  # a file may change between two calls
