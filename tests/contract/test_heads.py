"""What the matrices of an attention make, and what its heads may exchange, over the families."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from shoal.models.head_channels import projections_of
from shoal.models.meta import meta_model
from shoal.models.opened import OpenedModel, open_model
from shoal.models.projections import Projections, ScoreSide
from shoal.models.roles import HeadRoles
from shoal.plan.sources import STORED

from .families import FAMILIES, tiny

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
NORMED = ("qwen3", "qwen3_moe", "gemma3_text", "gemma3n_text", "olmo2", "llama4_text", "deepseek_v3")
ALONE = ("falcon", "bloom", "gptj", "gpt_neo")


def model_of(family: str) -> PreTrainedModel:
    return tiny(family, "eager")


def roles_of(opened: OpenedModel) -> list[HeadRoles | None]:
    return [fact.roles for fact in opened.facts().layers]


def first_with_kv(family: str) -> tuple[int, HeadRoles]:
    return next((i, role) for i, role in enumerate(roles_of(open_model(model_of(family)))) if role is not None)


@pytest.mark.parametrize("family", [*SEPARATE, *APART])
def test_separate_matrices_have_one_role_each(family: str) -> None:
    _, roles = first_with_kv(family)
    assert [len(one) for one in (roles.queries, roles.keys, roles.values, roles.output)] == [1, 1, 1, 1]
    assert len({*roles.queries, *roles.keys, *roles.values, *roles.output}) == 4
    assert "q_proj" in roles.queries[0] and "k_proj" in roles.keys[0] and "v_proj" in roles.values[0]
    assert roles.unused(STORED) == (*roles.keys, *roles.values) and roles.unused({"queries", "keys"}) == (
        *roles.queries,
        *roles.keys,
    )


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_matrix_has_all_roles(family: str) -> None:
    _, roles = first_with_kv(family)
    assert roles.queries == roles.keys == roles.values and len(roles.output) == 1
    assert roles.unused(STORED) == roles.unused({"queries", "keys"}) == ()


def test_latent_keys_and_values_and_layers_without() -> None:
    _, roles = first_with_kv("deepseek_v3")
    assert roles.keys == roles.values and len(roles.queries) == 2 and roles.unused(STORED) == roles.keys
    assert roles_of(open_model(model_of("mamba2"))) == [None] * 4
    kinds = [role is None for role in roles_of(open_model(model_of("jamba")))]
    assert kinds == [True, False, True, False]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_probed_or_says_why_not(family: str) -> None:
    model = model_of(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = projections_of(open_model(model), range(4))
    roles = roles_of(open_model(model))
    for layer, one in found.items():
        if roles[layer] is None:
            assert one == "no role of its matrices is known"
        elif family in ALONE:
            assert one == "it works its attention out itself"
        elif family in NORMED:  # Llama 4 norms what it rotates, and its fourth layer rotates nothing
            why = one if isinstance(one, str) else one.scores
            assert (family == "llama4_text" and layer == 3) or "norm" in str(why)
            if family not in ("deepseek_v3", "gemma3n_text"):  # which are latent, and normed
                assert isinstance(one, Projections), "values and output are known all the same"
        else:
            assert isinstance(one, Projections), one
            assert isinstance(one.scores, ScoreSide), one.scores
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


@pytest.mark.parametrize("family", [*SEPARATE, *FUSED, "deepseek_v3"])
def test_the_model_on_the_meta_device_has_the_same_roles(family: str) -> None:
    opened = open_model(meta_model(model_of(family).config))
    assert opened.facts().forward
    assert roles_of(opened) == roles_of(open_model(model_of(family)))


def test_half_precision_is_probed_as_float32_is() -> None:
    half = copy.deepcopy(model_of("llama")).bfloat16()
    assert known(half) == known(model_of("llama"))
