"""Shoal makes Transformers shallower. Names are loaded when they are used; importing shoal costs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shoal._moved import install
from shoal._version import __version__

if TYPE_CHECKING:
    from shoal.api.assess import bench, evaluate
    from shoal.api.generate import generate
    from shoal.api.heal import heal
    from shoal.api.inspection import inspect, ls, show
    from shoal.api.measuring import measure
    from shoal.api.prune import prune
    from shoal.api.push import push
    from shoal.data import load_data
    from shoal.errors import ShoalError
    from shoal.live import apply, running
    from shoal.models.load import load
    from shoal.plan import Plan, Spec, check, cost, diff, load_plan, parse_plan, save_plan
    from shoal.writing.folder import verify, write
    from shoal.writing.surgery import rewrite

_HOMES = {
    "Plan": "shoal.plan",
    "ShoalError": "shoal.errors",
    "Spec": "shoal.plan",
    "apply": "shoal.live",
    "bench": "shoal.api.assess",
    "check": "shoal.plan",
    "cost": "shoal.plan",
    "diff": "shoal.plan",
    "evaluate": "shoal.api.assess",
    "generate": "shoal.api.generate",
    "heal": "shoal.api.heal",
    "inspect": "shoal.api.inspection",
    "load": "shoal.models.load",
    "load_data": "shoal.data",
    "load_plan": "shoal.plan",
    "ls": "shoal.api.inspection",
    "measure": "shoal.api.measuring",
    "parse_plan": "shoal.plan",
    "prune": "shoal.api.prune",
    "push": "shoal.api.push",
    "rewrite": "shoal.writing.surgery",
    "running": "shoal.live",
    "save_plan": "shoal.plan",
    "show": "shoal.api.inspection",
    "verify": "shoal.writing.folder",
    "write": "shoal.writing.folder",
}

__all__ = [
    "Plan",
    "ShoalError",
    "Spec",
    "__version__",
    "apply",
    "bench",
    "check",
    "cost",
    "diff",
    "evaluate",
    "generate",
    "heal",
    "inspect",
    "load",
    "load_data",
    "load_plan",
    "ls",
    "measure",
    "parse_plan",
    "prune",
    "push",
    "rewrite",
    "running",
    "save_plan",
    "show",
    "verify",
    "write",
]


install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
