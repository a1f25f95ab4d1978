"""The former home of what is now in `executing`, `recording`, `deciding`, `decoding` and `speculating`.

Old module names still import, with a note: user files may name `shoal.run.gates`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "executing": "conductor lent live prefix slots tail timing weights freeze",
    "recording": "attention layer_major observe states walk",
    "deciding": "arguments deciding deferred entries flow gated gates kv_rules layer_lists masks partly place "
    "policies policy_file readout signals trace",
    "decoding": "fast fast_layers fast_legal fast_loop fast_matvec listening streaming",
}
_MOVED = {name: f"shoal.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
_MOVED["speculate"] = "shoal.speculating"


class _Moved(MetaPathFinder, Loader):
    """Finds `shoal.run.NAME` where it is now."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        first, _, rest = name.removeprefix("shoal.run.").partition(".")
        if not name.startswith("shoal.run.") or first not in _MOVED:
            return None
        return ModuleSpec(name, self, origin=f"{_MOVED[first]}.{rest}".rstrip("."), is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        assert spec.origin is not None
        real = import_module(spec.origin)
        warnings.warn(f"{spec.name} is now {spec.origin}; import it from there", DeprecationWarning, stacklevel=2)
        found = ModuleType(spec.name)

        def attribute(name: str) -> Any:
            return getattr(real, name)

        found.__dict__["__getattr__"] = attribute
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


sys.meta_path.append(_Moved())
