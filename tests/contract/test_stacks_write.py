"""Other models than causal ones through what users call: written, proved, streamed, pruned by position, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

import shoal
from shoal.api.assess import bench, evaluate
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.cli.inspect import _text
from shoal.data import Data, DataInfo
from shoal.errors import ModelError, ShoalError, WriteError
from shoal.live import running
from shoal.models.load import Loaded, inspect_source, load
from shoal.models.meta import meta_model
from shoal.writing.folder import write
from shoal.writing.lineage import original_layers
from shoal.writing.proof import prove_many
from shoal.writing.reference_kinds import counted_kind, kind_reference
from shoal.writing.stream import stream

from .kinds import apart, equal, inputs_of, kind, plan_of, returned

PLANS = {"bert": "0,2-5", "t5": "encoder: 0,3-5; decoder: 0,5", "bart": "encoder: 0,3-5; decoder: 0,5", "clip": "1-3"}


def refusal(code: str, of: type[ShoalError], *words: str) -> Any:
    return pytest.raises(of, match=rf"{code}.*" + ".*".join(words))


def loaded_of(name: str, tokenizer: Any = None, folder: Path | None = None) -> Loaded:
    return Loaded(kind(name), tokenizer, f"tiny-{name}", folder)


def quick(name: str, output: Path, text: str | None = None, folder: Path | None = None) -> Any:
    """A write without a proof."""
    return write(loaded_of(name, folder=folder), plan_of(kind(name), text or PLANS[name]), output, prove=False)


def tokens(count: int = 3, length: int = 16) -> Data:
    """Random sequences."""
    ids = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))
    return Data(ids, None, DataInfo("random", "whole", length, count, length, "none", count * length, "0"))


def word_tokenizer() -> PreTrainedTokenizerFast:
    unknown = "[UNK]"
    words = Tokenizer(models.WordLevel({unknown: 3, "the": 4}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown, pad_token=unknown)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every plan of `PLANS` written."""
    root = tmp_path_factory.mktemp("written")
    for name in PLANS:
        quick(name, root / name)
    return {name: root / name for name in PLANS}


def test_sound_folders_pass_and_planted_faults_do_not(folders: dict[str, Path], tmp_path: Path) -> None:
    """One fresh process answers for all: sound folders against live plans, one against its own config, two faults."""
    jobs, names = [], []
    for name, folder in folders.items():
        tokenizer = word_tokenizer() if name == "t5" else None
        plan = plan_of(kind(name), PLANS[name])
        jobs.append((folder, kind_reference(kind(name), plan, tokenizer=tokenizer, greedy=(3, 8))))
        names.append(name)
    alone = AutoModel.from_pretrained(folders["bert"]).config
    jobs.append((folders["bert"], counted_kind(meta_model(alone), device="cpu")))
    wrong = quick("t5", tmp_path / "wrong").folder
    tensors = load_file(wrong / "model.safetensors")
    tensors["decoder.block.0.layer.1.EncDecAttention.v.weight"].mul_(1.5)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    jobs.append((wrong, jobs[names.index("t5")][1]))
    shallow = quick("bart", tmp_path / "shallow", "encoder: 0,3-4; decoder: 0,5").folder
    jobs.append((shallow, jobs[names.index("bart")][1]))
    found = prove_many(jobs)
    assert [str(check) for proof in found[:5] for check in proof.failures] == []
    assert {check.name for check in found[1].checks} == {
        "loads", "weights", "outputs", "greedy tokens", "parameters", "depth of encoder", "depth of decoder", "KV held",
        "references",
    }  # fmt: skip
    assert {check.name for check in found[3].checks} >= {"outputs", "depth of vision", "depth of text"}
    assert {check.name for check in found[5].failures} >= {"weights", "outputs"}
    assert {check.name for check in found[6].failures} >= {"weights", "outputs", "parameters", "depth of encoder"}


def test_a_folder_says_what_it_is(folders: dict[str, Path]) -> None:
    t5 = inspect_source(folders["t5"])
    assert [(s.name, s.depth, s.path) for s in t5.stacks] == [
        ("encoder", 4, "encoder.block"),
        ("decoder", 2, "decoder.block"),
    ]
    assert "encoder: 4 layers of width 32" in _text(t5) and "decoder: 2 layers" in _text(t5)
    config = json.loads((folders["clip"] / "config.json").read_text())
    assert (config["vision_config"]["num_hidden_layers"], config["text_config"]["num_hidden_layers"]) == (3, 6)
    assert config["shoal"]["base_layers"] == {"vision": [1, 2, 3], "text": [0, 1, 2, 3, 4, 5]}
    card = (folders["t5"] / "README.md").read_text()
    assert "encoder 4 layers in place of 6, decoder 2 layers in place of 6" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "Left out of decoder: 1, 2, 3, 4." in card


def test_repeated_pruning_keeps_the_first_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    again = load(folders["t5"], device="cpu")
    assert type(again.model).__name__ == "T5ForConditionalGeneration"
    note = write(again, plan_of(again.model, "encoder: 1-3; decoder: 1"), tmp_path / "out", prove=False).folder
    found = json.loads((note / "config.json").read_text())["shoal"]
    assert found["base_layers"] == {"encoder": [3, 4, 5], "decoder": [5]}
    assert found["plan"] == "encoder: 3-5; decoder: 5" and found["base"]["layers"] == {"encoder": 6, "decoder": 6}
    bert = load(folders["bert"], device="cpu")
    assert original_layers(bert.model.config) == (0, 2, 3, 4, 5)


def test_an_encoder_is_streamed_as_it_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(load(folders["bert"], device="cpu").model, "1-2,4")
    done = stream(folders["bert"], plan, tmp_path / "streamed")
    write(load(folders["bert"], device="cpu"), plan, tmp_path / "written", prove=False)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "written"))
    assert done.proof.passed and equal(ours, theirs)
    assert "AutoModelForMaskedLM" in (tmp_path / "streamed" / "README.md").read_text()
    with refusal("W240", WriteError, "several stacks", "without --stream"):
        stream(folders["t5"], plan_of(load(folders["t5"], device="cpu").model, "decoder: 0"), tmp_path / "no")


def sentence_folder(place: Path, dense: str = "model.safetensors") -> Path:
    """The written bert as a sentence-transformers folder."""
    quick("bert", place)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "sentence_bert_config.json").write_text("{}")
    for name in ("1_Pooling", "2_Dense"):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps({"of": name}))
    save_file({"linear.weight": torch.ones(2, 2)}, place / "2_Dense" / dense)
    return place


def test_a_sentence_transformers_folder_stays_one(tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "source")
    out = quick("bert", tmp_path / "out", folder=source).folder
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "3_Normalize").exists()


@pytest.mark.parametrize(
    ("modules", "dense", "words"),
    [
        ('[{"path": "../source"}]', "model.safetensors", "no folder beside it"),
        ('[{"path": "2_Dense"}]', "pytorch_model.bin", "only as pickle"),
    ],
)
def test_modules_that_cannot_be_copied_are_refused(modules: str, dense: str, words: str, tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "source", dense)
    (source / "modules.json").write_text(modules)
    with refusal("W243", WriteError, words):
        quick("bert", tmp_path / "out", folder=source)
    assert [place.name for place in tmp_path.iterdir()] == ["source"]


def test_layers_go_by_their_position_in_the_named_stack() -> None:
    loaded = loaded_of("bart")
    found = prune(loaded, method="position", drop=4, stack="decoder", settings={"which": "last"})
    assert str(found.plan) == "encoder: 0-5; decoder: 0-1"
    pictures = prune(loaded_of("vit"), method="position", keep=0.5, settings={"which": "alternate"})
    assert pictures.plan.dropped() == (0, 2, 4) and pictures.data is None


READ = [("bert", "encoder"), ("t5", "encoder"), ("t5", "decoder"), ("clip", "text")]


@pytest.mark.parametrize(("name", "stack"), READ)
def test_block_influence_judges_the_layers_of_the_named_stack(name: str, stack: str) -> None:
    model = kind(name)
    scores = measure(Loaded(model, None, name), data=tokens(), stack=stack)
    assert scores.stack == stack and len(scores.values) == 6 and min(scores.values) > 1e-4
    with running(model, plan_of(model, f"{stack}: 0-3,5")):
        under = torch.tensor(measure(Loaded(model, None, name), data=tokens(), stack=stack).values)
    assert under.isnan().tolist() == [False, False, False, False, True, False]
    assert under[:4].tolist() == pytest.approx(scores.values[:4]) and under[5] != scores.values[5]


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: evaluate(loaded_of("bert"), data=tokens()), "M322"),
        (lambda: bench(loaded_of("t5")), "M322"),
        (lambda: measure(loaded_of("bert"), "loss-removed", data=tokens()), "M322"),
        (lambda: prune(loaded_of("t5"), method="sleb", drop=1, data=tokens()), "M322"),
        (lambda: prune(loaded_of("bert"), plan="0-4", assess=True), "M322"),
        (lambda: measure(loaded_of("vit")), "M323"),
        (lambda: prune(loaded_of("dinov2"), drop=1), "M323"),
        (lambda: measure(loaded_of("clip"), data=tokens(), stack="vision"), "M323"),
    ],
)
def test_what_such_a_model_cannot_be_asked_is_refused(call: Any, code: str) -> None:
    with refusal(code, ModelError):
        call()


def test_the_verbs_of_python_take_any_kind(tmp_path: Path) -> None:
    kind("vit").save_pretrained(tmp_path / "vit")
    loaded = shoal.load(tmp_path / "vit", device="cpu")
    assert type(loaded.model).__name__ == "ViTForImageClassification" and loaded.tokenizer is None
    inputs = inputs_of(loaded.model)
    with shoal.running(loaded.model, "0-2,5"):
        live = returned(loaded.model, inputs)
    assert apart(returned(shoal.rewrite(loaded.model, plan_of(loaded.model, "0-2,5")), inputs), live) < 1e-5
