"""Two engines for live plans over one contract matrix: the executor that Shoal uses, and a bank of layers.

Run from the repository's root: `python -m benchmarks.engines`. Prints one JSON object: for each engine how many cells
of the matrix are right, refused, not possible, wrong or crashed, by kind of plan and by family; where the two differ;
what they do that the matrix does not ask; and what a layer costs in decode beyond the stock loop (a tiny llama, paired
rounds).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from statistics import median
from typing import Any

import torch
from benchmarks._common import Timed, paired, say, timed
from benchmarks.engine_bank import bank
from tests.contract.families import tiny
from tests.contract.matrix import Cell, Engine, Outcome, cells, run_cell
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from shoal.live import running
from shoal.record import environment

ENGINES: dict[str, Engine] = {"executor": running, "bank": bank}
IDS = torch.arange(3, 12).reshape(1, 9)
OVERHEAD = {"identity": "0-15", "first two swapped": "1,0,2-15"}
"""Plans that call 16 layers once, as the stock loop does: what they cost beyond it is the engine's own time."""


def main() -> int:
    """Run and print; the exit status is 0 when the executor has no wrong and no crashed cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300, help="rounds of the timing that count (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded in a round (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    outcomes = {}
    for name, engine in ENGINES.items():
        say(f"the matrix under {name}")
        # a bank keeps the cache of a model as deep as the plan; pages are kept for the base alone
        asked = [cell for cell in cells() if cell[3] != "paged"]
        outcomes[name] = {cell: run_cell(*cell, engine=engine) for cell in asked}
    beyond = {name: {what: _said(test, engine) for what, test in BEYOND.items()} for name, engine in ENGINES.items()}
    matrix = {name: summary(found) for name, found in outcomes.items()}
    result = {
        "matrix": matrix,
        "differ": differences(outcomes),
        "beyond_the_matrix": beyond,
        "overhead_us_per_layer": {plan: overhead(text, args.pairs, args.tokens) for plan, text in OVERHEAD.items()},
        "settings": vars(args),
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))
    states = matrix["executor"]["all"]
    return 1 if states.get("wrong") or states.get("crashed") else 0


def summary(outcomes: dict[Cell, Outcome]) -> dict[str, Any]:
    """Counts of states: in all, by kind and by family."""
    by_kind: dict[str, Counter[str]] = {}
    by_family: dict[str, Counter[str]] = {}
    for (family, kind, *_), outcome in outcomes.items():
        by_kind.setdefault(kind, Counter())[outcome.state] += 1
        by_family.setdefault(family, Counter())[outcome.state] += 1
    whole = Counter(outcome.state for outcome in outcomes.values())
    return {"all": whole, "by_kind": by_kind, "by_family": by_family}


def differences(outcomes: dict[str, dict[Cell, Outcome]]) -> list[dict[str, Any]]:
    """Entries (family, kind) in which some cell has another verdict, with each engine's verdicts and one reason."""
    first = next(iter(outcomes.values()))
    found = []
    for entry, same in groupby(sorted(first, key=lambda cell: cell[:2]), key=lambda cell: cell[:2]):
        here = list(same)
        states = {name: Counter(of[cell].state for cell in here) for name, of in outcomes.items()}
        if states["executor"] != states["bank"]:
            whys = {name: _reason([of[cell] for cell in here]) for name, of in outcomes.items()}
            found.append({"family": entry[0], "kind": entry[1], **states, "why": whys})
    return found


def _reason(outcomes: list[Outcome]) -> str:
    return next((outcome.why for outcome in outcomes if outcome.state not in ("right", "not possible")), "")


def overhead(plan: str, pairs: int, tokens: int) -> dict[str, dict[str, float]]:
    """Microseconds of CPU time for each call of a layer in decode beyond the stock loop of the same round."""
    model = _deep_llama()
    samples = paired(
        {
            "stock": lambda: _decode(model, tokens),
            **{name: _under(engine, model, plan, tokens) for name, engine in ENGINES.items()},
        },
        pairs,
        warmup=3,
        what=f"{plan}, round",
    )
    calls = tokens * 16
    cpu = {name: [sample[1] / calls * 1e6 for sample in own] for name, own in samples.items()}
    beyond = {
        name: _median([own - stock for own, stock in zip(cpu[name], cpu["stock"], strict=True)]) for name in ENGINES
    }
    beyond["bank less executor"] = _median([b - c for b, c in zip(cpu["bank"], cpu["executor"], strict=True)])
    return beyond | {"the stock loop itself": _median(cpu["stock"])}


def _median(values: list[float]) -> dict[str, float]:
    """The median, its 95 % interval from order statistics, and the quartiles of the values."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = (ordered[round(len(ordered) / 2 + shift)] for shift in (-half, half - 1))
    facts = {"median": median(ordered), "low": low, "high": high} | {
        f"q{100 * part // len(ordered)}": ordered[part] for part in (len(ordered) // 4, 3 * len(ordered) // 4)
    }
    return {name: round(value, 2) for name, value in facts.items()}


def _under(engine: Engine, model: PreTrainedModel, plan: str, tokens: int) -> Callable[[], Timed]:
    def run() -> Timed:
        with engine(model, plan):
            return _decode(model, tokens)

    return run


def _deep_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@torch.no_grad()
def _decode(model: PreTrainedModel, tokens: int) -> Timed:
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)
    one = IDS[:, :1]

    def steps() -> None:
        for _ in range(tokens):
            model(one, past_key_values=cache)

    return timed(steps, torch.device("cpu"))


def _said(test: Callable[[Engine], Any], engine: Engine) -> Any:
    try:
        return test(engine)
    except Exception as error:  # what falls over is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def _keeps(fact: Callable[[PreTrainedModel], Any]) -> Callable[[Engine], bool]:
    def test(engine: Engine) -> bool:
        model = tiny("llama")
        before = fact(model)
        with engine(model, "0-1,3"):
            return bool(fact(model) == before)

    return test


def _states(family: str, plan: str) -> Callable[[Engine], int]:
    @torch.no_grad()
    def test(engine: Engine) -> int:
        model = tiny(family, "eager")
        with engine(model, plan):
            return len(model(IDS, output_hidden_states=True).hidden_states)

    return test


@torch.no_grad()
def _early_cache(engine: Engine) -> bool:
    model = tiny("qwen2")
    cache = DynamicCache(config=model.config)
    with engine(model, "1-3"):
        whole = model(IDS, use_cache=False).logits
        parts = [model(piece, past_key_values=cache).logits for piece in (IDS[:, :8], IDS[:, 8:])]
    return torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@torch.no_grad()
def _sibling(engine: Engine) -> bool:
    """Another model built from the same config object still gives what it gave."""
    model = tiny("qwen2")
    before = model(IDS, use_cache=False).logits
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with engine(model, "1-3"):
        return torch.equal(twin(IDS, use_cache=False).logits, before)


@torch.no_grad()
def _compiles(engine: Engine) -> bool:
    model = copy.deepcopy(tiny("llama"))
    torch.compiler.reset()
    with engine(model, "0,1x2,3"):
        expected = model(IDS, use_cache=True).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        same = torch.allclose(compiled(IDS, use_cache=True).logits, expected, atol=1e-5)
    torch.compiler.reset()
    return same


BEYOND: dict[str, Callable[[Engine], Any]] = {
    "the names in the state dict stay, under 0-1,3": _keeps(lambda model: list(model.state_dict())),
    "the config stays, under 0-1,3": _keeps(lambda model: model.config.to_dict()),
    "config.num_hidden_layers is what runs, under 0-1,3": lambda engine: (
        not _keeps(lambda model: model.config.num_hidden_layers)(engine)
    ),
    "hidden states of llama under 0-1,3 (3 layers run)": _states("llama", "0-1,3"),
    "hidden states of bloom under 0-1,3 (3 layers run)": _states("bloom", "0-1,3"),
    "hidden states of bloom under 0,1x2,2-3 (5 layers run)": _states("bloom", "0,1x2,2-3"),
    "a KV cache made before the plan works (qwen2, 1-3)": _early_cache,
    "another model with the same config object is not disturbed": _sibling,
    "torch.compile with fullgraph (llama, 0,1x2,3)": _compiles,
}


if __name__ == "__main__":
    sys.exit(main())
