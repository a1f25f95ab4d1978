"""Sound model folders with one random damage each: what Shoal takes must be what stock transformers makes of it.

`python -m tests.fuzz.folders --inputs 20000`. An input is a number: it names one of the `FOLDERS` below, a damage (a
key of a config, a tensor, a file, an entry of a list or an index, a number; `damages.py`) and a way to write the folder
without its layer 1 (loaded, or streamed from its files). Either Shoal refuses with a code, or the written folder
computes what the stock model of the damaged folder computes without that layer. What differs is proved as well, to say
so if the proof passes. A failure is printed with its number; `--only NUMBER` repeats it and keeps the damaged folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1", HF_DEACTIVATE_ASYNC_LOAD="1")

import torch
import transformers
from torch import nn

import shoal
from shoal.errors import NotationError, PlanError, ShoalError
from shoal.models.inspect import inspect
from shoal.models.load import inspect_source
from shoal.plan import Plan, parse_plan
from shoal.writing.proof_child import outputs
from shoal.writing.stream import stream
from tests.contract.families import tiny_of
from tests.forked_proofs import FORKED
from tests.survey.kinds import tiny_kind

from .damages import damage

LIMIT = 1e-4
PROVED = 50
"""Every so many inputs is proved although nothing differs."""
FOLDERS = {
    "llama": ("AutoModelForCausalLM", ("model.layers",)),
    "gpt2": ("AutoModelForCausalLM", ("transformer.h",)),
    "gemma3_text": ("AutoModelForCausalLM", ("model.layers",)),
    "qwen3_moe": ("AutoModelForCausalLM", ("model.layers",)),
    "deepseek_v3": ("AutoModelForCausalLM", ("model.layers",)),
    "jamba": ("AutoModelForCausalLM", ("model.layers",)),
    "bert": ("AutoModelForMaskedLM", ("bert.encoder.layer",)),
    "t5": ("AutoModelForSeq2SeqLM", ("encoder.block", "decoder.block")),
}
"""By model type, the Auto class of its folder and where its layers are."""


def sound(family: str, place: Path, sharded: bool) -> None:
    """A folder as transformers writes it, of four layers in each stack."""
    auto, paths = FOLDERS[family]
    if auto == "AutoModelForCausalLM":
        model = tiny_of(family, 4)
    else:
        model = tiny_kind(family)
        for path in paths:
            del model.get_submodule(path)[4:]  # type: ignore[operator]
        for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
            if hasattr(model.config, name):
                setattr(model.config, name, 4)
    model.save_pretrained(place, max_shard_size="40KB" if sharded else "5GB")


@dataclass
class Stock:
    """What stock transformers makes of a folder."""

    found: dict[str, torch.Tensor] | None
    why: str = ""
    """Why it makes nothing of it."""


@contextmanager
def without_layer(model: nn.Module, paths: tuple[str, ...]) -> Iterator[None]:
    """Meanwhile layer 1 of each stack hands on what it is given."""

    def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handles = [
        model.get_submodule(f"{path}.1").register_forward_hook(hook, with_kwargs=True)  # type: ignore[call-overload]
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def answers(model: Any) -> dict[str, torch.Tensor]:
    """Every floating tensor that the model returns for two rows of tokens."""
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :5]
    found = outputs(model.eval(), given)
    # the routers' loss counts the layer that is left out by a hook, since it runs all the same
    return {name: value for name, value in found.items() if "past" not in name and name != "aux_loss"}


def stock(family: str, place: Path, skip: bool) -> Stock:
    """The outputs of the stock model of `place`, without its layer 1 where `skip`."""
    auto, paths = FOLDERS[family]
    try:
        model, info = getattr(transformers, auto).from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return Stock(None, f"random: {sorted(map(str, [*info['missing_keys'], *info['mismatched_keys']]))[:2]}")
        if not skip:
            return Stock(answers(model))
        with without_layer(model, paths):
            return Stock(answers(model))
    except Exception as error:  # whatever stops stock transformers is its own
        return Stock(None, f"{type(error).__name__}: {str(error)[:100]}")


def differs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """Where the two differ, or nothing."""
    for name, value in one.items():
        if name not in other or other[name].shape != value.shape:
            return f"{name} has another shape"
        if not torch.allclose(value, other[name], rtol=LIMIT, atol=LIMIT, equal_nan=True):
            return f"{name} is off by {(value - other[name]).abs().max():.1e}"
    return ""


def written(place: Path, out: Path, streamed: bool, prove: bool) -> None:
    """The folder without its layer 1, by one of the two ways. Raises `ShoalError`."""
    if streamed:
        try:
            stream(place, "0,2-3", out, forward=prove, overwrite=True)
        except (PlanError, NotationError):  # another number of layers: then whatever Shoal sees in the folder
            stream(place, _plan(inspect_source(place)), out, forward=prove, overwrite=True)
    else:
        loaded = shoal.load(place, device="cpu", dtype="float32")
        shoal.write(loaded, _plan(inspect(loaded.model)), out, prove=prove, overwrite=True)


def _plan(spec: Any) -> Plan:
    kept = "; ".join(
        f"{one.name}: " + ",".join(str(i) for i in range(len(one.layers)) if i != 1) for one in spec.stacks
    )
    return parse_plan(kept if len(spec.stacks) > 1 else kept.partition(": ")[2], Plan.identity(spec))


def judge(number: int, seed: int, scratch: Path, counts: Counter[str]) -> str | None:
    """What is wrong with one input, or None."""
    rng = random.Random(f"{seed} {number}")
    family = rng.choice(sorted(FOLDERS))
    source = scratch / f"{family}-{rng.choice(('whole', 'sharded'))}"
    if not source.is_dir():
        sound(family, source, source.name.endswith("sharded"))
    place, out = scratch / "damaged", scratch / "out"
    for old in (place, out):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, place)
    what = damage(place, rng)
    streamed, prove = rng.random() < 0.4, number % PROVED == 0
    said = f"{number} {source.name} {what} ({'streamed' if streamed else 'loaded'})"
    try:
        written(place, out, streamed, prove)
    except ShoalError as error:
        counts[error.code] += 1
        left = [path.name for path in scratch.iterdir() if path.name.startswith(("out", ".out"))]
        return f"{said}: {error.code} and left {left}" if left else None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/shoal/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{said}: {type(error).__name__} at {where}: {str(error)[:150]}"
    counts["written"] += 1
    return _compared(family, place, out, said, streamed)


def _compared(family: str, place: Path, out: Path, said: str, streamed: bool) -> str | None:
    expected, found = stock(family, place, skip=True), stock(family, out, skip=False)
    if expected.found is None:
        wrong = f"written, though stock transformers makes nothing of it ({expected.why})"
    elif found.found is None:
        wrong = f"written, and stock transformers makes nothing of what was written ({found.why})"
    elif different := differs(expected.found, found.found):
        wrong = f"written, and {different}"
    else:
        return None
    try:
        written(place, out, streamed, prove=True)
    except ShoalError as error:
        return f"{said}: {wrong}; its proof says {error.code}" if error.code not in ("W230", "W231") else None
    except Exception as error:
        return f"{said}: {wrong}; its proof raises {type(error).__name__}: {str(error)[:150]}"
    return f"{said}: PROVED, {wrong}"


def main() -> int:
    """Try the inputs; exit code 1 when one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no input later than that; the last line says how many ran")
    parser.add_argument("--only", type=int, help="one input; its folder is kept as ./damaged")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    subprocess.run = FORKED.run  # type: ignore[assignment]
    counts, failures, begun = Counter[str](), list[str](), time.monotonic()
    re._MAXCACHE = 10_000  # type: ignore[attr-defined]  # transformers compiles more expressions than are kept
    gc.disable()  # every model is a cycle, and looking through all of transformers for them takes half of the time
    numbers = range(args.first, args.first + args.inputs) if args.only is None else (args.only,)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # noqa: S108
        tempfile.tempdir = folder
        for done, number in enumerate(numbers, 1):
            tried = done
            wrong = judge(number, args.seed, Path(folder), counts)
            if wrong is not None:
                failures.append(wrong)
                sys.stdout.write(f"{wrong}\n")
            if done % 40 == 1:
                gc.collect()
                gc.freeze()
            if args.seconds is not None and time.monotonic() - begun > args.seconds:
                break
            if done % 200 == 0:
                left = (time.monotonic() - begun) / done * (len(numbers) - done)
                sys.stderr.write(f"{done} of {len(numbers)}, {len(failures)} wrong, {left:.0f} s left\n")
        if args.only is not None:
            shutil.copytree(Path(folder) / "damaged", "damaged", dirs_exist_ok=True)
    FORKED.close()
    found = {"first": numbers[0], "inputs": tried, "failures": len(failures), "counts": dict(counts.most_common())}
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
