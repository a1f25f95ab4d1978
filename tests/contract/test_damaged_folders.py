"""What the fuzzed folders found (`tests/fuzz/folders.py`), by kind: damage that one way in saw and another did not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import ShoalError
from shoal.models.inspect import inspect
from shoal.models.load import inspect_source, load
from shoal.writing.stream import stream

from ..survey.kinds import tiny_kind
from .families import tiny

WAYS: dict[str, Callable[[Path, Path], object]] = {
    "inspected": lambda base, _: inspect_source(base),
    "loaded": lambda base, _: inspect(load(base, device="cpu").model),
    "streamed": lambda base, out: stream(base, "0,2-3", out),
}


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A sound folder of the family."""
    model = tiny_kind(request.param) if request.param == "bert" else tiny(request.param)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def code_of(way: str, base: Path) -> str | None:
    out = base.parent / "out"
    try:
        WAYS[way](base, out)
    except ShoalError as error:
        assert not out.exists()
        return error.code
    return None


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a dimension more": lambda t: t[None],
    "turned": lambda t: t.T.contiguous(),
    "flat": lambda t: t.flatten(),
}


@pytest.mark.parametrize("base", ["qwen3_moe", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_an_expert_of_another_shape_does_not_pass_for_its_elements(base: Path, part: str) -> None:
    sound = {way: code_of(way, base) for way in ("inspected", "loaded")}
    assert set(sound.values()) == {None}
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.3.mlp.experts.3.{part}.weight"
    for change in SHAPES.values():
        save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})
        assert {way: code_of(way, base) for way in WAYS} == dict.fromkeys(WAYS, "M336")
    with pytest.raises(ShoalError, match=f"see {name}"):
        inspect_source(base)


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ("deepseek_v3", {"num_experts_per_tok": None}),
        ("deepseek_v3", {"n_group": 0}),
        ("deepseek_v3", {"topk_group": 9}),
        ("bert", {"num_attention_heads": -4}),
    ],
    indirect=["base"],
)
def test_a_config_whose_model_does_not_run_is_refused_without_weights_too(
    base: Path, fields: dict[str, object]
) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert {way: code_of(way, base) for way in WAYS} == dict.fromkeys(WAYS, "M305")
