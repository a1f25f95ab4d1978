"""Runs in Shoal's environment: `BASE OUTPUT WINDOWS RECIPE 3 13 14`. As many windows as the others train on, and two
that are held out. Prints one line of JSON."""

import json
import sys
import time

from safetensors.torch import load_file

import shoal
from shoal.data import Data
from shoal.data.info import DataInfo
from shoal.data.load import sha256_of


def data_of(windows):
    """Windows of ids as text that was read."""
    count, length = windows.shape
    info = DataInfo("windows", "calibrate", length, count, length, "none", count * length, sha256_of(windows))
    return Data(windows, None, info)


base, output, windows, recipe, *dropped = sys.argv[1:]
ids = load_file(windows)["ids"]
loaded = shoal.load(base, dtype="float32")
plan = shoal.Plan.identity(loaded.opened.spec, source=loaded.source)
kept = [layer for layer in plan.layers() if layer not in map(int, dropped)]
began, cpu = time.monotonic(), time.process_time()
text = data_of(load_file(windows)["more"])
healed = shoal.heal(
    loaded, ",".join(map(str, kept)), recipe, data=text, watch=data_of(ids[:1]), tokens=ids.numel(), held=2
)
said = {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "tokens": healed.tokens}
shoal.write(loaded, healed.plan, output, weights=healed.weights, prove=False)
print(json.dumps(said))
