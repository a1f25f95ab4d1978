"""GGUF out: blocks and per-layer metadata follow the plan, converted tensors are what transformers reads back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gguf_files import MODELS, TEXT, VOCAB, raw_file, tiny_model, tiny_tokenizer
from shoal.cli import app
from shoal.errors import ModelError, PlanError, ShoalError, WriteError
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, parse_plan, save_plan
from shoal.writing.gguf_out import converted as converted_module
from shoal.writing.gguf_out import published, rules, vocab
from shoal.writing.gguf_out.converted import converted, sketched
from shoal.writing.gguf_out.copied import drawn
from shoal.writing.gguf_out.families import FAMILIES, family_of
from shoal.writing.gguf_out.source import open_source, spec_of
from shoal.writing.gguf_out.write import convert_model, copy_file, plan_for
from shoal.writing.place import refuse_output

ARRAYS: dict[str, list[Any]] = {
    "attention.head_count": [1, 2, 3, 4, 5, 6],
    "attention.head_count_kv": [6, 5, 4, 3, 2, 1],
    "feed_forward_length": [10, 20, 30, 40, 50, 60],
    "attention.sliding_window_pattern": [True, True, False, True, False, False],
    "rope.dimension_sections": [1, 1, 2, 2, 3, 3],
}


def contents(file: Path, key: str) -> Any:
    return GGUFReader(file).fields[key].contents()


def tensors(file: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(file).tensors}


def plan_on(file: Path, text: str) -> Plan:
    return plan_for(open_source(file), text, str(file))[0]


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(ShoalError) as found:
        call()
    assert found.value.code == code, str(found.value)
    return str(found.value)


@settings(max_examples=6)
@given(slots=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_blocks_and_per_layer_arrays_follow_any_order(
    slots: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("order")
    base, out = raw_file(place / "base.gguf", arrays=ARRAYS), place / "out.gguf"
    written = copy_file(open_source(base), plan_on(base, ",".join(map(str, slots))), out)
    before, after = tensors(base), tensors(out)
    assert after.keys() == {
        "token_embd.weight",
        "output_norm.weight",
        *(f"blk.{slot}.{name}.weight" for slot in range(len(slots)) for name in ("attn_q", "attn_norm")),
    }
    for slot, layer in enumerate(slots):
        for name in ("attn_q", "attn_norm"):
            assert after[f"blk.{slot}.{name}.weight"] == before[f"blk.{layer}.{name}.weight"]
    assert after["token_embd.weight"] == before["token_embd.weight"]
    assert contents(out, "openelm.block_count") == len(slots)
    for key, values in ARRAYS.items():
        whole = key == "rope.dimension_sections"
        assert contents(out, f"openelm.{key}") == (values if whole else [values[i] for i in slots])
    assert contents(out, "general.tags") == ["tiny"] * 6
    assert contents(out, "shoal.base_layers") == list(slots) == list(written.base_layers)
    assert written.proof.passed
    assert written.bytes == out.stat().st_size


def test_lineage_is_composed_over_repeated_pruning(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.gguf", arrays=ARRAYS)
    told: list[tuple[int, int, str]] = []
    copy_file(
        open_source(base),
        plan_on(base, "1,3,5,5"),
        tmp_path / "one.gguf",
        progress=lambda done, total, stage: told.append((done, total, stage)),
    )
    assert {stage for _, _, stage in told} == {"write tensors (MB)", "compare tensors (MB)"}
    one = tmp_path / "one.gguf"
    copy_file(open_source(one), plan_on(one, "0,2-3"), tmp_path / "two.gguf")
    two = tmp_path / "two.gguf"
    assert contents(two, "shoal.base_layers") == [1, 5, 5]
    assert contents(two, "shoal.plan") == "1,5x2"
    assert json.loads(contents(two, "shoal.base")) == json.loads(contents(one, "shoal.base"))
    assert json.loads(contents(one, "shoal.base"))["source"] == "base.gguf"
    assert contents(two, "openelm.feed_forward_length") == [20, 60, 60]


def test_a_type_converts_matrices_and_leaves_vectors(tmp_path: Path) -> None:
    base, out = raw_file(tmp_path / "base.gguf"), tmp_path / "out.gguf"
    copy_file(open_source(base), plan_on(base, "0-3"), out, outtype="f16")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    assert kinds["blk.3.attn_q.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.3.attn_norm.weight"] == "F32"
    assert contents(out, "general.file_type") == 1


def test_sliding_layers_are_listed_when_the_rule_would_give_another_kind(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.gguf", "gemma3", numbers={"attention.sliding_window": 8})
    key = "gemma3.attention.sliding_window_pattern"
    copy_file(open_source(base), plan_on(base, "0-3"), tmp_path / "prefix.gguf")
    assert key not in GGUFReader(tmp_path / "prefix.gguf").fields  # layers 0-3 slide where the rule says so
    copy_file(open_source(base), plan_on(base, "0,3-5"), tmp_path / "moved.gguf")
    assert contents(tmp_path / "moved.gguf", key) == [True, True, True, False]
    stated = raw_file(
        tmp_path / "stated.gguf",
        "gemma3",
        numbers={"attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
    )
    copy_file(open_source(stated), plan_on(stated, "0,2,1"), tmp_path / "every.gguf")
    assert contents(tmp_path / "every.gguf", key) == [True, True, False]


def test_files_that_are_no_whole_model_are_refused(tmp_path: Path) -> None:
    short = raw_file(tmp_path / "short.gguf", stated=7)
    assert "7 layers" in refused("W260", lambda: open_source(short))
    split = GGUFWriter(None, "llama")
    split.add_uint16("split.count", 3)
    for step in ("header_to_file", "kv_data_to_file", "ti_data_to_file"):
        getattr(split, f"write_{step}")(*([tmp_path / "split.gguf"] if step == "header_to_file" else []))
    split.close()
    refused("W260", lambda: open_source(tmp_path / "split.gguf"))
    refused("M307", lambda: open_source(tmp_path / "none.gguf"))
    whole = short.read_bytes()
    for name, data in {"empty": b"", "text": b"hello, this is text", "cut": whole[:200], "end": whole[:-40]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        refused("M315", lambda name=name: open_source(tmp_path / f"{name}.gguf"))  # type: ignore[misc]


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_headers_end_in_a_documented_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    whole = bytearray(raw_file(place / "base.gguf", "llama", 2).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    (place / "bad.gguf").write_bytes(bytes(whole))
    try:
        source = open_source(place / "bad.gguf")
        drawn(source, plan_for(source, "0", "bad")[0])
    except ShoalError:
        pass


def test_places_that_llama_cpp_counts_are_refused(tmp_path: Path) -> None:
    def draw(base: Path, text: str) -> Callable[[], object]:
        return lambda: drawn(open_source(base), plan_on(base, text))

    assert "unknown-arch" in refused("W262", draw(raw_file(tmp_path / "a.gguf", "unknown-arch"), "0-3"))
    draw(tmp_path / "a.gguf", "0-5")()  # a copy moves nothing
    counted = raw_file(tmp_path / "b.gguf", "qwen3moe", numbers={"leading_dense_block_count": 1})
    assert "leading_dense_block_count = 1" in refused("W262", draw(counted, "1-5"))
    scaled = raw_file(tmp_path / "c.gguf", "gemma2", 46)
    refused("W263", draw(scaled, "0-40"))
    refused("W263", draw(raw_file(tmp_path / "d.gguf", "gemma3", 63), "0-61"))
    refused("P105", draw(raw_file(tmp_path / "e.gguf"), "0-3,4a"))
    refused("W261", draw(tmp_path / "e.gguf", "0-2,(3|4),5"))
    refused("P103", draw(tmp_path / "e.gguf", "0-6"))


def test_the_output_is_not_taken_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = raw_file(tmp_path / "base.gguf")
    plan, source = plan_on(base, "0-3"), open_source(base)
    refused("W225", lambda: refuse_output(tmp_path / "folder.gguf"))
    refused("W221", lambda: copy_file(source, plan, base, overwrite=True))
    refused("W222", lambda: copy_file(source, plan, tmp_path / "no" / "out.gguf"))
    out = tmp_path / "out.gguf"
    out.write_text("my notes")
    refused("W220", lambda: copy_file(source, plan, out))
    refused("W225", lambda: copy_file(source, plan, out, overwrite=True))
    out.unlink()
    copy_file(source, plan, out)
    before = out.read_bytes()
    monkeypatch.setattr(published, "digest", lambda data: "another")
    assert "weights" in refused("W230", lambda: copy_file(source, plan_on(base, "0-1"), out, overwrite=True))
    monkeypatch.undo()
    monkeypatch.setattr(published, "require_space", lambda *_: None)
    monkeypatch.setattr(published, "write_file", _full)
    refused("W223", lambda: copy_file(source, plan, out, overwrite=True))
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf", "out.gguf"]


def _full(file: Path, *_: object) -> dict[str, str]:
    file.write_bytes(b"GGUF")
    raise OSError(28, "No space left on device")


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
    refused("W266", lambda: converted(no_words, plan_of(base, "0-3")))
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


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    base, other = raw_file(tmp_path / "a.gguf", depth=5), raw_file(tmp_path / "b.gguf")
    save_plan(Plan.identity(spec_of(open_source(base))), tmp_path / "plan.json")
    with pytest.raises(PlanError, match="another model"):
        plan_for(open_source(other), str(tmp_path / "plan.json"), "b")
    (tmp_path / "same").mkdir()
    alike = raw_file(tmp_path / "same" / "c.gguf", "qwen3")
    save_plan(Plan.identity(spec_of(open_source(alike))), tmp_path / "plan.json")
    with pytest.raises(ModelError):  # transformers is asked what the file is, and cannot read it
        plan_for(open_source(other), str(tmp_path / "plan.json"), "b")


def test_types_of_blocks_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.writing.gguf_out import copied

    def unknown(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(copied, "decoded", unknown)
    base = raw_file(tmp_path / "base.gguf")
    with pytest.raises(WriteError, match="Q8_0"):
        copy_file(open_source(base), plan_on(base, "0-3"), tmp_path / "x.gguf", outtype="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]
