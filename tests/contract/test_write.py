"""Writing a folder and proving it: sound folders pass, planted faults do not, and the disk is never left in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from shoal.errors import ModelError, PlanError
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.models.meta import meta_model
from shoal.plan import Plan, load_plan, parse_plan
from shoal.writing import proof as proof_module
from shoal.writing.folder import verify, write
from shoal.writing.lineage import original_layers
from shoal.writing.proof import Proof, prove_many
from shoal.writing.reference import Reference, counted_reference, live_reference

from .families import tiny

SOUND = {
    "llama": ("0,2,1,3", "0,1x2,3", "0,2m,1a,3"),
    "qwen2": ("0-1,3",),
    "gemma3_text": ("1-3",),
    "gpt2": ("0,3",),
    "mamba2": ("0-1,3",),
    "jamba": ("0-1",),
    "qwen3_moe": ("0,2-3",),
}


def plan_of(model: Any, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(model)))


def model_of(family: str) -> Any:
    return tiny(family, "eager" if family == "mamba2" else "sdpa")


def loaded_of(family: str = "llama", **facts: Any) -> Loaded:
    return Loaded(model_of(family), facts.pop("tokenizer", None), facts.pop("source", f"tiny-{family}"), **facts)


def quick(output: Path, text: str = "0,2-3", **options: Any) -> Any:
    """A write of the tiny llama without a proof."""
    loaded = options.pop("loaded", None) or loaded_of()
    return write(loaded, plan_of(loaded.model, text), output, prove=False, **options)


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    new = change(tensors.pop(name).clone())
    save_file(tensors | ({} if new is None else {name: new}), file, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    """One number, by so little that no logit shows it."""
    tensor.view(-1)[0] *= 1 + 1e-6
    return tensor


FAULTS: dict[str, tuple[str, str, Callable[[Path], None], set[str]]] = {
    "a perturbed tensor": (
        "llama",
        "0,2-3",
        lambda d: change_tensor(d, "model.layers.1.mlp.up_proj.weight", lambda t: t * 1.05),
        {"weights", "logits uncached", "logits cached"},
    ),
    "one number, a millionth off": (
        "llama",
        "0,2-3",
        lambda d: change_tensor(d, "model.layers.1.mlp.up_proj.weight", nudge),
        {"weights"},
    ),
    "a missing tensor": (
        "llama",
        "0,2-3",
        lambda d: change_tensor(d, "model.layers.2.mlp.up_proj.weight", lambda t: None),
        {"loads", "weights"},
    ),
    "a layer too few in the config": (
        "llama",
        "0,2-3",
        lambda d: change_config(d, num_hidden_layers=2),
        {"loads", "weights", "depth", "parameters", "logits uncached"},
    ),
    "the order of layer_types turned": (
        "qwen2",
        "0-2",
        lambda d: change_config(d, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        {"logits uncached", "KV rows"},
    ),
    "wrong layer_types": (
        "gemma3_text",
        "0-2",
        lambda d: change_config(d, layer_types=["full_attention"] * 3),
        {"logits uncached", "KV held", "KV rows"},
    ),
    "a window of another size": (
        "mistral",
        "0-2",
        lambda d: change_config(d, sliding_window=7),
        {"logits uncached", "KV held", "KV rows"},
    ),
    "a config that no model can be built from": ("gpt2", "0-2", lambda d: change_config(d, n_head=5), {"loads"}),
}


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    """All sound and all faulty folders, proven by one fresh process."""
    root = tmp_path_factory.mktemp("folders")
    jobs: dict[str, tuple[Path, Reference]] = {}

    def add(name: str, family: str, text: str) -> Path:
        model = model_of(family)
        plan = plan_of(model, text)
        place = root / str(len(jobs))
        write(loaded_of(family), plan, place, prove=False, zero_parts=True)
        jobs[name] = (place, live_reference(model, plan, greedy=(2, 8)))
        return place

    for family, texts in SOUND.items():
        for text in texts:
            add(f"{family} {text}", family, text)
    for name, (family, text, spoil, _) in FAULTS.items():
        spoil(add(name, family, text))
    place, reference = jobs["llama 0,2,1,3"]
    expected = reference.expected
    wrong = replace(expected, kv_per_token=expected.kv_per_token + 1, kv_elements=1)
    jobs["a wrong KV expectation"] = (place, replace(reference, expected=wrong))
    config = AutoConfig.from_pretrained(place)
    with_digest = counted_reference(meta_model(config), device="cpu", digest="sha256:0")
    jobs["its own config"] = (place, replace(with_digest, expected=replace(with_digest.expected, digest=None)))
    jobs["its own config, tensors changed"] = (place, with_digest)
    return dict(zip(jobs, prove_many(list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", [f"{family} {text}" for family, texts in SOUND.items() for text in texts])
def test_a_sound_folder_passes(proofs: dict[str, Proof], name: str) -> None:
    proof = proofs[name]
    assert proof.passed, [str(check) for check in proof.failures]
    values = {check.name: check.value for check in proof.checks}
    assert {"loads", "weights", "logits uncached", "logits cached", "logits padded", "greedy tokens"} <= set(values)
    assert {"parameters", "depth", "KV per token", "KV held"} <= set(values)
    assert ("KV rows" in values) == ("m" not in name.split()[1])


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(proofs: dict[str, Proof], name: str) -> None:
    failures = {check.name for check in proofs[name].failures}
    wanted = FAULTS[name][3]
    assert wanted <= failures
    if wanted == {"weights"}:
        assert failures == {"weights"}


def test_a_wrong_expectation_of_the_kv_is_found(proofs: dict[str, Proof]) -> None:
    assert {check.name for check in proofs["a wrong KV expectation"].failures} == {"KV per token", "KV held"}


def test_without_a_base_a_folder_is_held_to_its_own_config(proofs: dict[str, Proof]) -> None:
    proof = proofs["its own config"]
    assert proof.passed, [str(check) for check in proof.failures]
    names = [check.name for check in proof.checks]
    assert names == ["loads", "logits cached", "parameters", "depth", "KV per token", "KV held", "references"]
    assert [check.name for check in proofs["its own config, tensors changed"].failures] == ["weights"]


def test_a_near_tie_may_part_but_nothing_else() -> None:
    from shoal.writing.checks import conclusions, limit_for

    limit = limit_for("float32", 10.0)
    reference = live_reference(tiny("llama"), plan_of(tiny("llama"), "0-2"), greedy=(1, 4))
    tokens = reference.greedy[0][0]
    other = [*tokens[:2], tokens[2] + 1, 0]
    answer = {"keys": {}, "weights": {}, "logits": {}, "cached_uncached": {}, "largest": 1.0, "kv": None}
    answer |= {"parameters": 0, "depth": 0, "greedy": [other]}
    for gap, passes in ((0.5 * limit, True), (1.9 * limit, True), (2.1 * limit, False)):
        close = replace(reference, greedy=((tokens, [1.0, 1.0, gap, 1.0]),))
        check = next(c for c in conclusions(close, answer) if c.name == "greedy tokens")
        assert check.passed is passes
        assert ("near tie" in check.how) is passes


def test_the_limit_follows_the_dtype() -> None:
    from shoal.writing.checks import limit_for

    assert limit_for("float32", 30.0) == 1e-4
    assert 0.07 < limit_for("float16", 20.0) < 0.1
    assert 0.5 < limit_for("bfloat16", 20.0) < 0.7


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "The", "harbour", "was", "quiet", ","])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 - a token of text
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")  # noqa: S106
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it comes from the hub, with things that must be copied and things that must not."""
    place = tmp_path_factory.mktemp("hub") / "base"
    tiny("llama").save_pretrained(place)
    small_tokenizer().save_pretrained(place)
    (place / "LICENSE").write_text("Apache License\n  Version 2.0, January 2004\n ...")
    (place / "USE_POLICY.md").write_text("be kind")
    (place / "modeling_own.py").write_text("print('code')")
    (place / "tokenizer_helper.py").write_text("print('code')")
    (place / "vocab.big.txt").write_text("x" * 5_000_001)
    (place / "tokenizer.model").write_bytes(b"\0\1\2")
    (place / "notes.txt").write_text("unrelated")
    (place.parent / "secret").write_text("secret")
    (place / "NOTICE").symlink_to(place.parent / "secret")
    (place / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Base\n")
    return place


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[tuple[int, int, str]]]:
    loaded = load(source, dtype="float32", device="cpu")
    told: list[tuple[int, int, str]] = []
    done = write(
        loaded,
        plan_of(loaded.model, "0,2-3"),
        tmp_path_factory.mktemp("out") / "pruned|one",
        records=[{"what": "prune", "numbers": {"é": 1}}, {"what": "evaluate"}],
        page=lambda proof: f"<html>{proof.passed}</html>",
        card=[{"name": "perplexity", "unit": "", "dense": 10.5, "pruned": 12.25, "how": "a|b\nc"}],
        command="shoal prune base --drop 1",
        config="verb: prune\n",
        shard_size="60KB",
        progress=lambda *facts: told.append(facts),
    )
    return done, told


def test_a_written_folder_is_whole(written: Any, source: Path) -> None:
    done, told = written
    folder = done.folder
    assert done.proof.passed
    assert "worst of 2" in next(c.how for c in done.proof.checks if c.name == "logits uncached"), "random ids and text"
    assert done.changed == {"num_hidden_layers": (4, 3)}
    assert told[0][:2] == (0, 3) and told[-1][:2] == (3, 3)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= names
    assert {"USE_POLICY.md", "README.md", "report.html", "model.safetensors.index.json", "shoal"} <= names
    assert not names & {
        "modeling_own.py",
        "tokenizer_helper.py",
        "vocab.big.txt",
        "tokenizer.model",
        "notes.txt",
        "NOTICE",
    }
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1 and done.bytes == sum(file.stat().st_size for file in shards)
    assert len({file.stat().st_mode for file in folder.iterdir() if file.is_file()}) == 1
    assert list(folder.parent.iterdir()) == [folder]
    lines = (folder / "shoal" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["what"] for line in lines] == ["prune", "evaluate"]
    saved = json.loads((folder / "shoal" / "proof.json").read_text())
    assert saved["passed"] and saved["format"] == "shoal-proof/1"
    assert saved["environment"]["transformers"] and saved["environment"]["dtype"] == "float32"
    assert (folder / "report.html").read_text() == "<html>True</html>"
    assert (folder / "shoal" / "config.yaml").read_text() == "verb: prune\n"
    assert load_plan(folder).base.source == str(source)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_model_card_says_what_was_done(written: Any) -> None:
    text = (written[0].folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["shoal", "pruned", "layer-pruning"],
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
    }
    assert "| perplexity | 10.5 | 12.25 |  | a\\|b c |" in body
    assert "0,2-3\n█·██" in body and "Left out: 1." in body
    assert "shoal prune base --drop 1" in body and "from_pretrained('pruned|one')" in body
    assert str(written[0].folder.parent) not in text


def test_config_json_says_where_the_layers_come_from(written: Any) -> None:
    note = json.loads((written[0].folder / "config.json").read_text())["shoal"]
    assert note["base_layers"] == [0, 2, 3] and note["plan"] == "0,2-3"
    assert note["base"]["source"] == "base" and note["base"]["layers"] == {"decoder": 4}


def test_verify_repeats_the_proof_from_the_source(written: Any) -> None:
    told: list[Any] = []
    proof = verify(written[0].folder, greedy=(1, 4), progress=lambda *facts: told.append(facts))
    assert proof.passed and proof.against == "the live plan"
    assert [(check.name, check.limit) for check in proof.checks] == [(c.name, c.limit) for c in written[0].proof.checks]
    assert told == [(0, 1, "verify"), (1, 1, "verify")]


def test_verify_says_when_it_has_no_base(written: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def answer(jobs: Any, *, against: str) -> list[Proof]:
        asked.extend(jobs)
        return [Proof(True, (), against=against)]

    monkeypatch.setattr(proof_module, "prove_many", answer)
    folder = quick(tmp_path / "out", loaded=loaded_of(source="no-such-place")).folder
    assert "the base is not to be had (M307" in verify(folder).against
    other = tmp_path / "other"
    tiny("qwen3").save_pretrained(other)
    file = folder / "shoal" / "plan.json"
    file.write_text(file.read_text().replace("no-such-place", str(other)))
    assert f"{other} is another model now" in verify(folder).against
    for _, reference in asked:
        assert (
            reference.expected.depth == 3 and reference.expected.weights is None and reference.expected.digest is None
        )
    with pytest.raises(PlanError, match="P101"):
        verify(folder, load(other))


def test_verify_without_a_base_remembers_the_tensors(
    written: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = json.loads((written[0].folder / "shoal" / "proof.json").read_text())["environment"]["weights"]
    monkeypatch.setattr(proof_module, "load", lambda *_, **__: (_ for _ in ()).throw(ModelError("gone", code="M307")))
    monkeypatch.setattr(proof_module, "prove_many", lambda jobs, *, against: [jobs[0][1].expected.digest])
    assert known.startswith("sha256:") and verify(written[0].folder) == known


def test_a_damaged_base_note_is_ignored(tmp_path: Path) -> None:
    config = quick(tmp_path / "one").folder / "config.json"
    for note in (
        3,
        {"base": {}, "base_layers": [0]},
        {"base": {}, "base_layers": ["0", "1", "2"]},
        {"base_layers": [0, 2, 3]},
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"shoal": note}))
        assert original_layers(AutoConfig.from_pretrained(tmp_path / "one")) == (0, 1, 2)


def test_the_original_numbers_survive_repeated_pruning(tmp_path: Path) -> None:
    first = quick(tmp_path / "one", "0,2a,3,1", zero_parts=True).folder
    second = load(first, device="cpu")
    quick(tmp_path / "two", "3,1,1m,2", loaded=second, zero_parts=True)
    config = AutoConfig.from_pretrained(tmp_path / "two")
    assert original_layers(config) == (1, 2, 2, 3)
    assert config.shoal["plan"] == "1,2a,3"  # the other run of 2 has neither part left
    assert config.shoal["silent"] == [[1, "mlp"], [2, "attention"], [2, "mlp"]]
    assert config.shoal["base"]["source"] == "tiny-llama"
    third = load(tmp_path / "two", device="cpu")
    quick(tmp_path / "three", "1,0", loaded=third)
    config = AutoConfig.from_pretrained(tmp_path / "three")
    assert original_layers(config) == (2, 1) and config.shoal["plan"] == "2a,1"
    assert "its own base, the layers are 2, 1" in (tmp_path / "three" / "README.md").read_text()


def test_the_base_is_not_changed(tmp_path: Path) -> None:
    model = tiny("gemma3_text")
    before = model.config.to_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    write(loaded_of("gemma3_text"), plan_of(model, "1-3"), tmp_path / "out", prove=False)
    assert model.config.to_dict() == before[0]
    assert all(torch.equal(t, before[1][name]) for name, t in model.state_dict().items())
