"""Which plans a search may look at: legal ones, and for a checkpoint only those that a stock class can express."""

from __future__ import annotations

from functools import partial

from shoal.errors import PlanError, WriteError
from shoal.ledger import Ledger
from shoal.models.adapter import is_adapted
from shoal.models.load import Loaded
from shoal.models.stacks import unwrap
from shoal.plan import Plan, Spec, check
from shoal.scores import Legal
from shoal.writing.surgery import blueprint


def require_writable(loaded: Loaded, identity: Plan) -> None:
    """Raise `WriteError` when not even the whole model can be written, so that no search ends in "no layer may go"."""
    if unwrap(loaded.model) is not loaded.model or is_adapted(loaded.model):
        raise WriteError(
            "the model is wrapped by PEFT and cannot be written; merge the adapter first (model.merge_and_unload()), "
            "or allow plans that only run live",
            code="W211",
        )
    blueprint(loaded.model, identity)


def legal_plans(loaded: Loaded, spec: Spec, *, writable: bool, zero_parts: bool) -> Legal:
    """A function that says of a plan whether it may be looked at; each is asked about once."""
    known: Ledger[bool] = Ledger()  # searches ask again and again, and a blueprint takes longer than a short forward

    def legal(plan: Plan) -> bool:
        return known.once(str(plan), partial(_allowed, loaded, spec, plan, writable=writable, zero_parts=zero_parts))

    return legal


def _allowed(loaded: Loaded, spec: Spec, plan: Plan, *, writable: bool, zero_parts: bool) -> bool:
    if check(plan, spec):
        return False
    if not writable:
        return True
    try:
        blueprint(loaded.model, plan, zero_parts=zero_parts)
    except (WriteError, PlanError):
        return False
    return True
