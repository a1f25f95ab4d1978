"""What leaving out foretold neurons is worth: perplexity and the share of neurons that are computed, by rank and
threshold.

    python benchmarks/foretold.py --calibrate wiki.valid.txt --test wiki.test.txt

The share is that of one token at a time. Calibration and test text are files of plain text. Prints one JSON object.
"""

from __future__ import annotations

import json
from dataclasses import replace

from _common import opened, options, say

from shoal.data import load_data
from shoal.evaluation import perplexity
from shoal.record import environment
from shoal.reuse.foretell import fit_foretold
from shoal.reuse.foretold import leaving_out


def main() -> None:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--calibrate", required=True, help="a text file to fit on")
    parser.add_argument("--test", required=True, help="a text file to test on")
    parser.add_argument("--sequences", type=int, default=8, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="test windows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 576], help="(default: %(default)s)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[-2.0, -1.0, 0.0], help="(default: %(default)s)")
    args = parser.parse_args()
    loaded = opened(args)
    data, test = (
        load_data(file, loaded.tokenizer, length=args.length, limit=limit, split="whole")
        for file, limit in ((args.calibrate, args.sequences), (args.test, args.windows))
    )
    rows = [{"rank": None, "threshold": None, "kept": 1.0, "perplexity": perplexity(loaded.model, test).value}]
    say(str(rows[0]))
    for rank in args.ranks:
        fitted = fit_foretold(loaded.model, data, rank=rank)
        for threshold in args.thresholds:
            with leaving_out(loaded.model, replace(fitted, threshold=threshold)) as trace:
                found = perplexity(loaded.model, test).value
            rows.append({
                "rank": rank, "threshold": threshold, "kept": trace.kept / trace.total, "perplexity": found
            })  # fmt: skip
            say(str(rows[-1]))
    calibrate, tested = data.info.to_dict(), test.info.to_dict()
    print(json.dumps({"rows": rows, "calibrate": calibrate, "test": tested, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
