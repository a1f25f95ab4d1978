"""Data: text from a file, a hub data set, a list or Python itself, cut into windows of token ids, and what it was."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shoal.data.info import DataInfo

if TYPE_CHECKING:
    from shoal.data.load import Data, load_data

__all__ = ["Data", "DataInfo", "load_data"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("shoal.data.load"), name)  # late, so that reading a record needs no torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
