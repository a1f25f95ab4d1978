"""Reuse of branches on a diffusion transformer of diffusers, under its own sampler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from shoal.reuse.branches import Call, named_branches
from shoal.reuse.fit import fit_reuse, recorded_calls, reuse_error
from shoal.reuse.running import reusing
from shoal.reuse.schedule import ReuseSchedule

diffusers: Any = pytest.importorskip(
    "diffusers", reason="the extra diffusion is not installed: pip install 'shoal[diffusion]'"
)

STEPS, WIDTH = 6, 16
PATTERNS = ("transformer_blocks.*.attn1", "transformer_blocks.*.ff")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=4, out_channels=4, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, dropout=0.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that branches say something beside the residual stream
    return model.eval()


def sample(model: nn.Module) -> list[torch.Tensor]:
    """What the model made in each step of DDIM."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x, made = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), []
    for t in scheduler.timesteps:
        with torch.no_grad():
            made.append(model(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample)
        x = scheduler.step(made[-1], t, x).prev_sample
    return made


def constant(model: nn.Module, beta: float) -> ReuseSchedule:
    return ReuseSchedule.constant(named_branches(model, PATTERNS), STEPS, beta)


def test_all_computed_is_the_dense_model_bit_for_bit() -> None:
    model = tiny()
    wanted = sample(model)
    with reusing(model, constant(model, 1.0)) as trace:
        found = sample(model)
    assert all(map(torch.equal, found, wanted))
    assert trace.computed == dict.fromkeys(named_branches(model, PATTERNS), STEPS)
    assert all(map(torch.equal, sample(model), wanted))


def test_all_reused_is_plain_skipping_of_the_branches() -> None:
    """Against hooks that put what the step before made in the place of what was computed."""
    model, kept, step = tiny(), {}, [-1]

    def replace(name: str, out: torch.Tensor) -> torch.Tensor:
        if step[0] % 2 == 0:
            kept[name] = out
        return kept[name]

    def begins(*_: Any) -> None:
        step[0] += 1

    hooks = [model.register_forward_pre_hook(begins)]
    for name in named_branches(model, PATTERNS):
        hook = model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: replace(name, out))
        hooks.append(hook)
    wanted, dense = sample(model), sample(tiny())
    for hook in hooks:
        hook.remove()
    inner: Counter[str] = Counter()
    for name in ("attn1.to_q", "ff.net.2"):
        for at in range(3):
            one = model.get_submodule(f"transformer_blocks.{at}.{name}")
            one.register_forward_hook(lambda *_, name=name: inner.update([name]))
    with reusing(model, constant(model, 0.0)):
        found = sample(model)
    assert all(map(torch.equal, found, wanted))
    assert inner == {"attn1.to_q": 9, "ff.net.2": 9}
    assert float((found[1] - dense[1]).norm() / dense[1].norm()) > 1e-3


def test_a_planted_branch_that_changes_is_computed_and_others_are_reused() -> None:
    """Of all branches the last mlp alone sees the time step, and the latents stay as they are."""
    model = tiny()
    with torch.no_grad():
        for at, block in enumerate(model.transformer_blocks):  # type: ignore[arg-type]
            made = block.norm1.linear  # shift, scale and gate of the attention, then those of the mlp
            made.bias.view(6, WIDTH)[:] = torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None]
            seen = made.weight.view(6, WIDTH, WIDTH)
            seen[[0, 1, 2, 5]] = 0
            if at != 2:
                seen[[3, 4]] = 0
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 2])
    calls: list[Call] = [
        ((x,), {"timestep": torch.tensor([t, t]), "class_labels": labels}) for t in (99, 60, 40, 20, 10, 0)
    ]
    made = fit_reuse(model, constant(model, 0.5), [calls], weight=1e-4, rate=0.2, epochs=40).schedule
    changing = made.branches.index("transformer_blocks.2.ff")
    cached = made.betas[1::2]
    assert changing == 5 and float(cached[:, 5].min()) > 0.9 and float(cached[:, :5].max()) < 0.1
    assert reuse_error(model, made, [calls]) < 1e-10 < reuse_error(model, constant(model, 0.0), [calls])


def test_a_run_of_the_sampler_is_recorded_and_learned_from() -> None:
    model = tiny()
    with recorded_calls(model) as calls:
        sample(model)
    made = fit_reuse(model, constant(model, 0.5), [calls], weight=1.0, rate=0.5, epochs=10).schedule
    assert sum(made.planned.values()) == 3 * 6
    with reusing(model, made) as trace:
        sample(model)
    assert trace.computed == made.planned
