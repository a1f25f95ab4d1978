"""An attention run and the mlp run behind it as one layer of a stock model: written, proved, counted, refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shoal.api.outlook import outlook_of
from shoal.errors import WriteError
from shoal.live import running
from shoal.models.examine import LayerFacts
from shoal.models.halves import Halves, follows
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.parts import Parts, reads_attention
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan
from shoal.plan.lineage import lineage_of_folder
from shoal.writing.folder import verify, write
from shoal.writing.proof import Proof, prove_many
from shoal.writing.reference import live_reference
from shoal.writing.surgery import blueprint, rewrite

from .families import VOCAB, tiny
from .kinds import apart, inputs_of, kind, returned
from .kinds import plan_of as plan_of_kind
from .shares import every
from .stream_folders import bases, config_of, content, streamed, weights, written

__all__ = ["bases"]

PLANS: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(
    ("llama", "gpt2", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "mixtral", "gpt_oss", "smollm3",
     "olmo2", "granite", "bloom", "gpt_neo", "stablelm", "starcoder2"),
    ("0,2a,1m,3a,3m", (0, 2, 3)),
) | {
    "qwen2_moe": ("0a,2m,3a,1m", (0, 3)),
    "deepseek_v3": ("1a,0m,3a,2m", (1, 3)),
    "llama4_text": ("0a,2m,1,3a,1m", (0, 1, 3)),
    "jamba": ("0,3a,1m,2", (0, 3, 2)),
}  # fmt: skip
"""By family a plan of halves that are layers together (of mlps that are built alike), and the layer of each slot."""
PARALLEL = ("gpt_neox", "phi", "falcon", "cohere2", "gptj")
EAGER = ("gemma2", "gpt_oss", "bloom", "gpt_neo", "gptj")
"""Families that transformers does not run by sdpa."""
PROVED = (
    "llama", "gpt2", "qwen2", "gemma2", "gemma3_text", "phi3", "opt", "mixtral", "olmo2", "bloom",
)  # fmt: skip
IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones_like(IDS)
LEFT[1, :4] = 0
CLOSE = {"atol": 1e-5, "rtol": 0}


def own(family: str = "llama") -> Any:
    """A tiny model whose norms and biases tell which layer they belong to."""
    model = copy.deepcopy(tiny(family, "eager" if family in EAGER else "sdpa"))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in find_stack(model).layers.named_parameters():
        if parameter.dim() == 1 and "A_log" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def plan_of(model: Any, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(model)))


@torch.no_grad()
def logits(model: Any) -> list[torch.Tensor]:
    """Of one sequence, and of a batch that is padded on the left."""
    one = model(input_ids=IDS[:1]).logits
    return [one, model(input_ids=IDS, attention_mask=LEFT).logits[LEFT.bool()]]


def require_live(model: Any, text: str, own_tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """The stock model of a plan, which computes what the plan computes live."""
    made = rewrite(model, plan_of(model, text), weights=own_tensors)
    with running(model, text, own_tensors):
        live = logits(model)
    for found, wanted in zip(logits(made), live, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    return made


def refused(code: str, why: str) -> Any:
    return pytest.raises(WriteError, match=f"{code}: .*{why}")


@pytest.mark.parametrize("family", every(3, PLANS))
def test_what_is_written_computes_what_runs_live(family: str) -> None:
    model, (text, slots) = own(family), PLANS[family]
    made = require_live(model, text)
    assert blueprint(model, plan_of(model, text)).slots == slots
    assert find_stack(made).depth == len(slots)
    spec = inspect(model)
    parameters = sum(p.numel() for p in made.parameters())
    assert parameters == cost(plan_of(model, text), spec).written_params
    whole = rewrite(model, plan_of(model, ",".join(map(str, slots))))
    assert not torch.allclose(logits(whole)[0], logits(made)[0], atol=1e-3), "the mlps are other layers'"


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    """Ten families, written, and proved by one fresh process."""
    root, jobs = tmp_path_factory.mktemp("folders"), {}
    for family in PROVED:
        model = own(family)
        plan = plan_of(model, PLANS[family][0])
        write(Loaded(model, None, f"tiny-{family}"), plan, root / family, prove=False)
        jobs[family] = root / family, live_reference(model, plan, greedy=(1, 3))
    return dict(zip(jobs, prove_many(list(jobs.values())), strict=True))


@pytest.mark.parametrize("family", PROVED)
def test_ten_families_are_proved(proofs: dict[str, Proof], family: str) -> None:
    """One sequence and left-padded, with and without a cache, to 1e-5; the rows of the cache are the live plan's."""
    proof = proofs[family]
    assert proof.passed, [str(check) for check in proof.failures]
    values = {check.name: check.value for check in proof.checks}
    assert all(values[name] <= 1e-5 for name in ("logits uncached", "logits cached", "logits padded"))
    assert values["depth"] == len(PLANS[family][1]) and values["KV rows"] == "same"


def test_whose_tensors_are_whose() -> None:
    """Gemma's layer has four norms: two around its attention, two around its mlp."""
    model = own("gemma2")
    stock = rewrite(model, plan_of(model, "0,2a,1m,3")).state_dict()
    base = model.state_dict()
    names = {name.removeprefix("model.layers.1.") for name in stock if name.startswith("model.layers.1.")}
    with_mlp = {name for name in names if torch.equal(stock[f"model.layers.1.{name}"], base[f"model.layers.1.{name}"])}
    assert with_mlp == {name for name in names if name.startswith("mlp.") or "_feedforward_" in name}
    assert all(
        torch.equal(stock[f"model.layers.1.{name}"], base[f"model.layers.2.{name}"]) for name in names - with_mlp
    )
    storages = [tensor.data_ptr() for name, tensor in stock.items() if "layers." in name]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("family", every(2, PARALLEL))
def test_parts_that_read_one_input_are_no_layer_together(family: str) -> None:
    model = own(family)
    for text in ("0-1,2a,2m,3", "0,2a,1m,3"):
        plan = plan_of(model, text)
        with refused("W283", "does not read what its attention wrote"):
            blueprint(model, plan)
        made = rewrite(model, plan, zero_parts=True)
        assert sum(p.numel() for p in made.parameters()) == cost(plan, inspect(model)).written_params
        with running(model, plan):
            torch.testing.assert_close(logits(made)[1], logits(model)[1], **CLOSE)


@pytest.mark.parametrize("text", ["0,1m,1a,2-3", "0,1m,2a,3", "0,1a,2,1m,3", "0,1a,2a,3", "0-1,2m,3", "0-3a"])
def test_halves_that_are_left_over_are_refused_as_ever(text: str) -> None:
    model = own()
    with refused("W201", "a stock layer has both attention and mlp"):
        blueprint(model, plan_of(model, text))
    plans = blueprint(model, plan_of(model, text), zero_parts=True)
    assert len(plans.slots) == len(plan_of(model, text).steps()) and not plans.mlps


def test_what_is_left_over_beside_a_layer_is_zeroed() -> None:
    model = own()
    plan = plan_of(model, "0a,1a,0m,2,3m")
    plans = blueprint(model, plan, zero_parts=True)
    assert (plans.slots, plans.zeroed) == ((0, 1, 2, 3), ((0, "mlp"), (3, "attention")))
    assert [(slot, half.layer) for slot, half in plans.mlps] == [(1, 0)]
    made = rewrite(model, plan, zero_parts=True)
    assert sum(p.numel() for p in made.parameters()) == cost(plan, inspect(model)).written_params
    with running(model, plan):
        torch.testing.assert_close(logits(made)[0], logits(model)[0], **CLOSE)


def test_ties_own_tensors_and_factors_of_either_half() -> None:
    model = own()
    layer = find_stack(model).layer(1)
    up, norm = torch.randn(layer.mlp.up_proj.weight.shape) * 0.2, torch.rand(32) + 0.5
    factors = {"x.mlp.down_proj.up": torch.randn(32, 3) * 0.2, "x.mlp.down_proj.down": torch.randn(3, 64) * 0.2}
    query = {"y.self_attn.q_proj.left": torch.randn(32, 4), "y.self_attn.q_proj.right": torch.randn(4, 32) * 0.2}
    made = {"z.mlp.up_proj.weight": up, "z.post_attention_layernorm.weight": norm, "z.input_layernorm.weight": norm}
    both = factors | {"x.self_attn.o_proj.weight": torch.randn(32, 32) * 0.2}
    require_live(model, "0,1a,1m=0,2a=0,3m=0")
    require_live(model, "0,1a,2m:z,3", made)
    require_live(model, "0,1a=0:y,2m=3:x,3", factors | query)
    require_live(model, "0,1a:x,0m:x,2a:x,2m:x,3", both)
    require_live(model, "0,1a:z,0m,3", made)
    with refused("W209", "not given"):
        blueprint(model, plan_of(model, "0,1a,2m:z,3"))


def test_the_place_is_that_of_the_attention() -> None:
    """Its kind of mask, its entry in the config; `KV rows` of the proof compares the windows of the cache."""
    model = own("qwen2")
    made = require_live(model, "1a,0m,2a,3m,3a,2m")
    assert made.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    model = own("smollm3")
    assert require_live(model, "2a,0m,1a,3m,3").config.no_rope_layers == [0, 1, 1]
    with refused("W206", "no value of first_k_dense_replace"):
        blueprint(own("deepseek_v3"), plan_of(own("deepseek_v3"), "2a,3m,0a,1m"))


def test_an_mlp_that_is_built_otherwise_is_refused() -> None:
    model = own("deepseek_v3")
    with refused("W283", "the mlp of layer 0 is not built as that of layer 2"):
        blueprint(model, plan_of(model, "1,2a,0m,3"))
    with refused("W203", "write 1 without @"):
        blueprint(own(), plan_of(own(), "0,1a@0,2m,3"))


def test_a_stream_is_a_write(bases: Any, tmp_path: Path) -> None:
    """Of converted experts too, and of their ties: each expert is that of the tied layer."""
    for family, text in (("llama", "0,2a,1m,3m,3a,0m"), ("mixtral", "0,2a,1m=3,3"), ("mixtral", "0,2=1,3")):
        base, place = bases(family), tmp_path / f"{family}{len(text)}"
        place.mkdir()
        options = {"zero_parts": "3m," in text}
        assert streamed(base, text, place / "a", **options).proof.passed
        written(base, text, place / "b", **options)
        ours, theirs = weights(place / "a"), weights(place / "b")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert config_of(place / "a") == config_of(place / "b")
        assert family == "mixtral" or content(place / "a") == content(place / "b")


def test_the_note_says_whose_mlp_it_is(tmp_path: Path) -> None:
    model = own()
    first = write(Loaded(model, None, "tiny"), plan_of(model, "3,2a,1m,0"), tmp_path / "one", prove=False).folder
    note = config_of(first)["shoal"]
    assert (note["base_layers"], note["mlps"], note["plan"]) == ([3, 2, 0], [[1, 1]], "3,2a,1m,0")
    again = AutoModelForCausalLM.from_pretrained(first)
    plan = plan_of(again, "1,2a,1m,0a,2m")
    second = write(Loaded(again, None, str(first), first), plan, tmp_path / "two", prove=False).folder
    known = lineage_of_folder(second)
    assert known is not None and known.notation == "2a,1m,0a,1m,3a,0m"
    assert known.chain == ("3,2a,1m,0", "1,2a,1m,0a,2m")
    silent = write(
        Loaded(again, None, str(first), first),
        plan_of(again, "0m,1a"),
        tmp_path / "three",
        prove=False,
        zero_parts=True,
    )
    known = lineage_of_folder(silent.folder)
    assert known is not None and known.notation == "3m,2a"


def test_an_adapter_follows_both_halves(bases: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    settings = peft.LoraConfig(
        target_modules=["q_proj", "up_proj"], init_lora_weights=False, layers_to_transform=[0, 2]
    )
    torch.manual_seed(2)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "old")
    text = "1,2a,0m,0a,3m"
    with running(adapted, plan_of(adapted, text)):
        live = logits(adapted.eval())[0]
    loaded = Loaded(AutoModelForCausalLM.from_pretrained(bases("llama")), None, str(bases("llama")))
    out = write(loaded, plan_of(loaded.model, text), tmp_path / "out", prove=False, adapter=tmp_path / "old").folder
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), str(out / "adapter")).eval()
    torch.testing.assert_close(logits(again)[0], live, **CLOSE)


def test_an_older_folder_with_zeroed_halves_still_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before halves were joined each was a layer of its own."""
    model = own()
    model.save_pretrained(tmp_path / "base")
    plan = plan_of(model, "0,2a,1m,3")
    with monkeypatch.context() as patch:
        patch.setattr("shoal.writing.slots._joined", lambda *_: (None, "not in this version"))
        loaded = Loaded(model, None, str(tmp_path / "base"))
        folder = write(loaded, plan, tmp_path / "old", zero_parts=True, prove=False).folder
    assert config_of(folder)["num_hidden_layers"] == 4
    assert verify(folder, greedy=(1, 4)).passed


def test_the_outlook_counts_what_is_written() -> None:
    for family, text in (("llama", "0,2a,1m,3a,3m"), ("llama", "0,1m,2a,3"), ("gpt_neox", "0,2a,1m,3")):
        model = own(family)
        plan = plan_of(model, text)
        seen = outlook_of(model, inspect(model), plan, zero_parts=True)
        made = rewrite(model, plan, zero_parts=True)
        assert seen.to_dict()["after"]["parameters"] == sum(p.numel() for p in made.parameters())
        assert seen.changed.get("num_hidden_layers", (4, 4))[1] == find_stack(made).depth


@pytest.mark.parametrize(("name", "text"), [("vit", "0,2a,1m,3a,3m,4-5"), ("clip", "vision: 0a,1m,2-5; text: 0,3a,2m")])
def test_stacks_of_other_models(name: str, text: str) -> None:
    model = kind(name)
    plan, inputs = plan_of_kind(model, text), inputs_of(model)
    with running(model, plan):
        live = returned(model, inputs)
    assert apart(returned(rewrite(model, plan), inputs), live) < 1e-5
    assert apart(returned(model, inputs), live) > 1e-3


class Toy(nn.Module):
    """A layer of which it is known what it does; `way` says in which order."""

    def __init__(self, way: str, scale: float = 1.0) -> None:
        super().__init__()
        self.way, self.scale = way, scale
        self.mix, self.think = nn.Linear(4, 4), nn.Linear(4, 4)
        self.before, self.between, self.behind = nn.LayerNorm(4), nn.LayerNorm(4), nn.RMSNorm(4)
        self.unused = nn.LayerNorm(4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        match self.way:
            case "attention first":
                x = x + self.mix(self.before(x))
                return x + self.behind(self.think(self.between(x)))
            case "mlp first":
                x = x + self.think(self.between(x))
                return x + self.mix(self.before(x))
            case "parallel":
                return x + self.mix(self.before(x)) + self.think(self.between(x))
            case "one norm for both":
                x = x + self.mix(self.before(x))
                return x + self.think(self.before(x))
            case "scaled":
                x = x + self.mix(self.before(x))
                return x + self.scale * self.think(self.between(x))
        raise AssertionError(self.way)


def halves(way: str, scale: float = 1.0) -> Halves:
    called = ((torch.zeros(1, 3, 4, device="meta"),), {})
    fact = LayerFacts(0, -1, None, parts=Parts(("mix",), ("think",)), called=called)
    with torch.device("meta"):
        return Halves(Toy(way, scale).eval(), fact)


def test_a_layer_is_tried_and_not_named() -> None:
    found = follows(halves("attention first"), halves("attention first"), same=False)
    assert found == {"between.weight", "between.bias", "behind.weight"}
    for way in ("mlp first", "parallel"):
        assert "does not read" in str(follows(halves(way), halves(way), same=False))
        assert "does not read" in str(follows(halves(way), halves(way), same=True))
    shared = partial(follows, halves("one norm for both"), halves("one norm for both"))
    assert shared(same=True) == frozenset()
    assert shared(same=False) == "what stands outside their attention and mlp cannot be taken apart"
    assert isinstance(follows(halves("scaled", 2.0), halves("scaled", 2.0), same=False), frozenset)
    assert "cannot be taken apart" in str(follows(halves("scaled", 2.0), halves("scaled", 3.0), same=False))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_the_mlp_reads_is_found_without_values(device: str) -> None:
    ways = {"attention first": True, "mlp first": False, "parallel": False, "one norm for both": True}
    for way, wanted in ways.items():
        with torch.device(device):
            layer, x = Toy(way), torch.ones(1, 3, 4)
        for frozen in (False, True):
            layer.requires_grad_(not frozen)
            assert reads_attention(layer, Parts(("mix",), ("think",)), {}, (x,), {}) is wanted
        assert isinstance(layer.mix, nn.Linear) and all(p.grad is None for p in layer.parameters())
