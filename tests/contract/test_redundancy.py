"""Layers compared two by two: their matrices, and the keys and values that they store."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import UsageError
from shoal.measures.kv_similarity import kv_similarity
from shoal.measures.weight_similarity import weight_similarity
from shoal.models.stacks import find_stack
from shoal.report.heat_map import change, heat_map
from shoal.report.redundancy import render_redundancy

from .families import DEPTH, tiny
from .kinds import kind
from .planted import NULL, TWIN_OF_NULL, TWINS, answers, data_of, random_data
from .shares import every
from .test_api import model_folder
from .test_measures import mean_and_error, ragged

DATA = random_data(3, 12)
CELL = r'<rect class="(\w+)" x="\d+" y="\d+" width="\d+" height="\d+" fill-opacity="([\d.]+)"><title>'
"""Of a heat map, with its colour and how strong it is."""


@torch.no_grad()
def stored(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that the stock cache holds, by layer."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return [(layer.keys.double(), layer.values.double()) for layer in cache.layers]


def flat(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_with_equal_weights_are_nowhere_apart(family: str) -> None:
    for by in ("scale", "least-squares"):
        scores = weight_similarity(answers(family), by=by, pairs="all")  # type: ignore[arg-type]
        matrix = torch.tensor(scores.detail["matrix"])
        assert scores.values[TWINS[1]] < 1e-5 and matrix.diagonal().max() < 1e-5
        assert all(value > 0.05 for layer, value in enumerate(scores.values) if layer not in (0, TWINS[1]))
        assert scores.order()[0] == TWINS[1] and math.isnan(scores.values[0])
        assert matrix.diagonal(-1).tolist() == pytest.approx(scores.values[1:])
        cosines = [torch.tensor(one)[TWINS[0], TWINS[1]] for one in scores.detail["cosine"].values()]
        assert all(cosine == pytest.approx(1) for cosine in cosines)


@torch.no_grad()
def test_the_distance_of_weights_is_the_naive_one_and_a_factor_costs_nothing() -> None:
    model = copy.deepcopy(tiny("llama"))
    stack = find_stack(model)
    for a, b in zip(stack.layer(3).parameters(), stack.layer(1).parameters(), strict=True):
        if a.dim() == 2:
            a.copy_(-2.5 * b)
    scores = weight_similarity(model, pairs="all")
    assert scores.detail["matrix"][3][1] < 1e-6
    assert scores.detail["cosine"]["mlp.up_proj.weight"][3][1] == pytest.approx(-1)
    rests = sizes = 0.0
    for a, b in zip(stack.layer(2).parameters(), stack.layer(1).parameters(), strict=True):
        if a.dim() == 2:
            x, y = a.double().flatten(), b.double().flatten()
            rests += float((x - (x @ y) / (y @ y) * y).norm() / x.norm()) * x.numel()
            sizes += x.numel()
    assert scores.values[2] == pytest.approx(rests / sizes, rel=1e-9)


@torch.no_grad()
def test_a_map_of_a_matrix_is_found_by_least_squares_alone() -> None:
    model, draw = copy.deepcopy(tiny("llama")), torch.Generator().manual_seed(2)
    below, layer = find_stack(model).layer(1), find_stack(model).layer(2)
    square = torch.randn(16, 16, generator=draw)
    layer.self_attn.k_proj.weight.copy_(square @ below.self_attn.k_proj.weight)  # fewer rows than columns
    layer.self_attn.v_proj.weight.zero_()
    for name in ("gate_proj", "up_proj"):  # fewer columns than rows
        own, other = layer.mlp.get_submodule(name).weight, below.mlp.get_submodule(name).weight
        own.copy_(other @ torch.randn(32, 32, generator=draw))
    down = layer.mlp.down_proj.weight
    scores = weight_similarity(model, by="least-squares")
    x, y = down.double(), below.mlp.down_proj.weight.double()
    rest = (x - torch.linalg.lstsq(y.T, x.T).solution.T @ y).norm() / x.norm()
    counted = [p.numel() for n, p in layer.named_parameters() if p.dim() == 2 and p.shape[0] != p.shape[1]]
    zeros = layer.self_attn.v_proj.weight.numel()  # no map but 0 makes zeros of what is none
    assert scores.values[2] == pytest.approx((float(rest) * down.numel() + zeros) / sum(counted), rel=1e-4)
    assert "q_proj" in scores.notes[0]
    assert weight_similarity(model).values[2] > 0.9


@pytest.mark.parametrize("by", ["cosine", "cka", "distance"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_layer_that_reads_the_null_layers_state_stores_its_keys_and_values(family: str, by: Any) -> None:
    model = copy.deepcopy(answers(family))
    source, target = find_stack(model).layer(TWIN_OF_NULL), find_stack(model).layer(NULL)
    target.load_state_dict(source.state_dict() | {n: t for n, t in target.state_dict().items() if _writes(n)})
    scores = kv_similarity(model, DATA, by=by, pairs="all")
    matrix = torch.tensor(scores.detail["matrix"], dtype=torch.float64)
    assert scores.values[TWIN_OF_NULL] == pytest.approx(0, abs=1e-9) and scores.order()[0] == TWIN_OF_NULL
    assert all(v > 1e-3 for i, v in enumerate(scores.values) if i not in (0, TWIN_OF_NULL))
    assert torch.allclose(matrix, matrix.T) and matrix.diagonal().abs().max() < 1e-9
    assert matrix.diagonal(-1).tolist() == pytest.approx(scores.values[1:], abs=1e-7)
    alone = kv_similarity(model, DATA, by=by, batch=2)
    assert alone.values[1:] == pytest.approx(scores.values[1:], rel=1e-5, abs=1e-9) and not alone.detail


def _writes(name: str) -> bool:
    return any(piece in ("o_proj", "c_proj", "down_proj") for piece in name.split("."))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_similarity_of_keys_and_values_is_the_naive_one(family: str) -> None:
    model = tiny(family)
    held = [stored(model, ids[None]) for ids in DATA.ids]
    scores = kv_similarity(model, DATA, batch=3)
    for layer in range(1, DEPTH):
        turned = [
            sum(1 - torch.cosine_similarity(flat(a), flat(b), dim=-1)[0, 1:] for a, b in zip(*two, strict=True)) / 2
            for two in ((row[layer], row[layer - 1]) for row in held)
        ]
        value, error = mean_and_error(turned)
        assert scores.values[layer] == pytest.approx(value, rel=1e-4)
        assert scores.errors[layer] == pytest.approx(error, rel=1e-3)


@torch.no_grad()
def test_of_a_layer_with_cross_attention_its_own_keys_and_values_count() -> None:
    model, ids = kind("t5"), DATA.ids % 60
    given = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": True}
    held = [(one.keys, one.values) for one in model(**given).past_key_values.self_attention_cache.layers]
    scores = kv_similarity(model, data_of(ids), batch=3, stack="decoder", skip_first=0)
    for layer in range(1, len(held)):
        turned = [
            1 - torch.cosine_similarity(flat(a), flat(b), dim=-1)
            for a, b in zip(*held[layer - 1 : layer + 1], strict=True)
        ]
        assert scores.values[layer] == pytest.approx(float(sum(turned).mean()) / 2, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_distance_is_the_formula_of_kvsharers_notebook(family: str) -> None:
    model = tiny(family)
    held = [stored(model, ids[None]) for ids in DATA.ids]
    means = [[sum(row[i][place] for row in held) / len(held) for place in (0, 1)] for i in range(DEPTH)]
    scores = kv_similarity(model, DATA, by="distance", pairs="all", skip_first=0)
    for i in range(DEPTH):
        for j in range(DEPTH):
            apart = [(a - b).norm(dim=-1).mean() for a, b in zip(means[i], means[j], strict=True)]
            assert scores.detail["matrix"][i][j] == pytest.approx(float(sum(apart)) / 2, rel=1e-5, abs=1e-7)


def test_padding_changes_nothing_but_by_distance_where_it_is_refused() -> None:
    data = ragged()
    for by in ("cosine", "cka"):
        if by == "cka":
            data = random_data(2, 12)
        alone = kv_similarity(tiny("llama"), data, by=by, batch=1)  # type: ignore[arg-type]
        assert kv_similarity(tiny("llama"), data, by=by, batch=5).values[1:] == pytest.approx(alone.values[1:])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="U538"):
        kv_similarity(tiny("llama"), ragged(), by="distance")


@pytest.mark.parametrize("family", every(3, ["jamba", "gemma3n_text", "gemma3_text", "gpt_neox", "deepseek_v3"]))
def test_hybrid_families_are_compared_where_there_is_something(family: str) -> None:
    scores = kv_similarity(tiny(family), DATA, pairs="all")
    known = [value for value in scores.values if not math.isnan(value)]
    assert len(scores.values) == DEPTH and all(0 <= value <= 2 for value in known)
    assert len(weight_similarity(tiny(family), pairs="all").values) == DEPTH


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="U537"):
        kv_similarity(tiny("mamba2", "eager"), DATA)
    with pytest.raises(UsageError, match="U508"):
        kv_similarity(tiny("llama"), DATA, skip_first=12)
    with pytest.raises(UsageError, match="U536"):
        kv_similarity(tiny("llama"), random_data(2, 4), by="cka")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def test_inspect_draws_four_maps_of_every_two_layers(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ["inspect", str(folder), "--redundancy", "--length", "16", "--limit", "2", "-q", "--output", str(page)]
    run = CliRunner().invoke(app, [*words, "--json"])
    assert run.exit_code == 0, run.output
    maps = json.loads(run.stdout)["maps"]
    assert [one["name"] for one in maps] == ["Weights", "Hidden states", "Keys and values", "Attention maps"]
    assert [len(one["matrix"]) for one in maps] == [5, 6, 5, 5]
    assert all(
        len(one["nearest"]) == 8 and one["nearest"] == sorted(one["nearest"], key=lambda n: n[2]) for one in maps
    )
    text = page.read_text()
    drawn = re.findall(r'<svg class="heat".*?</svg>', text, re.DOTALL)
    assert [len(re.findall(CELL, one)) for one in drawn] == [25, 36, 25, 25]
    for one in drawn:
        assert "layer 4, layer 3: " in one and one.count("<text") == one.count("</text>")
        assert all(0 <= float(value) <= 1 for value in re.findall(r'fill-opacity="([^"]*)"', one))
    said = CliRunner().invoke(app, words)
    assert "the nearest pairs of layers" in said.output and "the page:" in said.output


def test_inspect_without_redundancy_says_what_has_no_effect(folder: Path) -> None:
    run = CliRunner().invoke(app, ["inspect", str(folder), "--length", "16"])
    assert run.exit_code == 0 and "--length has no effect" in run.output


def test_what_a_model_does_not_have_is_said_on_the_page() -> None:
    data = {
        "title": "<b>",
        "maps": [
            {"name": "Attention maps", "unit": "", "matrix": [], "why_not": "U537: <none>", "nearest": []},
            {"name": "Weights", "unit": "share", "matrix": [[0.0, None], [None, 0.0]], "why_not": "", "nearest": []},
        ],
    }
    page = render_redundancy(data)
    assert "Not compared: U537: &lt;none&gt;" in page and "<b>" not in page
    drawn = re.findall(r'<svg class="heat".*?</svg>', page, re.DOTALL)
    assert [len(re.findall(CELL, one)) for one in drawn] == [2]


def test_a_map_has_a_mark_for_better_and_for_worse() -> None:
    drawn = heat_map([[-1.0, 2.0], [None, 0.0]], change(2.0), title="t", numbers=((3, 4), (3, 4)), chosen=(0, 1))
    assert re.findall(CELL, drawn) == [
        ("better", "0.50"), ("worse", "1.00"), ("worse", "0.00"),
    ]  # fmt: skip
    assert "layer 3, layer 4: 2.00" in drawn and drawn.count('class="chosen"') == 1
