"""The one way in: what a model's name stands for, with its config and files compared before a weight is loaded.

Every verb that reads a model comes through `check_source` (or, for the doctor, reads the same metadata), so that a
folder, a GGUF file or a hub id that one of them refuses is refused by all, with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError, first_line, note
from shoal.models import gguf
from shoal.models.depth import depth_of
from shoal.models.folder_kinds import planned_refusal, refuse_other_kind_of_hub
from shoal.models.hub import fetched
from shoal.models.matching_tensors import ShapesOrNames, require_matching_tensors
from shoal.models.meta import meta_model
from shoal.models.shards import Stored, check_folder
from shoal.models.unread_fields import drop_notes
from shoal.plan.file import PLANNED, is_planned

BUILTIN = "smollm2"
MAX_DEPTH = 1_000
"""A config with more layers is damaged, and building its model, without weights, would take minutes."""


@dataclass(frozen=True)
class CheckedSource:
    """A model that fits together, as far as its config and the headers of its files say."""

    name: str
    """As the user typed it."""
    place: Path | str
    """The local folder with its files, or the hub id."""
    config: PreTrainedConfig
    structure: PreTrainedModel
    """The model of the config on the meta device."""
    stored: Mapping[str, Stored]
    """{tensor: its place}; empty for a hub id."""

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a hub id."""
        return self.place if isinstance(self.place, Path) else None


def check_source(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> CheckedSource:
    """Resolve `source`, read its config, build its structure, and compare that with the headers of its files.

    Raises `ModelError`: M302, M306-M309 for what is no model, M307 and M312 for a config, M310, M313 and M336 for
    tensors that do not belong to the model of the config, M353 for a package that its own code needs, and what
    `converted_folder` raises for a .gguf file. Tensors that no part of the model takes are a `ShoalNote`, and so are
    parts that the code of LLM-Drop leaves out.
    """
    place, stored = _resolved(str(source))
    config = _config_of(place, str(source), trust_remote_code, revision)
    model = structure(config, source, trust_remote_code=trust_remote_code)
    shapes: ShapesOrNames | None = {name: found.shape for name, found in stored.items()}
    if isinstance(place, str):
        shapes = _hub_tensors(place, revision)
    extra = require_matching_tensors(str(source), model, shapes) if shapes else ()
    if extra:
        count = f"{len(extra)} tensors" if len(extra) > 1 else "a tensor"
        note(f"{source} holds {count} that no part of {type(model).__name__} takes: {extra[0]}; not read")
    for sentence in drop_notes(config.get_text_config(decoder=True), str(source)):
        note(sentence)
    return CheckedSource(str(source), place, config, model, stored)


def _hub_tensors(hub_id: str, revision: str | None) -> ShapesOrNames | None:
    """The tensors that the index or the header of a hub id names; None where it cannot be reached for them."""
    try:
        return fetched(hub_id, revision)[1]
    except ModelError as error:
        if error.code == "M307":
            return None
        raise


def place_of(source: str) -> Path | str:
    """A checked local folder, or the hub id itself. Raises M306, M307 and what `check_folder` raises."""
    return _resolved(source)[0]


def _resolved(source: str) -> tuple[Path | str, Mapping[str, Stored]]:
    """A local folder with its tensors, or the hub id with none."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # ~NAME for a user that is not known
        path = Path(source)
    folder = path
    if source == BUILTIN:
        folder = gguf.builtin_folder()
    elif path.suffix == ".gguf":
        folder = gguf.converted_folder(path)
    if folder.is_dir():
        if is_planned(folder):
            raise planned_refusal(source)
        return folder, check_folder(folder)
    if path.exists():
        raise ModelError(f"{source} is a file but no .gguf; give a folder, a .gguf file or a hub id", code="M306")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return source, {}
    raise ModelError(
        f"there is no model {source!r}; give a folder, a .gguf file, a hub id (owner/name) or the built-in {BUILTIN!r}",
        code="M307",
    )


def local_folder(source: str | Path) -> Path:
    """The checked folder of a local model, of a .gguf file or of the built-in model (both converted on first use).
    Raises M317 for a hub id."""
    place = place_of(str(source))
    if isinstance(place, str):
        raise ModelError(f"{source} is a hub id, not a local folder; download it and give its folder", code="M317")
    return place


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file that a model's name stands for: a .gguf file itself, or that of the built-in model; else None."""
    if str(source) == BUILTIN:
        return gguf.builtin_file()
    path = Path(source).expanduser()
    return path if path.suffix == ".gguf" else None


def load_config(
    source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedConfig:
    """The config of a folder, hub id or the built-in model. Raises M307, M312, M332, M353."""
    return _config_of(place_of(str(source)), str(source), trust_remote_code, revision)


def _config_of(place: Path | str, source: str, trust_remote_code: bool, revision: str | None) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision or "main")
        text = config.get_text_config(decoder=True)
    except Exception as error:  # config classes check their fields with errors of their own
        if isinstance(place, str) and isinstance(error, OSError):
            refuse_other_kind_of_hub(place)
        raise unreadable(source, error) from None
    if config.model_type == PLANNED:  # of a hub id
        raise planned_refusal(source)
    if not isinstance(text, PreTrainedConfig):
        raise ModelError(
            f"cannot load {source}: its config has a part for text that {config.model_type} does not know; mend it",
            code="M307",
        )
    _require_depth(config, source)
    return config


def structure(config: PreTrainedConfig, source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """`meta_model(config)`. Raises M307 when no causal language model can be made of it, M312 when that takes code of
    its own, M332 for a depth that no model has, M353 for a package that is not installed."""
    _require_depth(config, source)
    try:
        return meta_model(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # odd numbers in a config raise whatever the arithmetic with them raises
        known = unreadable(str(source), error)
        if known.code != "M307":
            raise known from None
        raise ModelError(
            f"no causal language model can be made of the config of {source}: {first_line(error)}", code="M307"
        ) from None


def unreadable(source: str, error: Exception) -> ModelError:
    """What transformers says of a model that it cannot read, with our code."""
    if isinstance(error, ModelError):
        return error
    if isinstance(error, ImportError):
        return ModelError(f"{source} needs a package that cannot be imported: {first_line(error)}", code="M353")
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source} needs code of its own; read it, then pass --trust-remote-code if you trust it", code="M312"
        )
    if type(error).__name__ == "SafetensorError":
        return ModelError(f"the weights in {source} are damaged ({first_line(error)}); copy them again", code="M309")
    return ModelError(f"cannot load {source}: {first_line(error)}", code="M307")


def _require_depth(config: PreTrainedConfig, source: str | Path) -> None:
    depth = depth_of(config.get_text_config(decoder=True))
    if depth is not None and not 0 < depth <= MAX_DEPTH:
        raise ModelError(
            f"the config of {source} says {str(depth)[:20]} layers; a model has 1 to {MAX_DEPTH}", code="M332"
        )
