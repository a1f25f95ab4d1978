"""The same cut healed by other tools on the same windows: perplexity on two texts, and seconds.

Each driver runs in an environment of its own under --envs: plain transformers and peft by hand (on labels, and with a
second copy of the model as teacher), optipfair's `distill_model`, and Shoal. What each writes is judged by plain
transformers in one fresh process. Tools run in turn, `--rounds` times; the seconds are medians.

    python -m benchmarks.peers.healing --envs peer-envs --train wikitext-2-valid.txt --test wikitext-2-raw-test.txt \\
        --second lambada_openai.jsonl --text-key context
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.environments import built, own
from safetensors.torch import save_file

from shoal.api.assess import text_of
from shoal.cli.heal import tokens_of
from shoal.data.spelled import keyed
from shoal.models.compat import hide_own_bars
from shoal.models.load import load

HERE = Path(__file__).parent
CUT = ("3", "13", "14", "17", "25", "26")
DRIVERS = {
    "transformers + peft, labels": ("peft", "heal_by_hand.py", "labels"),
    "transformers + peft, distillation": ("peft", "heal_by_hand.py", "distil"),
    "optipfair, distill_model": ("optipfair", "heal_optipfair.py", "distil"),
    "Shoal, lora": ("shoal", "heal_shoal.py", "lora"),
    "Shoal, logit-kd": ("shoal", "heal_shoal.py", "logit-kd"),
}


def main() -> int:
    """Heal with each tool and print one JSON object."""
    args = _arguments()
    hide_own_bars()
    places = {peer: built(args.envs.resolve(), peer) for peer in ("peft", "optipfair")} | {"shoal": own()}
    with tempfile.TemporaryDirectory(prefix="shoal-peers-") as name:
        folder = Path(name)
        loaded = load(args.model, device="cpu", dtype="float32")
        count = 2 * round(tokens_of(args.tokens) / args.length / 2)  # two windows a step: none is left over
        train = text_of(loaded, args.train, split="calibrate", length=args.length, limit=count + 2, seed=0)
        save_file({"ids": train.ids[:count].clone(), "more": train.ids}, folder / "windows")
        second = keyed(args.second, args.text_key, None)
        texts = {
            label: text_of(loaded, text, split="test", length=args.window, limit=args.windows).ids
            for label, text in (("first", args.test), ("second", second))
        }
        save_file({label: ids.contiguous() for label, ids in texts.items()}, folder / "tests")
        loaded.model.save_pretrained(folder / "base")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder / "base")
        rows = {tool: _row(tool, places, folder, args) for tool in DRIVERS}
    result = {
        "benchmark": "peers.healing",
        "figures": rows,
        "settings": {key: str(value) for key, value in vars(args).items()},
        "versions": {peer: place.versions for peer, place in places.items()},
    }
    print(json.dumps(result, indent=2))
    return 0


def _row(tool: str, places: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What one tool made of the cut, or why it made nothing."""
    peer, driver, how = DRIVERS[tool]
    place, output = places[peer], folder / tool.replace(" ", "-")
    if place.error:
        return {"error": place.error}
    said: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        command = [str(place.python), str(HERE / "drivers" / driver), str(folder / "base"), str(output),
                   str(folder / "windows"), how, *CUT]  # fmt: skip
        print(f"{tool} ...", file=sys.stderr, flush=True)
        done = _run(command, args)
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
        said.append(json.loads(done.stdout.strip().splitlines()[-1]))
    judged = _run([sys.executable, str(HERE / "drivers" / "judge_text.py"), str(output), str(folder / "tests")], args)
    if judged.returncode:
        return {"error": (judged.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    medians = {key: round(median(one[key] for one in said), 1) for key in ("seconds", "cpu", "tokens")}
    found = {**json.loads(judged.stdout.strip().splitlines()[-1]), **medians}
    print(f"{tool}: {found}", file=sys.stderr, flush=True)
    return found


def _run(command: list[str], args: argparse.Namespace) -> subprocess.CompletedProcess[str]:
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env)  # noqa: S603


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--model", default="smollm2", help="what shoal.load takes (default: %(default)s)")
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--test", required=True, help="text of the same kind to judge by")
    parser.add_argument("--second", required=True, help="text of another kind")
    parser.add_argument("--text-key", help="the key of the second text, where it is .jsonl")
    parser.add_argument("--tokens", default="12k", help="to train on (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training window (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a test window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="of each test text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="times that each tool trains (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
