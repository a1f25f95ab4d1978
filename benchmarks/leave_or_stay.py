"""Decisions of exits that learn from the last to the first, against thresholds searched for the same weighted sum.

Lenses are fitted once on the first four fifths of the sequences. Then, for each --tradeoff W, three ways to leave are
chosen on the same sequences for a small W (1 - agreement) + (1 - W) layers / whole: thresholds of the probability
behind the lens and of the fitted probe (`calibrate --tradeoff`, DyCE's search), and linear decisions (`fit-exits --what
leave-or-stay`, Bolukbasi's reduction). The last fifth says what each costs. Keys and values are those of the whole
model, as the fill defer leaves them. Looks through the head are free here, which favours the probability.

Target: decisions that learn cost no more than the better thresholds.

    python benchmarks/leave_or_stay.py --data wikitext-2-valid.txt --layers 15,18,20,22,25,27,28
"""

from __future__ import annotations

from typing import Any

from _common import finish, opened, options, say

from shoal.api.assess import text_of
from shoal.deciding.policy_text import make_policy
from shoal.evaluation.exit_search import losses, parse_target, replay
from shoal.evaluation.exit_tradeoff import trade_off
from shoal.evaluation.exits import Features, record_exits
from shoal.fitting.leave_or_stay import fit_leave_or_stay
from shoal.fitting.lens import fit_lenses
from shoal.fitting.probe import fit_probes
from shoal.models.calls import device_of
from shoal.plan import Plan


def main() -> int:
    """Fit, choose, judge, print; the exit status says if the target is met."""
    parser = options(__doc__, pairs=1)
    parser.add_argument("--data", required=True, help="text of which one part fits and another judges")
    parser.add_argument("--layers", default="15,18,20,22,25,27,28", help="exits behind these (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=250)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tradeoff", type=float, action="append", help="again for more (default: 0.5, 0.7, 0.8, 0.9)")
    args = parser.parse_args()
    loaded = opened(args)
    model, spec = loaded.model, loaded.opened.spec
    text = text_of(loaded, args.data, split="whole", length=args.length, limit=args.sequences)
    cut = len(text) - len(text) // 5
    fitted, judged = text.only(range(cut)), text.only(range(cut, len(text)))
    plan = make_policy(f"exit:confidence=1,layers={args.layers},head=lens", Plan.identity(spec), spec).plan
    say("lenses and probes")
    weights = fit_lenses(model, plan, None, fitted, batch=args.batch)
    weights |= fit_probes(model, plan, weights, fitted, batch=args.batch)
    chosen, held = (
        record_exits(model, plan, one, prompt=1, weights=weights, batch=args.batch) for one in (fitted, judged)
    )
    rows: list[dict[str, Any]] = []
    for tradeoff in args.tradeoff or (0.5, 0.7, 0.8, 0.9):
        say(f"tradeoff {tradeoff:g}")
        rows += [
            _row(f"thresholds of the {by}", tradeoff, held, by, trade_off(chosen, by, [tradeoff])[0])
            for by in ("probability", "probe")
        ]
        learned = weights | fit_leave_or_stay(model, plan, weights, fitted, tradeoff=tradeoff, batch=args.batch)
        decided = record_exits(model, plan, judged, prompt=1, weights=learned, batch=args.batch)
        rows.append(_row("leave or stay", tradeoff, decided, "probe", (0.5,) * len(decided.layers)))
        say(str(rows[-3:]))
    least = {w: min(row["cost"] for row in rows if row["tradeoff"] == w and row["by"] != "leave or stay") for w in
             {row["tradeoff"] for row in rows}}  # fmt: skip
    value = {
        f"{row['tradeoff']:g}": row["cost"] / least[row["tradeoff"]] for row in rows if row["by"] == "leave or stay"
    }
    return finish(
        "leave_or_stay", args, target=dict.fromkeys(value, 1.0), value=value, figures={"rows": rows},
        device=device_of(model),
    )  # fmt: skip


def _row(name: str, tradeoff: float, held: Features, by: str, thresholds: tuple[float, ...]) -> dict[str, Any]:
    """What leaving by these thresholds costs on held-out sequences."""
    found = replay(held, by, thresholds)
    agreement = 1 - float(losses(held, parse_target("agreement=0.5"), found.left).mean())
    price = tradeoff * (1 - agreement) + (1 - tradeoff) * found.layers / held.depths[-1]
    return {
        "by": name, "tradeoff": tradeoff, "agreement": round(agreement, 4), "layers": round(found.layers, 3),
        "cost": round(price, 5),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
