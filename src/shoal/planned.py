"""Planned checkpoints: a plan and the tensors that it reads, in a folder that transformers loads where Shoal is.

`config.json` has the model type `shoal`, so that a process without Shoal refuses the folder instead of filling what is
not there with random numbers; the base's config and the plan are inside. `import shoal.auto` makes the type known. What
is loaded is a model of the base's own class with the plan on it: one executor serves live plans and planned
checkpoints, and there is no modeling code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shoal.errors import ModelError, WriteError, first_line
from shoal.executing.held_tensors import HeldTensors
from shoal.executing.planned_tensors import NEW, as_held, read_tensors, require_fit
from shoal.executing.read_tensors import tensors_read
from shoal.executing.weights import Tensors, as_stored, used_by
from shoal.live import Running, apply
from shoal.models.checkpoint import read_json
from shoal.models.engine_slots import slots_or_why
from shoal.models.kinds import CAUSAL, LOADED_BY, SEQ2SEQ, auto_class, auto_for, auto_of, loaded_by
from shoal.models.lists import BESIDE
from shoal.models.meta import blank, meta_model
from shoal.models.opened import OpenedModel, open_model
from shoal.models.planned_options import change_base, local_folder_of, one_device
from shoal.models.stacks import find_stacks
from shoal.plan import Plan, plan_from_json, plan_to_json
from shoal.plan.file import PLANNED, in_order

MODEL_TYPE = PLANNED
FILES = "planned{suffix}.safetensors"
"""Not the names under which transformers looks for weights: the base's own class, which finds its config in here, would
load them as a model of the base, whatever the plan says."""
_KEY = "_shoal_planned"


class ShoalConfig(PreTrainedConfig):
    """The config of a planned checkpoint: `base`, the base's config as plain data, `plan`, the content of a plan.json,
    and `slots`, the same for engines (`shoal.models.engine_slots`), or `no_slots`, why there is no such form."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        slots: dict[str, Any] | None = None,
        no_slots: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.base, self.plan, self.slots, self.no_slots = base or {}, plan or {}, slots, no_slots
        super().__init__(**kwargs)

    def base_config(self) -> PreTrainedConfig:
        """The base's config, of its own class. Raises M383 where this transformers makes no language model of it."""
        fields = dict(self.base) if isinstance(self.base, dict) else {}
        kind = str(fields.pop("model_type", ""))
        try:
            found: PreTrainedConfig = AutoConfig.for_model(kind, **fields)
            _class_of(found)
        except Exception as error:  # odd numbers in a config raise whatever its class raises
            raise ModelError(
                f"of the base of this checkpoint (type {kind!r:.60}) transformers makes no language model "
                f"({first_line(error)}); install a newer one, or write the checkpoint anew",
                code="M383",
            ) from None
        return found


class PlannedCheckpoint:
    """What a loaded planned checkpoint is besides a model of its base's class."""

    def save_pretrained(self, save_directory: str | Path, max_shard_size: int | str = "5GB", **_: Any) -> None:
        """Write the planned checkpoint again: config, tensors that the plan reads, generation config."""
        model: Any = self
        bound = model.__dict__[_KEY].bound
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, open_model(model), bound.plan, bound.tensors, max_shard_size=max_shard_size)


class ShoalForCausalLM(PreTrainedModel):
    """Loads planned checkpoints; what it returns is a model of the base's own class."""

    config_class = ShoalConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: ShoalConfig | None = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        revision: str | None = None,
        **others: Any,
    ) -> Any:
        """The model of a planned checkpoint, in evaluation mode with its plan on it.

        `dtype`: as transformers takes it; "auto" and None are the checkpoint's. `device_map`: one device. `others`:
        `experts_implementation`, where the folder of a hub id is kept, and fields of the base's config. Raises
        `ModelError` M309 for files that are damaged, M310 and M400 for tensors that are not those of the plan, M383 for
        an unknown base or another kind, M384 for devices, M401 for an option that would change nothing,
        `NotationError` for a plan that cannot be read, `PlanError` for one that does not belong to the base.
        """
        folder = local_folder_of(pretrained_model_name_or_path, revision, others)
        given = config if isinstance(config, ShoalConfig) else ShoalConfig.from_pretrained(folder)
        if cls.__name__ not in (given.architectures or [cls.__name__]):
            raise ModelError(
                f"the planned checkpoint {folder} is loaded by {auto_for(given)}, and not as {cls.__name__}; call that",
                code="M383",
            )
        device = one_device(device_map)
        base = given.base_config()
        how = change_base(base, given, others)
        how |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        asked = next((one for one in (dtype, others.get("torch_dtype")) if one not in (None, "auto")), given.dtype)
        model = _loaded(folder, base, given.plan, asked, how)
        made = model if device is None else model.to(device)
        info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (made, info) if output_loading_info else made


class ShoalForSeq2SeqLM(ShoalForCausalLM):
    """The same for encoder-decoders."""


def config_of(opened: OpenedModel, plan: Plan, weights: Tensors) -> ShoalConfig:
    """The config of the planned checkpoint of a base model under a plan with its new tensors."""
    model = opened.model
    base = model.config.to_dict()
    base |= {"dtype": str(model.dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    kind = ShoalForSeq2SeqLM if loaded_by(model) == SEQ2SEQ else ShoalForCausalLM
    text = model.config.get_text_config(decoder=True)
    special = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    held = [name for name in checkpoint_tensors(opened, plan, weights) if not name.startswith(NEW)]
    slots, why = slots_or_why(opened, plan, used_by(plan, weights), held)
    return ShoalConfig(
        base=json.loads(json.dumps(base)), plan=json.loads(plan_to_json(plan)), vocab_size=text.vocab_size,
        dtype=base["dtype"], architectures=[kind.__name__], slots=slots, no_slots=why, **special,
    )  # fmt: skip


def checkpoint_tensors(opened: OpenedModel, plan: Plan, weights: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor of the planned checkpoint by its name in the file: the base's by their names in its state dict, new
    ones as shoal.ID.NAME. A tensor of the base that has several names is there under the first."""
    state, seen = opened.model.state_dict(), set[tuple[int, int]]()
    read = tensors_read(opened, plan, weights)
    found: dict[str, torch.Tensor] = {}
    for name in (name for name in state if name in read):
        storage = (state[name].data_ptr(), state[name].numel())
        if storage not in seen or not state[name].numel():
            found[name] = state[name]
        seen.add(storage)
    kind = opened.model.dtype
    new = {name: t.to(kind) if t.is_floating_point() else t for name, t in used_by(plan, weights).items()}
    return found | {f"{NEW}{name}": tensor for name, tensor in new.items()}


def save_checkpoint(
    folder: Path, opened: OpenedModel, plan: Plan, weights: Tensors, *, max_shard_size: int | str = "5GB"
) -> None:
    """Write config, tensors and generation config of a planned checkpoint into a folder that exists."""
    tensors = {name: as_stored(t) for name, t in checkpoint_tensors(opened, plan, weights).items()}
    save_torch_state_dict(tensors, folder, filename_pattern=FILES, max_shard_size=max_shard_size)
    config_of(opened, plan, weights).save_pretrained(folder)
    if opened.model.generation_config is not None:
        opened.model.generation_config.save_pretrained(folder)


def _loaded(folder: Path, base: PreTrainedConfig, content: Any, dtype: Any, how: Mapping[str, Any]) -> PreTrainedModel:
    """The model with the plan `content` on it. `how`: the implementations that the caller chose."""
    empty = meta_model(base)
    text = json.dumps(in_order(content, [stack.name for stack in find_stacks(empty)]))
    plan = plan_from_json(text, where=f"the plan in {folder / 'config.json'}")
    tensors = read_tensors(folder)
    kind = _class_of(base)
    blanks = {name: blank(t) for name, t in empty.state_dict().items()}
    model: PreTrainedModel = kind.from_pretrained(None, config=base, state_dict=blanks, dtype=dtype, **how)
    model.load_state_dict(as_held(folder, tensors, model), assign=True, strict=False)
    model.tie_weights(recompute_mapping=False)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # which says what is wrong with a damaged one
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    new = HeldTensors({name.removeprefix(NEW): t for name, t in tensors.items() if name.startswith(NEW)}, model.dtype)
    opened = open_model(model)
    read = require_fit(folder, opened, plan, new, tensors)
    kind = _planned_class(kind, str(auto_of(model)))
    model.__class__ = kind
    model.add_module(BESIDE, new.module)
    handle = apply(model, plan, new)
    model.__dict__.pop("save_pretrained", None)  # the plan's own, which says that the whole base is written
    model.__dict__[_KEY] = handle
    _empty(opened, read)
    return model


def _class_of(config: PreTrainedConfig) -> Any:
    """The class of the language model of a config: a causal one, or an encoder-decoder where the config names one."""
    return auto_class(SEQ2SEQ if auto_for(config) == SEQ2SEQ else CAUSAL)._model_mapping[type(config)]


@cache
def _planned_class(kind: Any, auto: str) -> Any:
    own = {"__module__": kind.__module__, "__doc__": kind.__doc__, LOADED_BY: auto}
    return type(kind.__name__, (PlannedCheckpoint, kind), own)


def _empty(opened: OpenedModel, read: frozenset[str]) -> None:
    """Take the memory of what no run reads: zeros that stood in for what the file does not hold."""
    saved = opened.model.state_dict().keys()
    for name, tensor in [*opened.model.named_parameters(), *opened.model.named_buffers()]:
        if name not in read and name in saved and not name.startswith(f"{BESIDE}."):
            tensor.data = tensor.data.new_empty((0, *tensor.shape[1:]))  # a matrix stays one, which ties ask


def require_plannable(model: PreTrainedModel, plan: Plan) -> None:
    """Raise W275 for a model that no planned checkpoint can hold: not a causal language model or an encoder-decoder of
    a class that transformers has."""
    if auto_of(model) not in (CAUSAL, SEQ2SEQ):
        raise WriteError(
            f"a planned checkpoint holds what {CAUSAL} and {SEQ2SEQ} make, and {type(model).__name__} is none of that; "
            "run the plan live",
            code="W275",
        )


def handle_of(model: nn.Module) -> Running | None:
    """The plan that a loaded planned checkpoint runs; None for any other model."""
    found: Running | None = model.__dict__.get(_KEY)
    return found


AutoConfig.register(MODEL_TYPE, ShoalConfig, exist_ok=True)
AutoModelForCausalLM.register(ShoalConfig, ShoalForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(ShoalConfig, ShoalForSeq2SeqLM, exist_ok=True)
