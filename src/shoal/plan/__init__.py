"""The plan: which layers run, in which order, with whose weights and whose KV. Standard library only."""

from shoal.plan.check import Problem, check, require
from shoal.plan.cost import Cost, Shape, cost
from shoal.plan.diff import Change, diff
from shoal.plan.edit import drop, exit_at, gate, keep, parallel, reorder, repeat, replace, share_kv
from shoal.plan.file import is_plan_file, load_plan, plan_from_json, plan_to_json, save_plan, weights_hash
from shoal.plan.given import Given, given_plan, place_of
from shoal.plan.notation import format_steps, parse_steps
from shoal.plan.plan import Base, Plan, format_plan, parse_plan, strip
from shoal.plan.sources import KV
from shoal.plan.spec import KVSpec, LayerSpec, PartSpec, Spec, StackSpec
from shoal.plan.steps import Exit, Map, Parallel, Run, Step
from shoal.plan.tensors import shapes_of

__all__ = [
    "KV",
    "Base",
    "Change",
    "Cost",
    "Exit",
    "Given",
    "KVSpec",
    "LayerSpec",
    "Map",
    "Parallel",
    "PartSpec",
    "Plan",
    "Problem",
    "Run",
    "Shape",
    "Spec",
    "StackSpec",
    "Step",
    "check",
    "cost",
    "diff",
    "drop",
    "exit_at",
    "format_plan",
    "format_steps",
    "gate",
    "given_plan",
    "is_plan_file",
    "keep",
    "load_plan",
    "parallel",
    "parse_plan",
    "parse_steps",
    "place_of",
    "plan_from_json",
    "plan_to_json",
    "reorder",
    "repeat",
    "replace",
    "require",
    "save_plan",
    "shapes_of",
    "share_kv",
    "strip",
    "weights_hash",
]
