"""Models that read pictures and text: the decoder is planned, with and without a picture, and the rest is carried."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from shoal.errors import ModelError, PlanError, ShoalError
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.inputs import sample_inputs
from shoal.models.inspect import inspect
from shoal.models.kinds import PICTURES, auto_for, auto_of, is_causal, require_causal, require_text
from shoal.models.load import load
from shoal.models.meta import meta_model
from shoal.models.stacks import find_stacks
from shoal.plan import Plan, parse_plan
from shoal.writing.stream import stream
from shoal.writing.surgery import blueprint, rewrite

from ..survey.picture_models import Inputs, answers, picture_prompt, text_prompt, tiny_pictures
from .test_cli import shoal

LIMIT, SEEN = 1e-4, 1e-3
TYPES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "idefics3", "paligemma", "internvl", "mistral3",
    "glm4v",
)  # fmt: skip
PLAN = "0-2,4,5"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())[64:96]


@cache
def tiny(model_type: str) -> PreTrainedModel:
    """The type's tiny model, the same for every test; nobody may change it for good."""
    return tiny_pictures(model_type)


@cache
def prompts(model_type: str) -> dict[str, Inputs]:
    """A text, and one with a picture."""
    return {"text": text_prompt(tiny(model_type)), "picture": picture_prompt(tiny(model_type))}


def plan_of(model: PreTrainedModel, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(model)))


def refusal(code: str, of: type[ShoalError], *words: str) -> Any:
    return pytest.raises(of, match=rf"{code}.*" + ".*".join(words))


def apart(one: Inputs, other: Inputs) -> float:
    """The largest difference of any two answers."""
    assert one.keys() == other.keys()
    return max((value - other[name]).abs().max().item() for name, value in one.items())


@pytest.mark.parametrize("name", TYPES)
def test_the_decoder_is_the_one_stack_and_text_is_read_alone(name: str) -> None:
    model = tiny(name)
    assert auto_of(model) == auto_for(model.config.__class__(architectures=[type(model).__name__])) == PICTURES
    (stack,) = find_stacks(model)
    assert (stack.name, stack.depth, is_causal(model)) == ("decoder", 6, True)
    assert stack.config is model.config.get_text_config(decoder=True)
    spec, empty = inspect(model), inspect(meta_model(model.config, like=model))
    assert (empty.fingerprint, empty.params) == (spec.fingerprint, sum(p.numel() for p in model.parameters()))
    assert all(layer.attention and layer.mlp and layer.kv.per_token for layer in spec.stack().layers)
    assert set(sample_inputs(model, "cpu")) == {"input_ids", "attention_mask"}
    require_causal(model, "evaluate")
    require_text(model, "the measure")


@pytest.mark.parametrize("name", TYPES)
def test_a_plan_computes_live_what_the_rewritten_model_computes_with_a_picture(name: str) -> None:
    """In one pass, in passes over a cache, and by generate; the whole model bit for bit, before and after."""
    model, prompt = tiny(name), prompts(name)["picture"]
    plan = plan_of(model, PLAN)
    whole = answers(model, prompt)
    assert set(whole) == {"uncached", "written"} | ({"cached"} if name != "paligemma" else set())
    with running(model, Plan.identity(inspect(model))):
        assert torch.equal(answers(model, prompt, ["uncached"])["uncached"], whole["uncached"])
    with running(model, plan):
        live = answers(model, prompt, whole)
        other = answers(model, prompt | {"pixel_values": -prompt["pixel_values"]}, ["uncached"])
    assert torch.equal(answers(model, prompt, ["uncached"])["uncached"], whole["uncached"])
    assert (live.get("cached", live["uncached"]) - live["uncached"]).abs().max() < LIMIT
    assert min((live["uncached"] - one["uncached"]).abs().max() for one in (whole, other)) > SEEN
    made = rewrite(model, plan)
    assert apart(answers(made, prompt, whole), live) < LIMIT
    _all_but_the_decoder_is_carried(model, made)


def _all_but_the_decoder_is_carried(model: PreTrainedModel, made: PreTrainedModel) -> None:
    """Bit for bit."""
    path = find_stacks(model)[0].path + "."
    old = {key: t for key, t in model.state_dict().items() if not key.startswith(path)}
    new = {key: t for key, t in made.state_dict().items() if not key.startswith(path)}
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert find_stacks(made)[0].depth == 5
    before, after = (one.config.vision_config.to_dict() | {"dtype": None} for one in (model, made))
    assert before == after


def test_features_that_enter_behind_the_first_layers_keep_their_places_or_the_plan_is_not_written() -> None:
    """DeepStack of Qwen3-VL: the stock class counts its own layers, and the loop adds the features live."""
    model = tiny("qwen3_vl")
    assert model.config.vision_config.deepstack_visual_indexes == [0]
    for text in ("1-5", "1,0,2-5", "0,0-5", "2-5"):
        with refusal("P151", PlanError, "decoder layer 0", "begin the plan with layer 0"):
            blueprint(model, plan_of(model, text))
    picture = prompts("qwen3_vl")["picture"]
    for text in ("1-5", "0,0-5"):  # live it runs, and what is cached is what is not
        with running(model, plan_of(model, text)):
            live = answers(model, picture, ["uncached", "cached"])
        assert (live["cached"] - live["uncached"]).abs().max() < LIMIT
    deeper = model.config.__class__.from_dict(model.config.to_dict())
    deeper.vision_config.deepstack_visual_indexes = [0, 1]
    three = meta_model(deeper, like=model)
    with refusal("P151", PlanError, "decoder layer 1", "layers 0 to 1"):
        blueprint(three, plan_of(three, "0,2-5"))
    blueprint(three, plan_of(three, "0,1,4,3"))


@pytest.mark.parametrize(
    ("text", "pairs", "plain"),
    [
        (PLAN, [[-1, 1], [-2, 2]], [3, 4]),
        ("1-5", [[-1, 0], [-2, 1]], [3, 4]),
        ("1,0,2,2-5", [[-1, 0], [-2, 2]], [5, 6]),
    ],
)
def test_layers_before_which_features_enter_are_renumbered(text: str, pairs: Any, plain: Any) -> None:
    """Granite 4 Vision names them in its config: [[-1, 1], [-2, 2]] and [4, 5]."""
    model = tiny("granite4_vision")
    plan = plan_of(model, text)
    made = rewrite(model, plan)
    assert (made.config.deepstack_layer_map, made.config.spatial_target_layers) == (pairs, plain)
    picture = prompts("granite4_vision")["picture"]
    with running(model, plan):
        live = answers(model, picture)
    assert apart(answers(made, picture, live), live) < LIMIT


def test_features_that_would_be_lost_or_meet_are_refused() -> None:
    model = tiny("granite4_vision")
    with refusal("P152", PlanError, "decoder layer 5", "no layer of the plan comes after"):
        blueprint(model, plan_of(model, "0-4"))
    with refusal("P152", PlanError, "decoder layer 2", "before layer 1 would be too"):
        blueprint(model, plan_of(model, "0,2-5"))


def test_a_picture_seen_before_moves_no_text() -> None:
    """Qwen2-VL keeps by how much the last picture moved the positions of what comes after it."""
    model = tiny("qwen2_vl")
    picture, text = prompts("qwen2_vl")["picture"], prompts("qwen2_vl")["text"]
    with torch.no_grad():
        model(**picture)
        kept = model.model.rope_deltas
        assert kept is not None and int(kept) != 0
        with evaluating(model):
            assert model.model.rope_deltas is None
            model(**text)
        assert model.model.rope_deltas is kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL in a folder, with a tokenizer and files for pictures and films beside it."""
    place = tmp_path_factory.mktemp("pictures") / "qwen2_vl"
    model = tiny("qwen2_vl")
    model.save_pretrained(place)
    words = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(place)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (place / name).write_text(json.dumps({"do_resize": True}), encoding="utf-8")
    return place


def test_the_command_line_prunes_and_proves_and_the_processor_goes_along(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    said = json.loads(shoal("inspect", str(folder), "--json"))
    assert [(s["name"], len(s["layers"])) for s in said["stacks"]] == [("decoder", 6)]
    shoal("write", str(folder), "--plan", PLAN, "--output", str(out))
    assert json.loads((out / "shoal" / "proof.json").read_text())["passed"]
    config = json.loads((out / "config.json").read_text())
    assert (config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"]) == (5, 2)
    assert {"preprocessor_config.json", "video_preprocessor_config.json"} <= {file.name for file in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "AutoProcessor.from_pretrained" in card
    made = AutoModelForImageTextToText.from_pretrained(out)
    picture = prompts("qwen2_vl")["picture"]
    with running(tiny("qwen2_vl"), plan_of(tiny("qwen2_vl"), PLAN)):
        live = answers(tiny("qwen2_vl"), picture)
    assert apart(answers(made, picture, live), live) < LIMIT
    assert "sound" in shoal("doctor", str(out))


def test_a_streamed_write_copies_the_tower(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny("qwen2_vl"), PLAN)
    assert stream(folder, plan, tmp_path / "streamed").proof.passed
    made = load(tmp_path / "streamed", device="cpu")
    assert type(made.model) is type(tiny("qwen2_vl"))
    wanted = rewrite(tiny("qwen2_vl"), plan).state_dict()
    found = made.model.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_what_cannot_be_planned_is_refused_without_a_remedy_that_does_not_help() -> None:
    with refusal("M303", ModelError, "mllama_text_model", "only with a picture"):
        find_stacks(tiny("mllama"))
    headless = AutoModel.from_config(tiny("qwen2_vl").config)
    with refusal("M385", ModelError, "Qwen2VLModel reads pictures", "architectures"):
        sample_inputs(headless, "cpu")
