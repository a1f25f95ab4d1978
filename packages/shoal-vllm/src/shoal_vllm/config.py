"""From the config of a planned checkpoint to the config that vLLM builds: a stock one with a layer for each slot."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from shoal_vllm.slots import MODEL_TYPE, read_slots

FIELD = "shoal"
"""The field of the stock config that keeps what the folder said, through vLLM's processes."""
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class PlannedConfig(PreTrainedConfig):
    """Reads a planned checkpoint's config.json; what it returns is the stock config of one layer for each slot."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The stock config. Raises `FolderError` for what is no planned checkpoint that vLLM can run."""
        found = read_slots(config_dict)
        fields = dict(found.config)
        unused = kwargs.pop("return_unused_kwargs", False)
        stock = AutoConfig.for_model(fields.pop("model_type"), **fields)
        stock.architectures = ["ShoalMoEForCausalLM" if _has_experts(stock) else "ShoalForCausalLM"]
        said = {name: config_dict.get(name) for name in ("slots", "plan")}
        setattr(stock, FIELD, said)
        for name in _SPECIAL:
            if config_dict.get(name) is not None:
                setattr(stock, name, config_dict[name])
        if name := kwargs.pop("name_or_path", None):
            stock._name_or_path = str(name)
        return (stock, kwargs) if unused else stock


def _has_experts(config: Any) -> bool:
    """As vLLM asks it."""
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    return bool(ModelArchConfigConvertorBase(config, config.get_text_config()).get_num_experts())
