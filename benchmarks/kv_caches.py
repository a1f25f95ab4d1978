"""What caches that compress rows cost: values of KV held behind a prefix, and the perplexity of the text after it,
against a plain cache and against plans that drop as many attentions.

    python benchmarks/kv_caches.py --calibrate wiki.valid.txt --test wiki.test.txt

The first half of each window is put into the cache in one forward, the second half is scored in another. The attentions
to drop are those whose single removal costs least on the calibration text. Prints one JSON object.
"""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

from _common import opened, options, say

from shoal.compressing.cache import make_cache
from shoal.data import load_data
from shoal.evaluation import perplexity_behind_prefix
from shoal.live import running
from shoal.measures.loss_removed import loss_removed
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, drop
from shoal.record import environment

CACHES = (
    "minicache:start=16,keep=0",
    "minicache:start=16,keep=0.05",
    "minicache:start=16,keep=0.2",
    "minicache:start=16,keep=0.5",
    "minicache:start=16,keep=0.05,t=0.5",
    "minicache:start=16,keep=0.2,rule=similar",
    "minicache:start=16,gamma=0.05",
    "minicache:at=2,4,6,8,10,12,14,keep=0.05",
    "minicache:at=4,9,25,28,keep=0.05",
    "minicache:start=0,keep=0.05",
    "shared-basis:group=4,rank=32",
    "shared-basis:group=4,rank=64",
    "shared-basis:group=4,rank=96",
    "shared-basis:group=4,rank=128",
    "shared-basis:group=2,rank=96",
    "shared-basis:group=4,start=14,rank=64",
    "anchors:every=2",
    "anchors:every=4",
    "anchors:every=4,first=1",
    "anchors:every=8,first=1",
    "anchors:every=256,first=1",
)
"""For the 30 layers of the default model. The last one holds two tokens, and says what the prefix is worth at all."""


def main() -> None:
    args = _arguments()
    loaded = opened(args)
    test = load_data(args.test, loaded.tokenizer, length=args.window, limit=args.windows, split="whole")
    calibrate = load_data(args.calibrate, loaded.tokenizer, length=args.length, limit=args.sequences, split="whole")
    plain = _row(loaded, test, "plain")
    rows = [plain, *(_row(loaded, test, text, cache=text) for text in args.caches)]
    identity, cheapest = Plan.identity(inspect(loaded.model)), []
    if args.drops:
        removed = loss_removed(loaded.model, calibrate, part="attention")
        cheapest = sorted(range(len(removed.values)), key=lambda layer: removed.values[layer])
    for count in args.drops:
        plan = drop(identity, cheapest[:count], part="attention")
        rows.append(_row(loaded, test, f"attention dropped in {sorted(cheapest[:count])}", plan=plan))
    for row in rows:
        row["share"] = round(row["values"] / plain["values"], 3)
    result = {
        "model": loaded.source,
        "test": test.info.to_dict(),
        "calibrate": calibrate.info.to_dict(),
        "rows": rows,
        "environment": environment(),
    }
    print(json.dumps(result, indent=1))


def _row(loaded: Loaded, test: Any, name: str, *, cache: str | None = None, plan: Plan | None = None) -> dict[str, Any]:
    def make(mask: Any, ids: Any) -> Any:
        return make_cache(loaded.model, str(cache), mask, ids)

    with nullcontext() if plan is None else running(loaded.model, plan):
        found, held = perplexity_behind_prefix(loaded.model, test, None if cache is None else make)
    say(f"{name}: {held.values:,} values, perplexity {found.value:.2f}")
    return {"name": name, "values": held.values, "perplexity": found.value, "nll": found.nll, "error": found.error}


def _arguments() -> Namespace:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--calibrate", required=True, help="a text file to choose attentions on")
    parser.add_argument("--test", required=True, help="a text file to test on")
    parser.add_argument("--sequences", type=int, default=4, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in each (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="test windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--caches", nargs="*", default=CACHES, help="as shoal generate --kv-cache takes them")
    parser.add_argument("--drops", nargs="*", type=int, default=(4, 7, 10, 13, 15), help="attentions to drop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
