"""What Shoal writes for engines is what the plugin for vLLM reads: its reader, without vLLM, on folders made here."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.errors import PlanError
from shoal.models.engine_slots import FORMAT, engine_slots
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.plan.tensors import MAP_TENSORS
from shoal.writing.planned_folder import write_planned

from .families import tiny
from .shares import every

PACKAGE = Path(__file__).parents[2] / "packages" / "shoal-vllm"
FAMILIES = ["llama", "qwen2", "gemma3_text", "mixtral", "cohere2", "smollm3", "phi", "olmo2", "gpt_neox", "starcoder2"]
PLANS = ["0-3", "0,2-3", "0,1a,2,3m", "0,1-2,1-2,3", "0-1,2=1,3=0", "0,~1-2:m,3,~3:n", "0,2,1,3", "0-1,2@1,3"]


def reader() -> Any:
    """The plugin's module `slots`, loaded from its file."""
    if "shoal_vllm_slots" not in sys.modules:
        place = PACKAGE / "src" / "shoal_vllm" / "slots.py"
        spec = importlib.util.spec_from_file_location("shoal_vllm_slots", place)
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["shoal_vllm_slots"]


def maps(size: int) -> dict[str, torch.Tensor]:
    return {
        "m.weight": torch.eye(size), "m.bias": torch.zeros(size), "m.limit": torch.ones(1),
        "n.up": torch.zeros(size, 2), "n.down": torch.zeros(2, size),
    }  # fmt: skip


def written(family: str, text: str, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    model = tiny(family, "eager")
    every_map = maps(model.config.hidden_size) if weights is None else weights
    named = {name: t for name, t in every_map.items() if f":{name.split('.')[0]}" in text}
    write_planned(model, text, folder, weights=named, prove=False)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_the_two_sides_name_one_format_and_one_set_of_fields() -> None:
    theirs = reader()
    assert theirs.FORMAT == FORMAT
    assert set(MAP_TENSORS) == theirs._MAP
    opened = open_model(tiny("llama", "eager"))
    plan = parse_plan("0-1,2@1,3@v0@a1,~0-1:m,2a=0:x,0m=s:x", Plan.identity(opened.spec))
    found = engine_slots(opened, plan, {})
    assert found is not None
    assert {name for slot in found["slots"] for name in slot} == theirs._FIELDS
    assert {name for one in found["parts"].values() for name in one} == set(theirs.Part.__dataclass_fields__)
    assert set(found) - {"format", "architectures"} == set(theirs.Slots.__dataclass_fields__) - {"architecture"}


@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_every_tensor_of_a_folder_has_a_slot_and_every_slot_its_tensors(family: str, text: str, tmp_path: Path) -> None:
    try:
        config = written(family, text, tmp_path / "m")
    except PlanError:
        pytest.skip("the family does not allow this plan")
    slots = reader().read_slots(config)
    fields = dict(slots.config)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert type(stock).__name__ == slots.architecture
    wanted = set(slots.outside) | {f"shoal.{one}.{name}" for one in slots.new for name in slots.new[one]}
    for slot, layer in zip(slots.slots, find_stack(stock).layers, strict=True):
        silent = tuple(f"{name}." for name in (*slots.left_out(slot), *slots.unmade(slot)))
        matrices = {name for name, p in layer.named_parameters() if p.dim() > 1}
        names = [name for name in layer.state_dict() if not name.startswith(silent)]
        wanted |= {slots.source(slot, name, matrix=name in matrices) for name in names}
    with safe_open(tmp_path / "m" / "planned.safetensors", framework="pt") as held:
        assert set(held.keys()) == wanted


def test_own_tensors_stand_over_the_layers_and_later_ones_over_earlier(tmp_path: Path) -> None:
    size = tiny("llama", "eager").config.hidden_size
    own = {"x.mlp.up_proj.up": torch.zeros(tiny("llama", "eager").config.intermediate_size, 2)}
    own["x.mlp.up_proj.down"] = torch.zeros(2, size)
    slots = reader().read_slots(written("llama", "0-1,2=1:x,3", tmp_path / "m", own))
    slot = slots.slots[2]
    assert slots.own(slot) == {name.removeprefix("x."): f"shoal.{name}" for name in own}
    assert slots.source(slot, "mlp.up_proj.weight", matrix=True) == "model.layers.1.mlp.up_proj.weight"
    assert slots.source(slot, "input_layernorm.weight", matrix=False) == "model.layers.2.input_layernorm.weight"
    assert slots.stores() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return written("llama", "0,1a,2,2,3m,3@2,~1-2:m,1m", tmp_path_factory.mktemp("sound") / "m")


def _set(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what a path in the config names, as slots.3.base."""

    def change(config: dict[str, Any]) -> None:
        *path, last = place.split(".")
        held: Any = config["slots"]
        for name in path:
            held = held[int(name) if isinstance(held, list) else name]
        held[int(last) if isinstance(held, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (_set("format", "shoal-slots/2"), "W301", "newer shoal-vllm"),
        (_set("format", None), "W301", "newer Shoal"),
        (_set("format", "shoal-slots/0"), "W301", "newer Shoal"),
        (_set("slots.0.gate", "g"), "W301", "'gate'"),
        (_set("slots.0.base", 9), "W302", "slot 0 names layer 9"),
        (_set("slots.0.base", "0"), "W302", "slot 0"),
        (_set("slots.0.base", -1), "W302", "slot 0"),
        (_set("slots.0.tie", 4), "W302", "the base has 4 layers"),
        (_set("slots.0.part", "mlps"), "W302", "'mlps'"),
        (_set("slots", []), "W302", "0 slots"),
        (_set("slots", None), "W302", "'slots'"),
        (_set("config.num_hidden_layers", 6), "W302", "6 layers"),
        (_set("parts", {}), "W302", "parts"),
        (_set("architectures", []), "W302", "architecture"),
        (_set("slots.0", {"base": 0, "part": "layer", "keys": 2, "values": 2}), "W303", "slot 2"),
        (_set("slots.5.values", 4), "W304", "without the other half"),
        (_set("slots.5", {"base": 3, "part": "layer", "keys": 4, "values": 4}), "W303", "stores none"),
        (_set("slots.5.map", 2), "W304", "attention map"),
        (_set("slots.1.own", ["y"]), "W305", "'y'"),
        (_set("new.m.wheight", [1]), "W305", "'wheight'"),
        (_set("slots.1.own", ["m"]), "W306", "two owners"),
        (_set("new.z", {"weight": [1]}), "W306", "'z'"),
    ],
)
def test_a_folder_edited_by_hand_is_refused_in_one_sentence(
    sound: dict[str, Any], damage: Callable[[dict[str, Any]], None], code: str, says: str
) -> None:
    assert reader().read_slots(sound).stores() == [0, 1, 2, 3]
    config = copy.deepcopy(sound)
    damage(config)
    with pytest.raises(reader().FolderError) as caught:
        reader().read_slots(config)
    message = str(caught.value)
    assert caught.value.code == code and message.endswith(f"({code})")
    assert says in message and "\n" not in message and len(message) < 250


def test_a_plan_without_slots_is_refused_by_what_it_is(tmp_path: Path) -> None:
    config = written("llama", "0,(1|2),3", tmp_path / "m")
    with pytest.raises(reader().FolderError, match=r"layers run in parallel.*W300"):
        reader().read_slots(config)
    with pytest.raises(reader().FolderError, match=r"no slots.*W300"):
        reader().read_slots({})


def test_the_plugin_imports_no_shoal_and_asks_for_no_transformers() -> None:
    said = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    assert said["dependencies"] == [] and said["entry-points"]["vllm.general_plugins"] == {
        "shoal": "shoal_vllm:register"
    }
    for file in (PACKAGE / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "shoal"], file


def test_the_reader_of_slots_needs_the_standard_library_alone() -> None:
    for node in ast.walk(ast.parse((PACKAGE / "src" / "shoal_vllm" / "slots.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("__future__", "collections.abc", "dataclasses", "typing")
        assert not isinstance(node, ast.Import)
