"""What stands in for the names in documented commands, what is not run and why: the one table of the doc-test."""

from __future__ import annotations

import re

WORDS = {
    "METHOD": "shortgpt",
    "FORMAT": "mergekit",
    "NAME": "position",
    "FILE": "texts.txt",
}
"""Words of a command that stand for any of their kind. Models, plans and files need no entry: `place.py` lays tiny ones
under the very names into the folder where the commands run."""

COMPLETE = {
    "shoal generate --policy exit:confidence=0.9": "shoal generate MODEL Hello --policy exit:confidence=0.9,layers=3",
    "shoal bench --policy policy.json": "shoal bench smollm2 --policy policy.json",
    "shoal bench --policy": "shoal bench MODEL --policy skip:listed=3",
    "shoal compare --method ./mine.py": "shoal compare MODEL --output RESULTS --method ./mine.py -b layers=0.9",
    "shoal prune FOLDER --stream": "shoal prune FOLDER --stream --drop 2",
    "shoal prune --method NAME": "shoal prune MODEL --method NAME --drop 2",
    "shoal write --dry-run": "shoal write MODEL --plan 0-5,8-11 --output OUT --dry-run",
    "shoal prune --plan ... --dry-run": "shoal prune MODEL --plan 0-5,8-11 --dry-run",
    "shoal fit-exits --what adainfer": "shoal fit-exits MODEL --what adainfer --policy exit:layers=3,5",
    "shoal bench smollm2 --plan FOLDER --policy ... --new 48 --pairs 3": (
        "shoal bench smollm2 --plan PLAN --policy exit:confidence=0.9,layers=20 --new 48 --pairs 3"
    ),
}
"""Commands within sentences that leave away what the reader has: the whole command that such a sentence means."""

REFUSED = {
    "shoal doctor broken": "M335",
}
"""Commands that end with exit code 1 and this code, as the page says."""

_TWICE = "its verb and options are run for another page"
_FITTED = (
    "shoal fit-exits smollm2 --policy exit:layers=15,18,20,22,25,27,28 --data FILE --length 128 --limit 300 --batch 8"
)
SLOW = {
    "shoal compare smollm2 --output results -b params=0.9,0.8": "all methods twice: minutes",
    "shoal compare --method ./mine.py": "a comparison is run for another page",
    "shoal compare smollm2 --output results -m shortgpt -m position -b layers=0.9 --heal lora --tokens 12k": (
        "a comparison is run for another page"
    ),
    "shoal generate MODEL PROMPT --fast": "compiles",
    "shoal write pruned-folder --output pruned.gguf --outtype q8_0 --forward": "transformers reads a GGUF file",
    "shoal tune-draft smollm2 --max-new-tokens 48 --pairs 2 --also dynamic-exit": _TWICE,
    "shoal tune-draft MODEL --prompts prompts.txt": _TWICE,
    "shoal prune smollm2 --drop 6 --method METHOD": _TWICE,
    "shoal evaluate smollm2 --plan PLAN --limit 8": _TWICE,
    "shoal evaluate out --data test.txt --window 1024 --limit 24": _TWICE,
    "shoal fit-exits smollm2 --policy exit:layers=20,25,27,fill=defer --output lensed": _TWICE,
    "shoal calibrate smollm2 --plan lensed --target agreement=0.9 --output policy.json": _TWICE,
    "shoal bench smollm2 --plan lensed --policy policy.json": _TWICE,
    "shoal bench smollm2 --plan FOLDER --policy ... --new 48 --pairs 3": _TWICE,
    _FITTED: _TWICE,
    "shoal fit-exits smollm2 --policy exit:layers=15,20,23,25,27,fill=defer --data texts.txt --output lensed": _TWICE,
    "shoal calibrate smollm2 --plan lensed --policy exit:by=probe --target agreement=0.9 --output policy.json": _TWICE,
    'shoal generate smollm2 "Tell me about bees." --plan lensed --policy policy.json --trace': _TWICE,
    "shoal measure smollm2 -m depth-oracle:by=token,judge=choice --data valid.txt --limit 8 --length 64": _TWICE,
    "shoal measure smollm2 -m prompt-replaced:by=foreign --data valid.txt --limit 8 --length 64": _TWICE,
    "shoal tune-draft smollm2 --prompts prompts.txt": "seconds",
    "shoal evaluate out --data wiki.txt --window 1024": "seconds",
    "shoal bench out --against smollm2": "seconds",
    "shoal bench MODEL --plan PLAN --predict": "measures the memory: seconds",
    "shoal prune MODEL --method examples/thin_middle.py --drop 2 --set keep_first=1 --output OUT": "seconds",
    "shoal compare MODEL --output RESULTS -m shortgpt -m sleb -b params=0.9,0.8 --seed 0 --seed 1": "seconds",
    "shoal measure MODEL -m block-influence -m loss-removed --data a.txt --data b.txt": "seconds",
    "shoal measure MODEL -m task-removed -o file=items.jsonl": "seconds",
    "shoal prune BART --method position --stack decoder --drop 9 --output OUT": "24 layers are proved: seconds",
    "shoal write FOLDER --plan 0-11,14-29 --output OUT --stream": "seconds",
    "shoal prune --method NAME": _TWICE,
    'shoal generate MODEL "..." --speculate auto': "seconds",
    "shoal measure FOLDER --stream": "seconds",
    "shoal prune FOLDER --stream": "the same",
    "shoal serve smollm2 --plan 0-27,29": _TWICE,
    "shoal prune smollm2 --method rys:every=4 --data valid.txt --limit 4 --length 128": _TWICE,
    "shoal prune smollm2 --method rys:every=4,longest=5,first=4,last=24,file=items.jsonl,items=24": "seconds",
}
"""Run with -m slow, and why not always."""

NOT_RUN = {
    r"shoal push (?!.*--dry-run)": "sends to the Hub; tests/contract/test_push.py sends to a stand-in",
    r"make\b": "sets up an environment or runs all of the tests",
    r"pip install\b": "installs packages",
    r"torchrun\b": "starts processes; tests/contract/test_spread_healing.py runs one",
    r"shoal prune .*--ray\b": "starts a Ray cluster, or needs one; tests/contract/test_distributed.py",
    r"shoal prune .*--track\b": "needs the package of a tracker; tests/contract/test_tracking.py has its own",
    r"shoal prune .*--method auto .*--heal\b": "trains for a quarter of an hour; test_heal prunes and heals",
    r"shoal compare .*--heal logit-kd\b": "heals twelve plans; test_heal compares with a tiny model",
    r"shoal heal .*--recipe (skip-layer|layer-skip|ebert|fractional)\b": (
        "learns for a while; test_heal trains gates and writes them"
    ),
    r"shoal generate .*--plan (routed|wide)\b|shoal (generate|measure|tune-draft) early\b": (
        "uses what learned: test_heal"
    ),
    r"(PYTHONPATH=tests )?(\.venv/bin/)?python -m (pytest|tests)\b": "is the test suite itself",
    r"shoal verify .*--engine\b": "needs vLLM; tests/contract/test_verify_engine.py, and make test-vllm",
    r"python -m shoal\.lm_eval\b": "needs the package lm-eval; tests/contract/test_lm_eval.py runs it",
    r"python -m benchmarks\.|python benchmarks/": "takes minutes; tests/contract/test_benchmarks.py tries them",
}
"""By the beginning of the command, why it is not run."""

BLOCKS = {
    "from diffusers import DiTPipeline": "loads a diffusion model; test_reuse_diffusers runs a tiny one",
    "from openai import OpenAI": "needs the package openai; tests/contract/test_serve_openai.py asks the same",
    "from shoal.decoding.fast import FastDecoder": "compiles: run with -m slow",
    "import shoal\n\nloaded = shoal.load": "searches greedily among thirty layers: run with -m slow",
}
"""Blocks of Python, by what they begin with, that are not run or only with -m slow."""

PUT = {"loaded.model.generate(...)": "loaded.model.generate(**inputs, max_new_tokens=2)"}
"""What a block of Python leaves open."""


LESS: dict[str, dict[str, int]] = {
    "shoal.decoding.decoder.Decoder.generate": {"max_new_tokens": 4},
    "shoal.speculating.speculator.Speculator.generate": {"max_new_tokens": 8},
    "shoal.api.assess.speed": {"prompt": 8, "new": 2, "pairs": 1},
    "shoal.api.harness.speed": {"prompt": 8, "new": 2, "pairs": 1},
    "shoal.api.bench_policy.bench_policy": {"new": 2, "pairs": 1},
    "shoal.api.calibrate.calibrate": {"length": 12, "prompt": 2},
    "shoal.api.fit_exits.fit_exits": {"length": 32, "limit": 8},
    "shoal.api.measuring.measure": {"length": 64, "limit": 2},
    "shoal.api.heal.heal": {"tokens": 64, "length": 16, "held": 2, "minutes": 0.01},
    "shoal.heal": {"tokens": 64, "length": 16, "held": 2},
    "shoal.api.prune_and_heal.heal": {"tokens": 64, "length": 16, "held": 2},
    "shoal.api.prune.prune": {"length": 64, "limit": 2},
    "shoal.prune": {"length": 16, "limit": 1},
    "shoal.api.assess.evaluate": {"window": 128, "limit": 2, "task_items": 2},
    "shoal.api.study.Protocol": {"length": 64, "limit": 2, "window": 64, "windows": 2, "new_tokens": 2, "pairs": 1},
    "shoal.api.speculate.tune_draft": {"new": 8, "finalists": 1, "pairs": 1},
}
"""Functions that are given no more than these, whatever a command says or a default is: thirty layers, however small,
take their time for each token."""


def why_not(command: str) -> str | None:
    """Why a command is not run; None when it is."""
    return next((reason for start, reason in NOT_RUN.items() if re.match(start, command)), None)
