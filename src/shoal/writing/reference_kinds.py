"""The proof's live side for models that are no causal language models: what they return, and what a decoder writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.live import running
from shoal.models.depth import depth_fields
from shoal.models.evaluating import evaluating
from shoal.models.inputs import Inputs, sample_inputs
from shoal.models.kinds import SEQ2SEQ, auto_of, scores_text
from shoal.models.opened import open_model
from shoal.models.stacks import find_stacks, unwrap
from shoal.plan import Plan
from shoal.writing import proof_child as measure
from shoal.writing.blueprint import Blueprint, StackSlots
from shoal.writing.reference import TEXTS, TOKENS, LiveSide, Reference, counts, expected_weights, load_settings, quiet
from shoal.writing.stack_depths import described
from shoal.writing.surgery import blueprint


def kind_reference(
    model: nn.Module,
    plan: Plan,
    *,
    tokenizer: Any = None,
    greedy: tuple[int, int] = (3, 32),
    plans: Blueprint | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Reference:
    """As `live_reference`, for any model but a causal one: every tensor that it returns for random and padded inputs
    and a text, one by one and, with a decoder, by cached passes and greedy tokens. Of speech models, which generate by
    rules of their own, no tokens are compared."""
    inner = unwrap(model)
    plans = plans or blueprint(inner, plan, zero_parts=True, weights=weights)
    sums, fewer = expected_weights(inner, plans)
    side = kind_side(inner, plan, tokenizer=tokenizer, greedy=greedy, weights=weights)
    expected = _expected(inner, plans, input_sets(inner, tokenizer))
    return Reference(
        replace(expected, parameters=expected.parameters - fewer, weights=sums),
        side.tensors,
        tokens=side.tokens,
        greedy=side.greedy,
        largest=side.largest,
        auto=str(auto_of(inner)),
        depths=depth_paths(inner),
        **load_settings(inner),
    )


def kind_side(
    inner: PreTrainedModel,
    plan: Plan,
    *,
    tokenizer: Any,
    greedy: tuple[int, int],
    weights: Mapping[str, torch.Tensor] | None,
) -> LiveSide:
    """The forwards of the proof on a model of another kind under a plan. `rows` and `prompts` are a causal model's."""
    sets = input_sets(inner, tokenizer)
    tokens = min(greedy[1], _positions(inner)) if auto_of(inner) == SEQ2SEQ and _starts(inner) else 0
    tensors: dict[str, torch.Tensor] = {}
    chosen, largest = [], 0.0
    with quiet(), evaluating(inner), running(inner, plan, weights):
        for name, inputs in sorted(sets.items()):  # the order in which the fresh process goes through them
            returned = measure.outputs(inner, inputs)
            largest = max(largest, *(float(t.abs().max()) for t in returned.values()))
            tensors |= {f"{name}.in.{key}": t for key, t in inputs.items()}
            tensors |= {f"{name}.out.{key}": t for key, t in returned.items()}
            if "decoder_input_ids" in inputs:
                tensors[f"{name}.cached"], _ = measure.decoded(inner, inputs)
            if tokens:
                chosen.append(measure.written(inner, inputs, tokens))
    held = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return LiveSide(held, None, (), tokens, tuple(chosen), largest)


def counted_kind(model: PreTrainedModel, *, device: str, digest: str | None = None) -> Reference:
    """As `counted_reference`, for any model but a causal one."""
    plan = Plan.identity(open_model(model).spec)
    by_stack = {stack.name: StackSlots(tuple(range(stack.depth))) for stack in find_stacks(model)}
    main = by_stack.pop(plan.stack_name())
    plans = Blueprint(plan, main.slots, (), model.config, {}, others=tuple(by_stack.items()))
    sets = input_sets(model, None, device="cpu")
    tensors = {f"{name}.in.{key}": t for name, inputs in sets.items() for key, t in inputs.items()}
    return Reference(
        replace(_expected(model, plans, sets), digest=digest),
        tensors,
        auto=str(auto_of(model)),
        depths=depth_paths(model),
        **load_settings(model) | {"device": device},
    )


def proves_as_causal(model: nn.Module) -> bool:
    """Is the proof the one of a causal language model?"""
    inner = unwrap(model)
    return auto_of(inner) is None or scores_text(inner)


def depth_paths(model: PreTrainedModel) -> dict[str, str]:
    """By stack, the field of config.json that holds its depth."""
    return {
        stack.name: described(model, stack, (stack.fields or depth_fields(stack.config))[0])
        for stack in find_stacks(model)
    }


def input_sets(model: PreTrainedModel, tokenizer: Any, device: str | None = None) -> dict[str, Inputs]:
    """Inputs by name: random, padded (two rows, the second shorter) where there is a mask, and a text."""
    place = device or model.device
    length = min(TOKENS, _positions(model) // 2)
    sets = {"random": sample_inputs(model, place, length=length)}
    if "attention_mask" in sets["random"]:
        sets["padded"] = sample_inputs(model, place, batch=2, length=length, seed=1)
        sets["padded"]["attention_mask"][1, length - length // 4 :] = 0
    if tokenizer is not None and set(sets["random"]) <= {"input_ids", "attention_mask", "decoder_input_ids"}:
        ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:length]], device=place)
        if ids.shape[1] > 1 and int(ids.max()) < model.config.get_text_config(encoder=True).vocab_size:
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            more = {name: t for name, t in sets["random"].items() if name == "decoder_input_ids"}
            sets["text"] = {name: t for name, t in text.items() if name in sets["random"]} | more
    return sets


def _expected(model: PreTrainedModel, plans: Blueprint, sets: dict[str, Inputs]) -> Any:
    ids = sets["random"].get("decoder_input_ids")
    length = 1 if ids is None else ids.shape[1]
    names = [stack.name for stack in find_stacks(model)]
    return replace(
        counts(plans, open_model(model).spec, model, length), depths={name: len(plans.of(name).slots) for name in names}
    )


def _starts(model: PreTrainedModel) -> bool:
    """Does the model say with which token its decoder starts?"""
    config = model.generation_config
    return config is not None and any(map(measure.is_special, (config.decoder_start_token_id, config.bos_token_id)))


def _positions(model: PreTrainedModel) -> int:
    """The shortest text that a part of the model takes at most, two tokens apart from any offset."""
    configs = [model.config, *(stack.config for stack in find_stacks(model))]
    names = ("max_position_embeddings", "max_target_positions")
    found = [value for one in configs for name in names if isinstance(value := getattr(one, name, None), int)]
    return max(4, min((value - 2 for value in found if value > 3), default=1_000_000))
