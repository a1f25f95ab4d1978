"""Drive every reader with many inputs, by hypothesis and by atheris: `python -m tests.fuzz.run --inputs 100000`.

Half of the inputs come from hypothesis, half from atheris, which follows the code that an input reaches; without
atheris (`pip install atheris`, Linux) hypothesis makes them all, and the report says so. An input may raise a
`ShoalError` and nothing else, within `--seconds`, in `--megabytes`. A failure is kept as a file; exit code 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")


class Slow(BaseException):
    """An input took too long; no reader may swallow this."""


class Watch:
    """Runs inputs, counts them, and keeps those that fail."""

    def __init__(self, name: str, read: Callable[[bytes], object], place: Path, seconds: float) -> None:
        self.name, self._read, self._place, self._seconds = name, read, place, seconds
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.slowest = 0.0
        signal.signal(signal.SIGALRM, self._alarm)

    @staticmethod
    def _alarm(*_: Any) -> None:
        raise Slow

    def __call__(self, data: bytes) -> None:
        from shoal.errors import ShoalError

        self.counts["inputs"] += 1
        start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            self._read(data)
            self.counts["read"] += 1
        except ShoalError as error:
            self.counts[error.code] += 1
            if len(str(error).splitlines()) != 1:
                self._keep("a message of several lines", data)
        except Slow:
            self._keep(f"longer than {self._seconds} s", data)
        except (Exception, RecursionError) as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/shoal/" in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            self._keep(f"{type(error).__name__} at {where}: {str(error)[:120]}", data, where)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, time.perf_counter() - start)

    def _keep(self, what: str, data: bytes, where: str = "") -> None:
        key = f"{what.partition(' ')[0]} {where}"
        self.counts["failures"] += 1
        if key not in self.failures:
            self.failures[key] = what
            digest = hashlib.sha256(data).hexdigest()[:12]
            (self._place / f"{self.name.replace(':', '-')}-{digest}").write_bytes(data)

    def report(self, engine: str) -> dict[str, Any]:
        """Plain data."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return {
            "target": self.name, "by": engine, **self.counts, "slowest_s": round(self.slowest, 2), "peak_mib": peak,
            "kinds_of_failure": list(self.failures.values()),
        }  # fmt: skip


def by_hypothesis(watch: Watch, seeds: tuple[bytes, ...], count: int, seed: int) -> None:
    """`count` inputs near `seeds`."""
    import hypothesis

    from tests.fuzz.mutate import near

    # a run per 5000: hypothesis keeps what it has seen, and slows down with it
    for part in range(0, count, 5000):
        wanted = watch.counts["inputs"] + min(5000, count - part)

        @hypothesis.seed(seed + part)
        @hypothesis.settings(
            max_examples=min(5000, count - part), database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(near(seeds))
        def drive(data: bytes) -> None:
            watch(data)

        drive()
        while watch.counts["inputs"] < wanted:  # it stops early when it thinks that it has seen all
            watch(seeds[watch.counts["inputs"] % len(seeds)][: watch.counts["inputs"]])


def by_atheris(watch: Watch, seeds: tuple[bytes, ...], count: int, seed: int, done: Callable[[], None]) -> None:
    """`count` inputs that follow the branches of Shoal's own code; ends the process after `done`."""
    import atheris
    import hypothesis

    from tests.fuzz.mutate import near

    with tempfile.TemporaryDirectory(prefix="shoal-corpus-") as folder:
        for number, data in enumerate(seeds):
            (Path(folder) / f"seed{number}").write_bytes(b"\0" + data)
            (Path(folder) / f"choices{number}").write_bytes(b"\xff" + hashlib.shake_256(data).digest(400))

        @hypothesis.settings(database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(near(seeds))
        def drive(data: bytes) -> None:
            watch(data)

        def one(data: bytes) -> None:
            if data[:1] < b"\x80":
                watch(data[1:])  # the bytes themselves
            else:
                drive.hypothesis.fuzz_one_input(data[1:])  # what hypothesis makes of them: JSON that stays JSON
            if watch.counts["inputs"] >= count:
                done()
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)

        atheris.Setup([sys.argv[0], folder, f"-seed={seed + 1}", "-max_len=20000", "-rss_limit_mb=0"], one)
        atheris.Fuzz()


def engine(arguments: argparse.Namespace) -> int:
    """All targets by one engine, each in a forked process, so that its time and memory are its own."""
    if arguments.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["shoal"]):
            from tests.fuzz.targets import targets
    else:
        from tests.fuzz.targets import targets

    chosen = [target for target in targets().values() if target.name.startswith(arguments.only or "")]
    shares = sum(target.share for target in chosen)
    failed = 0
    for target in chosen:
        count = -(-arguments.inputs * target.share // shares)
        result = (arguments.keep / f"{target.name.replace(':', '-')}-{arguments.engine}.json").resolve()
        result.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            _fuzz(target, count, result, arguments)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        found = json.loads(result.read_text()) if result.is_file() else {"target": target.name, "died": status}
        _say(found)
        failed += found.get("failures", 0) + ("died" in found)
    return 1 if failed else 0


def _fuzz(target: Any, count: int, result: Path, arguments: argparse.Namespace) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.megabytes << 20, arguments.megabytes << 20))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libFuzzer talks a lot
    watch = Watch(target.name, target.run, result.parent, arguments.seconds)

    def done() -> None:
        result.write_text(json.dumps(watch.report(arguments.engine)))

    code = 1
    try:
        if arguments.engine == "atheris":
            by_atheris(watch, target.seeds, count, arguments.seed, done)
        else:
            by_hypothesis(watch, target.seeds, count, arguments.seed)
            done()
        code = 0
    finally:
        os._exit(code)


def main() -> int:
    """Run every engine that is there and print one line of JSON for each target, then the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="longest for one input")
    parser.add_argument("--megabytes", type=int, default=4096, help="most memory of a process")
    parser.add_argument("--only", help="targets whose name begins so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    parser.add_argument("--engine", help="hypothesis or atheris alone")
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    if arguments.engine:
        return engine(arguments)
    engines = ["hypothesis", "atheris"] if importlib.util.find_spec("atheris") else ["hypothesis"]
    if len(engines) == 1:
        sys.stderr.write("atheris is not installed, so hypothesis makes all inputs\n")
    codes, lines = [], []
    for name in engines:
        share = -(-arguments.inputs // len(engines))
        words = [sys.executable, "-m", "tests.fuzz.run", *sys.argv[1:], "--engine", name, "--inputs", str(share)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout or ():
                lines.append(json.loads(line))
                _say(lines[-1])
        codes.append(running.returncode)
    sums = {key: sum(line.get(key, 0) for line in lines) for key in ("inputs", "failures")}
    _say(sums | {"engines": engines, "died": sum("died" in line for line in lines)})
    return max(codes)


def _say(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
