"""Models whose code comes with them: whether it runs here, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files, init_hf_modules

from shoal.models.checked_source import unreadable
from shoal.models.checkpoint import read_json
from shoal.models.compat import registered
from shoal.models.kinds import AUTO

CONFIG = "AutoConfig"
_DYNAMIC = "transformers_modules."
"""What the modules begin with that transformers makes of a model's own code, once that was trusted."""


def runs_own_code(*parts: Any) -> bool:
    """Is the class of a model, config or tokenizer made of code that came with it, and so was trusted?"""
    return any(type(part).__module__.startswith(_DYNAMIC) for part in parts)


@contextmanager
def own_code_known(source: str, folder: Path | None, raw: dict[str, Any], *, trust: bool) -> Iterator[None]:
    """Until the end of the block the Auto classes know the classes that `auto_map` of the config `raw` names; nothing
    happens without `trust` or for a hub id.

    Raises what `unreadable` makes of what the code raises.
    """
    found = raw.get("auto_map")
    references = {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
    if not trust or folder is None or CONFIG not in references:
        yield
        return
    try:
        kinds = {
            name: get_class_from_dynamic_module(references[name], str(folder))
            for name in (CONFIG, *AUTO)
            if name in references
        }
    except Exception as error:  # anyone's code
        raise unreadable(source, error) from None
    with registered(kinds.pop(CONFIG), kinds):
        yield


def importable() -> None:
    """Let this process find the copies of own code that transformers made when it was trusted, so that a model of such
    a class can be unpickled from a process of ours."""
    init_hf_modules()


def copy_own_code(source: Path, target: Path) -> list[str]:
    """Copy the code files that `auto_map` of the config and the tokenizer's config in `target` names, and what these
    import beside them, from the folder `source`; what is there stays. Returns the names.

    Only for code that was trusted: what is copied will be run. Nothing is copied through a symlink, except within the
    hub's own cache.
    """
    wanted: dict[str, None] = {}
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        for module in _modules(target / file):
            if (source / module).is_file():
                wanted |= dict.fromkeys([module, *(Path(f).name for f in get_relative_import_files(source / module))])
    names = [name for name in wanted if (source / name).is_file() and not (target / name).exists()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _modules(file: Path) -> Iterator[str]:
    """The files of this folder that an `auto_map` names, without those of another repository (OWNER/NAME--)."""
    found = read_json(file).get("auto_map") if file.is_file() else None
    references = found.values() if isinstance(found, dict) else []
    for reference in references:
        for one in reference if isinstance(reference, list | tuple) else [reference]:
            module = one.rpartition(".")[0] if isinstance(one, str) and "--" not in one else ""
            if module.isidentifier():
                yield f"{module}.py"
