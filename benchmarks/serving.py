"""Many clients at once of `shoal serve`: their requests in one forward, and one after the other.

A server of this process answers --clients clients over HTTP, each with a prompt of its own and --new tokens, first as
`--max-num-seqs 1` does, then with all requests in each forward, paired. Then --requests more go through the batching
server, a few tokens each; what the process holds is compared after the first hundred and after the last.

Targets: the same texts; at most a third of the wall time; less than 2 % more memory.

    python benchmarks/serving.py --plan "0-9,[10-11]x2,12-29" --dtype float32
"""

from __future__ import annotations

import gc
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import Timed, compared, finish, opened, options, paired, say, times

from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.serve.batched import batched
from shoal.serve.generating import Prepare, under_plan
from shoal.serve.limits import Limits
from shoal.serve.listen import bind, server, service, url

TARGETS = {"different_texts": 0, "time_ratio": 1 / 3, "memory_ratio": 1.02}
BEGUN = 100
"""Requests after which memory is looked at first."""


def main() -> int:
    """Ask both servers, print; the exit status says if the targets are met."""
    parser = options(__doc__, pairs=3)
    parser.add_argument("--plan", default="0-9,[10-11]x2,12-29", help="what runs (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new", type=int, default=48, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args()
    loaded = opened(args)
    bodies = [
        {"prompt": f"Story {n} begins at sea, where " * (1 + n % 4), "max_tokens": args.new, "temperature": 0}
        for n in range(args.clients)
    ]
    ways = {
        "one": under_plan(loaded, args.plan),
        "batched": batched(loaded, args.plan, at_once=args.clients, cached=args.clients * 1024),
    }
    texts: dict[str, list[str]] = {}

    def side(name: str) -> Timed:
        with _serving(loaded, ways[name]) as address:
            wall, cpu = time.perf_counter(), time.process_time()
            texts[name] = _asked(address, loaded.source, bodies, args.clients)
            return time.perf_counter() - wall, time.process_time() - cpu

    samples = paired({name: lambda name=name: side(name) for name in ways}, args.pairs)
    say(f"{args.requests} requests")
    with _serving(loaded, ways["batched"]) as address:
        short = [body | {"max_tokens": 3} for body in bodies]
        many = [short[n % len(short)] for n in range(args.requests)]
        _asked(address, loaded.source, many[:BEGUN], args.clients)
        before = _held()
        _asked(address, loaded.source, many[BEGUN:], args.clients)
        after = _held()
    ratio = compared(samples, "batched", "one")
    total = args.clients * args.new
    return finish(
        "serving", args, target=TARGETS,
        value={
            "different_texts": sum(a != b for a, b in zip(texts["one"], texts["batched"], strict=True)),
            "time_ratio": ratio["wall"]["median"], "memory_ratio": after / before,
        },
        figures={
            "seconds": times(samples), "ratio": ratio, "resident_bytes": [before, after],
            "tokens_per_second": {name: total / min(wall for wall, _ in own) for name, own in samples.items()},
        },
        device=device_of(loaded.model),
    )  # fmt: skip


@contextmanager
def _serving(loaded: Loaded, prepare: Prepare) -> Iterator[str]:
    """The address of a server that runs until the end of the block."""
    with service(loaded, prepare, limits=Limits(waiting=1024, timeout=3600)) as made, bind("127.0.0.1", 0) as sock:
        sock.listen(128)
        running = server(made.app)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield url(sock)
        finally:
            running.should_exit = True
            thread.join()


def _asked(address: str, model: str, bodies: list[dict[str, Any]], clients: int) -> list[str]:
    def one(body: dict[str, Any]) -> str:
        asked = urllib.request.Request(  # noqa: S310 - our own address
            f"{address}/v1/completions", json.dumps(body | {"model": model}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(asked) as answer:  # noqa: S310
            text: str = json.load(answer)["choices"][0]["text"]
            return text

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, bodies))


def _held() -> int:
    """Bytes that the process holds, none of them garbage of Python's."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(fields["VmRSS"].split()[0]) << 10


if __name__ == "__main__":
    raise SystemExit(main())
