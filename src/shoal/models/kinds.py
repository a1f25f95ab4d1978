"""Which Auto class a model belongs to, and whether it is a causal decoder: from transformers' own tables."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig

from shoal.errors import ModelError

CAUSAL = "AutoModelForCausalLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
PICTURES, MEDIA = "AutoModelForImageTextToText", "AutoModelForMultimodalLM"
DECODERS = (CAUSAL, PICTURES, MEDIA)
"""The Auto classes of models that give next-token scores after text, and some of them after pictures or sound too."""
AUTO = (
    CAUSAL, SEQ2SEQ, "AutoModelForSpeechSeq2Seq", "AutoModel", "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice", "AutoModelForNextSentencePrediction", "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling", "AutoModelForZeroShotImageClassification", "AutoModelForAudioClassification",
    "AutoModelForCTC", "AutoModelForTextEncoding", "AutoBackbone", PICTURES, MEDIA, "AutoModelForPreTraining",
)  # fmt: skip
"""The Auto classes that are looked through, in this order: a class that several name belongs to the first."""


LOADED_BY = "_shoal_loaded_by"
"""Where the class of a loaded planned checkpoint says which Auto class makes its base."""


def auto_class(name: str) -> Any:
    """The Auto class of that name."""
    return getattr(transformers, name)


def auto_of(model: nn.Module) -> str | None:
    """The Auto class that makes a model of this very class from its config; None when there is none."""
    kind = type(getattr(model, "config", None))
    return next((name for name in AUTO if type(model) in _classes(name, kind)), None)


def loaded_by(model: nn.Module) -> str | None:
    """The same, of a loaded planned checkpoint, whose class is its own, that of its base."""
    found: str | None = getattr(type(model), LOADED_BY, None)
    return auto_of(model) if found is None else found


def auto_for(config: PreTrainedConfig) -> str:
    """The Auto class for a folder: the one that makes what `architectures` names, also by code of its own (`auto_map`).

    Without a hint a config that has a causal model is one, as before; another has the first Auto class that knows it.
    """
    names, own = config.architectures, getattr(config, "auto_map", None)
    wanted = str(names[0]) if isinstance(names, list) and names else ""  # both come from a file that anyone wrote
    own = own if isinstance(own, dict) else {}
    known = {name: {one.__name__ for one in _classes(name, type(config))} for name in AUTO}
    named = [name for name in AUTO if wanted in known[name] or str(own.get(name, "")).endswith(f".{wanted}")]
    return next(iter(named or [name for name in AUTO if known[name] or name in own]), CAUSAL)


def is_causal(model: nn.Module) -> bool:
    """True for a causal language model, for its headless or otherwise headed relatives, for one that reads pictures or
    sound beside text, and for a class that no Auto class names: the decoder of all of these is planned, and what makes
    pictures into tokens is carried along. Encoders that a config can turn into decoders are none until it does."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or (auto := loaded_by(model)) in (CAUSAL, None):
        return True
    if auto in DECODERS:
        return not config.is_encoder_decoder
    other = config.is_encoder_decoder or (_classes("AutoModelForMaskedLM", type(config)) and not is_decoder(config))
    return bool(_classes(CAUSAL, type(config))) and not other


def is_decoder(config: PreTrainedConfig) -> bool:
    """Does the config of a family of encoders ask for a decoder?"""
    return bool(getattr(config, "is_decoder", False))


def scores_text(model: nn.Module) -> bool:
    """Whether the model is a decoder with next-token scores: what `AutoModelForCausalLM` makes and what reads pictures
    or sound too."""
    return is_causal(model) and loaded_by(model) in DECODERS


def require_causal(model: nn.Module, what: str) -> None:
    """Raise M322 when `what`, which reads a causal model's next-token scores, is asked of another kind of model."""
    name = auto_of(model)
    if name is not None and not scores_text(model):
        raise ModelError(
            f"{what} needs the next-token scores of a causal language model, and {type(model).__name__} ({name}) has "
            "none; judge the written model with the tests of its own task",
            code="M322",
        )


def require_answers(model: nn.Module, what: str) -> None:
    """Raise M322 when `what`, which reads or writes a text token by token after another one, is asked of a model that
    is neither a causal language model nor an encoder-decoder with a head."""
    if loaded_by(model) != SEQ2SEQ:
        require_causal(model, what)


def require_text(model: nn.Module, what: str) -> None:
    """Raise M323 when `what`, which reads text, is asked of a model that reads something else."""
    name = getattr(model, "main_input_name", "input_ids")
    if auto_of(model) is not None and not scores_text(model) and name != "input_ids":
        raise ModelError(
            f"{what} reads text, and {type(model).__name__} reads {name}, of which there is no data; name the layers "
            "(--plan) or remove them by their position (--method position)",
            code="M323",
        )


def _classes(name: str, kind: type[PreTrainedConfig]) -> tuple[type, ...]:
    """The classes that an Auto class has for a config class."""
    found = auto_class(name)._model_mapping.get(kind, ())
    return tuple(found) if isinstance(found, tuple | list) else (found,)
