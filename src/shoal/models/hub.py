"""The metadata of a hub id: config.json and the index, or the header of a single file; nothing else is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError

from shoal.errors import ModelError, first_line
from shoal.models.checkpoint import INDEX, read_header, read_json
from shoal.models.folder_kinds import planned_refusal, refuse_other_kind_of_hub
from shoal.models.shards import SINGLE, weight_map
from shoal.plan.file import PLANNED

Tensors = dict[str, tuple[int, ...] | None]


def fetched(hub_id: str, revision: str | None = None) -> tuple[dict[str, Any], Tensors]:
    """(config, {tensor: shape, or None where only an index was read}) of a hub id, by way of huggingface_hub, so with
    its cache, HF_ENDPOINT and HF_HUB_OFFLINE.

    Raises `ModelError` M307 when it cannot be reached or does not exist, M308 when it has no safetensors, M302, M309.
    """
    config = _file(hub_id, "config.json", revision)
    if config is None:
        refuse_other_kind_of_hub(hub_id)
        raise ModelError(f"{hub_id} has no config.json; give a Hugging Face model", code="M302")
    content = read_json(config)
    if content.get("model_type") == PLANNED:
        raise planned_refusal(hub_id)
    index = _file(hub_id, INDEX, revision)
    if index is not None:
        return content, dict.fromkeys(weight_map(read_json(index), f"{INDEX} of {hub_id}"), None)
    return content, _header(hub_id, revision)


def _file(hub_id: str, name: str, revision: str | None) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, name, revision=revision))
    except LocalEntryNotFoundError as error:
        if name != "config.json":
            return None
        raise _unreachable(hub_id, error) from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(hub_id, error) from None


def _header(hub_id: str, revision: str | None) -> Tensors:
    local = huggingface_hub.try_to_load_from_cache(hub_id, SINGLE, revision=revision)
    if isinstance(local, str):
        return {name: shape for name, (_, shape) in read_header(Path(local)).items()}
    try:
        api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
        found = api.parse_safetensors_file_metadata(hub_id, SINGLE, revision=revision)
        return {name: tuple(info.shape) for name, info in found.tensors.items()}
    except LocalEntryNotFoundError as error:
        raise _unreachable(hub_id, error) from None
    except (EntryNotFoundError, NotASafetensorsRepoError):
        raise ModelError(
            f"{hub_id} has no {SINGLE} and no {INDEX}; convert it to safetensors first", code="M308"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(hub_id, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ModelError(f"the header of {SINGLE} of {hub_id} is wrong ({type(error).__name__})", code="M309") from None


def _unreachable(hub_id: str, error: Exception) -> ModelError:
    first = first_line(error)
    return ModelError(f"cannot read {hub_id} from the hub: {first}", code="M307")
