"""What one layer in fewer bits costs: skipped, in 4 bits, in 8, or whole, by the policy `fractional`, layer by layer.

For each layer the mean divergence KL(whole || policy) in nats a token on windows of --test, where this
layer alone takes the choice. Nothing is trained. The last figure counts the layers in which the divergences stand in
the order of the bits: 0 = whole <= 8 bits <= 4 bits <= skipped.

Target: that order in every layer.

    python benchmarks/bits.py --test wikitext-2-raw-test.txt
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from _common import finish, opened, options, say

from shoal.api.assess import text_of
from shoal.deciding.policy_options import layer_list
from shoal.evaluation.agreement import compare_logits
from shoal.live import running
from shoal.models.calls import device_of
from shoal.plan import Plan

CHOICES = (16, 8, 4, 0)


@torch.no_grad()
def main() -> int:
    """Run each layer by each choice; the exit status says if the target is met."""
    args = _arguments()
    loaded = opened(args)
    model, device = loaded.model, device_of(loaded.model)
    text = text_of(loaded, args.test, split="test", length=args.length, limit=args.windows)
    ids = text.ids.to(device)
    whole = model(ids, use_cache=False).logits
    rows: list[dict[str, Any]] = []
    plan = Plan.identity(loaded.opened.spec)
    for layer in layer_list(args.layers) if args.layers else plan.layers():
        row: dict[str, Any] = {"layer": layer}
        for choice in CHOICES:
            with running(model, plan, policy=f"fractional:layers={layer},always={choice}"):
                row[str(choice)] = float(compare_logits(whole, model(ids, use_cache=False).logits)[0].mean())
        rows.append(row)
        say(str(row))
    pairs = {f"{more} <= {less}": (str(more), str(less)) for more, less in pairwise(CHOICES)}
    held = {name: sum(row[more] <= row[less] for row in rows) for name, (more, less) in pairs.items()}
    ordered = sum(all(row[more] <= row[less] for more, less in pairs.values()) for row in rows)
    means = {str(choice): sum(row[str(choice)] for row in rows) / len(rows) for choice in CHOICES}
    return finish(
        "bits", args, target={"layers out of order": 0}, value={"layers out of order": len(rows) - ordered},
        figures={"rows": rows, "mean": means, "layers": len(rows), "held": held}, device=device,
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--test", required=True, help="text to judge by")
    parser.add_argument("--layers", default="", help="these alone, as 3-5,7 (default: all)")
    parser.add_argument("--windows", type=int, default=2, help="of it (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
