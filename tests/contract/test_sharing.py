"""Keys, values and attention maps that layers share: roles of matrices, what heads may exchange, planted maps."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from shoal.models.heads import HeadRoles, roles_of
from shoal.models.opened import open_model
from shoal.models.projections import HeadMatrices, Projections, ScoreSide, projections_of

from .families import FAMILIES, tiny
from .transform_jobs import do, job, logits, relative

SEPARATE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "opt", "mixtral", "gpt_oss", "smollm3", "olmo2", "granite")
FUSED = ("gpt2", "gpt_neox", "phi3", "falcon", "bloom")
APART = (
    "cohere2",
    "stablelm",
    "phi",
    "starcoder2",
    "gptj",
    "gpt_neo",
    "jamba",
    "nemotron_h",
    "qwen3_moe",
    "gemma3_text",
)
KNOWN = ("llama", "gpt2", "qwen2", "mistral", "gemma2", "phi3", "gpt_neox", "opt", "mixtral", "gpt_oss", "smollm3")
NORMED = ("qwen3", "gemma3_text", "olmo2")


def model_of(family: str) -> PreTrainedModel:
    return tiny(family, "eager")


def first_with_kv(family: str) -> tuple[int, HeadRoles]:
    return next((i, role) for i, role in enumerate(roles_of(open_model(model_of(family)))) if role is not None)


@pytest.mark.parametrize("family", [*SEPARATE, *APART])
def test_separate_matrices_have_one_role_each(family: str) -> None:
    _, roles = first_with_kv(family)
    assert [len(one) for one in (roles.queries, roles.keys, roles.values, roles.output)] == [1, 1, 1, 1]
    assert len({*roles.queries, *roles.keys, *roles.values, *roles.output}) == 4
    assert "q_proj" in roles.queries[0] and "k_proj" in roles.keys[0] and "v_proj" in roles.values[0]
    assert roles.unread == (*roles.keys, *roles.values) and roles.unweighed == (*roles.queries, *roles.keys)


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_matrix_has_all_roles(family: str) -> None:
    _, roles = first_with_kv(family)
    assert roles.queries == roles.keys == roles.values and len(roles.output) == 1
    assert roles.unread == roles.unweighed == ()


def test_latent_keys_and_values_and_layers_without() -> None:
    _, roles = first_with_kv("deepseek_v3")
    assert roles.keys == roles.values and len(roles.queries) == 2 and roles.unread == roles.keys
    assert roles_of(open_model(model_of("mamba2"))) == [None] * 4
    kinds = [role is None for role in roles_of(open_model(model_of("jamba")))]
    assert kinds == [True, False, True, False]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_probed_or_says_why_not(family: str) -> None:
    model = model_of(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for one in projections_of(open_model(model), range(4)).values():
        assert isinstance(one, str) or (isinstance(one.scores, str) and "norm" in one.scores) is (family in NORMED)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def known(model: PreTrainedModel, layer: int = 1) -> tuple[Projections, ScoreSide]:
    found = projections_of(open_model(model), [layer])[layer]
    assert isinstance(found, Projections), found
    assert isinstance(found.scores, ScoreSide), found.scores
    return found, found.scores


@pytest.mark.parametrize("family", KNOWN)
def test_channels_of_heads(family: str) -> None:
    found, scores = known(model_of(family))
    dim = len(found.values.channels[0])
    assert found.group == len(scores.queries.channels) // len(scores.keys.channels)
    rotated = {"gpt2": 0, "opt": 0, "gpt_neox": 2}.get(family, dim)
    assert 2 * len(scores.pairs) == rotated and len(scores.plain) == dim - rotated
    assert found.values.turned is (family == "gpt2")


def test_cohere_turns_neighbours_and_llama_halves() -> None:
    assert known(model_of("llama"))[1].pairs == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert known(model_of("cohere2"))[1].pairs == ((0, 1), (2, 3), (4, 5), (6, 7))


def planted_pair(family: str) -> PreTrainedModel:
    """Layer 1 adds nothing, so that 2 is given what 1 is given; 2 makes 1's keys and values under random maps."""
    model = copy.deepcopy(model_of(family))
    layers = open_model(model).stack()
    one, two = layers.layer(1), layers.layer(2)
    queries = {n: p.clone() for n, p in two.named_parameters()}
    two.load_state_dict(one.state_dict())
    found, scores = known(model, 2)
    own, draw = HeadMatrices(two, found), torch.Generator().manual_seed(4)
    fresh = HeadMatrices(two, found, queries)
    for head in range(len(scores.queries.channels)):
        own.put_rows(scores.queries, head, fresh.rows(scores.queries, head))
        own.put_columns(head, fresh.columns(head))
    for head in range(len(scores.keys.channels)):
        keys = own.rows(scores.keys, head)
        for a, b in scores.pairs:
            re, im = torch.randn(2, generator=draw).tolist()
            keys[[a, b]] = torch.stack([re * keys[a] - im * keys[b], im * keys[a] + re * keys[b]])
        plain = list(scores.plain)
        keys[plain] = torch.randn(len(plain), len(plain), generator=draw, dtype=torch.float64) @ keys[plain]
        own.put_rows(scores.keys, head, keys)
        values = own.rows(found.values, head)
        change = torch.randn(len(values), len(values), generator=draw, dtype=torch.float64)
        own.put_rows(found.values, head, change @ values)
    with torch.no_grad():
        for name, tensor in own.rewritten(source=True).items():
            two.get_parameter(name).copy_(tensor)
        for name, tensor in one.named_parameters():
            if name.startswith(found.output.module) or any(
                name.startswith(m) for m in ("mlp.down", "mlp.c_proj", "mlp.dense_4h", "fc2")
            ):
                tensor.zero_()
    return model


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "phi3", "gpt_neox", "opt"])
def test_a_random_map_between_two_layers_is_found(family: str, weighted: bool) -> None:
    model = planted_pair(family)
    given = job(model, [])
    made = do("share-kv", given, pairs="1-2", weighted=weighted)
    assert str(made.plan) == "0,1:share-kv-1,2@1:share-kv-2,3"
    assert relative(logits(model, made), logits(model)) < 1e-3
    for how in ("average", "first"):
        assert relative(logits(model, do("share-kv", given, pairs="1-2", how=how)), logits(model)) > 1e-2
