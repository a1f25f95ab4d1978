"""What other tools make of "drop these layers", beside Shoal, judged by plain transformers in a fresh process.

Builds an environment for each peer under --envs (kept: a second run uses it), makes the checkpoints in a temporary
folder, and writes docs/peers.md with --page. Target: Shoal is right, or refuses, on every checkpoint.

    python -m benchmarks.peers --envs peer-envs --page docs/peers.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.peers.checkpoints import DROPPED, FAMILIES, make
from benchmarks.peers.environments import PEERS, built, own
from benchmarks.peers.page import page
from benchmarks.peers.tools import TOOLS, Verdict, tried

from shoal.models.compat import hide_own_bars


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--envs", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--page", type=Path, help="write the findings as Markdown there")
    parser.add_argument("--jobs", type=int, default=2, help="tools that run at once (default: %(default)s)")
    args = parser.parse_args()
    hide_own_bars()
    here = own()
    where = {tool: built(args.envs.resolve(), tool) if tool in PEERS else here for tool in TOOLS}
    with tempfile.TemporaryDirectory(prefix="shoal-peers-") as name, ThreadPoolExecutor(args.jobs) as jobs:

        def attempt(family: str, tool: str) -> Verdict:
            base = Path(name) / family
            found = tried(tool, where[tool], base, base.with_name(f"{family} by {tool}"))
            print(f"{family}, {tool}: {found.kind} ({found.detail[:160]})", file=sys.stderr, flush=True)
            return found

        fields = {family: make(family, Path(name) / family) for family in FAMILIES}
        running = {family: {tool: jobs.submit(attempt, family, tool) for tool in TOOLS} for family in FAMILIES}
        verdicts = {family: {tool: job.result() for tool, job in row.items()} for family, row in running.items()}
    if args.page:
        args.page.write_text(page(verdicts, where, fields, platform.python_version()), encoding="utf-8")
    missed = [family for family, row in verdicts.items() if row["shoal"].kind not in ("right", "refused")]
    result = {
        "benchmark": "peers",
        "target": {"shoal": "right or refused"},
        "value": {family: row["shoal"].kind for family, row in verdicts.items()},
        "passed": not missed,
        "missed": missed,
        "figures": {
            family: {tool: dataclasses.asdict(found) for tool, found in row.items()} for family, row in verdicts.items()
        },
        "settings": {
            "dropped": DROPPED,
            "versions": {tool: place.versions or place.error for tool, place in where.items()},
        },
    }
    print(json.dumps(result, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
