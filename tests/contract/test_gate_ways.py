"""Gates with tensors in every family: one pass is a prefill and steps, alone and left-padded, whatever they decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.opened import open_model
from shoal.plan import Plan

from .families import FAMILIES, tiny
from .policy_cells import PREFILL, batch_of, stepped, whole
from .shares import only
from .test_policies import FEW, NO_STATIC, attention_of

WAYS = (
    "layers=1-2", "layers=1-3,net=mlp", "layers=1-2,fill=mask", "layers=1-2,scale=true", "layers=1-3,part=mlp",
    "part=halves,layers=1-2", "layers=1-2,grain=row", "layers=1-2,grain=row,part=mlp", "layers=1-2,grain=none",
    "layers=1-2,relax=top-k,scale=true,fill=mask", "layers=1-2,scale=true,net=mlp,adapter=4",
)  # fmt: skip
HALVES = {"part=halves,layers=1-2": "U711"}
RECURRENT = {way: "P131" for way in WAYS if "part=mlp" not in way}
NO_PARTS = {"layers=1-3,part=mlp": "P105", "layers=1-2,grain=row,part=mlp": "P105", **HALVES}
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("gpt_neox", "cohere2", "falcon", "gptj", "phi"), HALVES),
    "mamba2": {**RECURRENT, **NO_PARTS},
    "nemotron_h": NO_PARTS,
    "gemma3n_text": {**dict.fromkeys(WAYS, "P133"), **NO_PARTS},
}
"""What is refused, family by family; a refusal that is not in this table is a regression."""


def tensors_of(policy: Any, spec: Any) -> dict[str, torch.Tensor]:
    """Gates that let through about half of what they see."""
    draw = torch.Generator().manual_seed(11)
    drawn = {name: torch.randn(one.shape, generator=draw) for name, one in policy.start(spec).items()}
    return {name: 0.1 * one if name.endswith("bias") else one for name, one in drawn.items()}


# stock Jamba continues a text otherwise than in one pass
@pytest.mark.parametrize("family", only((*FEW, "opt"), [family for family in FAMILIES if family != "jamba"]))
def test_one_pass_is_a_prefill_and_steps(family: str) -> None:
    model = tiny(family, "eager" if family == "mamba2" else attention_of(family))
    found, skipped = dict[str, str](), 0.0
    spec = open_model(model).spec
    plan = Plan.identity(spec)
    for way in WAYS:
        asked = f"routed:{way}"
        try:
            tensors = tensors_of(make_policy(asked, plan, spec), spec)
            with running(model, plan, tensors, policy=asked):
                pass
        except ShoalError as error:
            found[way] = str(error.code)
            continue
        for rows in (1, 2):
            batch = batch_of(rows)
            seen = batch["attention_mask"].bool()
            with running(model, plan, tensors, policy=asked) as handle:
                handle.prompt = PREFILL
                right = whole(model, batch)
                counts = handle.trace.counts
                skipped += 4 - counts.asked / counts.tokens
                handle.prompt = None
                got = {"dynamic": stepped(model, batch, "dynamic")}
                if family not in NO_STATIC:
                    got["static"] = stepped(model, batch, "static")
            for cache, logits in got.items():
                error = (logits - right)[seen].abs().max().item()
                if not error <= 1e-4:
                    found[way] = f"{rows} rows, {cache}: differs by {error:.1e}"
    assert found == REFUSED.get(family, {})
    assert skipped > 0.5 or len(found) == len(WAYS)
