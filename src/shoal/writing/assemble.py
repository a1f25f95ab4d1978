"""A stock model around tensors that exist already, and that its class does not get to write to."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.models.meta import blank


def assembled(like: PreTrainedModel, config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model of `config` with the class of `like` and with `tensors` themselves, not copies, as its state dict.

    A stock class may write to its weights while it is loaded (Youtu zeroes the row of the padding token), and these
    weights are the base model's. So it is loaded with zeros, which take no memory, and given `tensors` afterwards.
    Saved, it uses the names of tensors that `like` was loaded with. Raises W213 when names or shapes do not fit.
    """
    blanks = {name: blank(tensor) for name, tensor in tensors.items()}
    made, info = type(like).from_pretrained(
        None, config=config, state_dict=blanks, output_loading_info=True, dtype=like.dtype
    )
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise WriteError(f"the rewritten {type(like).__name__} does not take its tensors: {wrong}", code="W213")
    made.load_state_dict(tensors, assign=True)
    ties = made.all_tied_weights_keys
    for target, source in list(ties.items()):
        if {target, source} <= tensors.keys() and not torch.equal(tensors[target], tensors[source]):
            del ties[target]  # what the config ties and the base does not: kept apart, as when a checkpoint has both
    made.tie_weights(recompute_mapping=False)
    _name_as(like, made)
    return made.to(like.device).eval()


def _name_as(like: PreTrainedModel, made: PreTrainedModel) -> None:
    """Names in memory and in files differ for some families (experts are one tensor in memory). A model remembers which
    it was loaded with; one that was not loaded from files is saved with those of its family's checkpoints."""
    known = getattr(like, "_weight_conversions", None)
    if known is not None:
        made._weight_conversions = known
    elif hasattr(made, "_weight_conversions"):
        del made._weight_conversions
