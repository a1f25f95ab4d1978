"""Drafts of self-speculation in turn with plain decoding, on prompts cut out of a text: tokens a round, layers, time.

Every prompt is continued greedily by each draft of --draft, in turn; all of them draft at most --length tokens one
behind the other, every time (`confidence` ends none unless --stop is given). No target: whether a draft pays is a
property of the model, the text and the machine.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from _common import compared, finish, opened, options, paired, timed, times

from shoal.api.assess import text_of
from shoal.decoding.arguments import GREEDY
from shoal.speculating.speculator import Speculator

PLAIN = "plain"


def main() -> int:
    """Measure and print."""
    args = _arguments()
    loaded = opened(args)
    model, device = loaded.model, loaded.model.device
    ids = text_of(loaded, args.data, length=args.prompt, limit=args.prompts).ids.to(device)
    asked = GREEDY | {"max_new_tokens": args.new, "eos_token_id": None}
    tasks: list[dict[str, Any]] = [
        {"input_ids": one[None], "attention_mask": torch.ones_like(one[None])} for one in ids
    ]
    stop = "auto" if args.stop else None
    speculators = {text: Speculator(model, text, length=args.length, confidence=stop) for text in args.draft}

    def written(name: str) -> list[torch.Tensor]:
        generate = model.generate if name == PLAIN else speculators[name].generate
        return [generate(**task, **asked) for task in tasks]

    plain, figures = written(PLAIN), dict[str, Any]()
    for name, speculator in speculators.items():
        rounds = drafted = accepted = layers = different = close = 0
        for task, true in zip(tasks, plain, strict=True):
            different += not torch.equal(speculator.generate(**task, **asked), true)
            stats = speculator.stats
            rounds, drafted, accepted = rounds + stats.rounds, drafted + stats.drafted, accepted + stats.accepted
            layers += sum(sum(stats.layers[phase]) for phase in ("draft", "choose", "verify"))
            close += stats.close_calls
        new = len(tasks) * (args.new - 1)
        figures[name] = {
            "tokens_per_round": new / rounds, "accepted_per_round": accepted / rounds,
            "drafted_per_round": drafted / rounds, "layers_per_token": layers / new,
            "different_texts": different, "close_calls": close,
        }  # fmt: skip
    for speculator in speculators.values():
        speculator.count = False
    sides = {name: partial(timed, partial(written, name), device) for name in (PLAIN, *speculators)}
    samples = paired(sides, args.pairs, warmup=0, what="round")
    for name, own in figures.items():
        own["time_ratio_to_plain"] = compared(samples, name, PLAIN)
        own["time_ratio_to_the_first"] = compared(samples, name, args.draft[0])
    figures["seconds_per_token"] = times(samples, len(tasks) * args.new)
    return finish("drafts", args, target={}, value={}, figures=figures, device=device)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=3)
    parser.add_argument("--data", required=True, help="text that the prompts are cut out of")
    parser.add_argument("--draft", action="append", required=True, help="as --speculate takes it; again for more")
    parser.add_argument("--length", type=int, default=4, help="drafted tokens in line (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--new", type=int, default=48, help="tokens behind each (default: %(default)s)")
    parser.add_argument("--stop", action="store_true", help="end unsure drafts early, and rest hopeless ones")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
