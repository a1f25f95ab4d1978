"""FFN-SkipLLM against its rule: the cosine of the mlp's own input and output, and cold regions from a calibration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import shoal
from shoal.deciding.cold_regions import cold_regions
from shoal.errors import UsageError
from shoal.live import running
from shoal.measures.block_influence import block_influence
from shoal.models.stacks import find_stack

from .families import DEPTH, tiny
from .planted import random_data
from .test_api import model_folder
from .verbs import run

EVERY = "ffn-skip:threshold=1,cold_first=0,cold_last=0,prefill=true"
"""Looks at every mlp and skips none."""


@torch.no_grad()
def told(family: str, policy: str, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor) -> list[tuple[Any, Any]]:
    """(before, after) of every run that the policy was told of in a prefill and two steps."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    name = "shoal.deciding.policies.ffn_skip._FFNSkip.after_run"
    monkeypatch.setattr(name, lambda _, __, ___, before, after: seen.append((before.clone(), after.clone())))
    model: Any = tiny(family, "eager")
    with running(model, "0-3", policy=policy):
        cache = None
        for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
            cache = model(input_ids=piece, past_key_values=cache, use_cache=True).past_key_values
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "granite", "gpt2"])
def test_the_policy_is_told_what_the_measure_of_mlps_sees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a norm is behind the mlp (Gemma 2), where it is scaled (Granite) or beside the attention (NeoX)."""
    data = random_data(2, 8)
    seen = told(family, EVERY, monkeypatch, data.ids)
    whole = [torch.cat([1 - cosine_similarity(b.double(), a.double(), dim=-1) for b, a in seen[n::DEPTH]], 1)
             for n in range(DEPTH)]  # fmt: skip
    wanted = block_influence(tiny(family, "eager"), data, part="mlp").values
    assert [float(one.mean()) for one in whole] == pytest.approx(wanted, rel=1e-3)
    layer = block_influence(tiny(family, "eager"), data).values
    assert max(abs(a - b) for a, b in zip(layer, wanted, strict=True)) > 0.01, "else the two rules could not differ"
    monkeypatch.undo()
    seen = told(family, EVERY + ",of=layer", monkeypatch, data.ids)
    by_layer = [torch.cat([1 - cosine_similarity(b.double(), a.double(), dim=-1) for b, a in seen[n::DEPTH]], 1)
                for n in range(DEPTH)]  # fmt: skip
    assert [float(one.mean()) for one in by_layer] == pytest.approx(layer, rel=1e-3)


@torch.no_grad()
def test_looking_at_the_mlp_changes_nothing_and_computes_no_attention_twice() -> None:
    model: Any = tiny("llama")
    ids, calls = random_data(1, 8).ids, list[int]()
    attention = find_stack(model).layers[1].self_attn
    handle = attention.register_forward_hook(lambda _, __, out: calls.append(out[0].shape[-2]))
    plain = model(input_ids=ids).logits
    with running(model, "0-3", policy=EVERY):
        assert torch.equal(model(input_ids=ids).logits, plain)
    handle.remove()
    assert calls.count(8) == 2 and not attention._forward_hooks  # one more, of a token, finds out what a layer is


@torch.no_grad()
def test_the_mlps_behind_one_that_turns_little_are_left_out() -> None:
    """The mlp of layer 1 adds nothing while its attention turns the state: the mlp's cosine is 1, the layer's is not,
    and only by the first is left out what follows."""
    model: Any = copy.deepcopy(tiny("llama"))
    model.model.layers[1].mlp.down_proj.weight.zero_()
    ids = random_data(1, 8).ids
    depths = {}
    for of in ("mlp", "layer"):
        text = f"ffn-skip:threshold=0.999,cold_first=1,cold_last=0,of={of}"
        with running(model, "0-3", policy=text) as handle:
            handle.prompt = 4
            model(input_ids=ids, use_cache=False)
            depths[of] = handle.trace.depths[0]
    assert depths == {"mlp": [4.0] * 4 + [3.0] * 4, "layer": [4.0] * 8}


COSINES = (0.2, 0.99, 0.5, 0.97, 0.95, 0.3)
"""Of the mlps of six layers."""


def written(place: Path, **changes: Any) -> str:
    scores = {"measure": "block-influence", "values": [1 - one for one in COSINES], "detail": {"part": "mlp"}}
    place.write_text(json.dumps(scores | changes))
    return str(place)


@pytest.mark.parametrize(
    ("threshold", "regions"), [(0.9, (1, 1)), (0.96, (1, 2)), (0.98, (1, 4)), (0.25, (1, 0)), (0.1, (0, 0))]
)
def test_cold_regions_end_at_the_first_mlp_that_turns_little(
    tmp_path: Path, threshold: float, regions: tuple[int, int]
) -> None:
    file = written(tmp_path / "mlp.json")
    assert cold_regions(file, range(6), threshold) == regions
    several = tmp_path / "several.json"
    several.write_text(json.dumps({"scores": {"x": {"measure": "taylor"}, "y": json.loads(Path(file).read_text())}}))
    assert cold_regions(str(several), range(6), threshold) == regions
    assert cold_regions(file, (0, 2, 3, 4), 0.9) == (2, 0), "of a plan the layers that it runs"


def test_a_file_that_calibrates_nothing_is_refused(tmp_path: Path) -> None:
    for changes in ({"detail": {}}, {"values": "many"}, {"measure": "taylor"}, {"values": [0.1, True]}):
        with pytest.raises(UsageError, match=r"U658.*no measurement of mlps"):
            cold_regions(written(tmp_path / "mlp.json", **changes), range(6), 0.5)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="U658"):
        cold_regions(str(tmp_path / "broken.json"), range(6), 0.5)
    good = written(tmp_path / "mlp.json", values=[None, 0.5])
    with pytest.raises(UsageError, match=r"U658.*scores of 2 layers and not of layer 3"):
        cold_regions(good, range(4), 0.1)
    with pytest.raises(UsageError, match=r"U658.*highest cosine is 0.5000"):
        cold_regions(good, range(2), 0.9)


def test_regions_are_calibrated_from_the_command_line(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("the river runs under the old stone bridge again. " * 20)
    words = ["measure", folder, "--measure", "block-influence:part=mlp", "--data", str(tmp_path / "text.txt"),
             "--length", "16", "--limit", "4", "--json"]  # fmt: skip
    measured = run(words)
    assert measured.exit_code == 0, measured.output
    file = tmp_path / "mlp.json"
    file.write_text(measured.stdout)
    values = json.loads(measured.stdout)["values"]
    threshold = 1 - sorted(values)[1] - 1e-6  # two mlps reach it
    warm = [n for n, one in enumerate(values) if 1 - one >= threshold]
    policy = f"ffn-skip:cold={file},threshold={threshold}"
    with shoal.running(shoal.load(folder), "0-4", policy=policy) as handle:
        gated = [run.layer for run in handle.plan.steps() if run.gate]
    assert gated == list(range(warm[0], warm[-1] + 1))
    said = run(["generate", folder, "the", "--policy", f"ffn-skip:cold={tmp_path}/text.txt", "--max-new-tokens", "1"])
    assert said.exit_code == 1 and "U658" in said.stderr
