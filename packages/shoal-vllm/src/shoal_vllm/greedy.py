"""Greedy tokens and log-probabilities of a folder under vLLM: what `shoal verify --engine vllm` asks for.

python -m shoal_vllm.greedy < JOB.json > ANSWER.json, with JOB {"folders": [FOLDER, ...], "prompts": [[ids, ...], ...],
"tokens": 24, "options": {...}}. The answer is a list with an entry for each folder, {"engine", "tokens", "scores",
"parameters", "rows"}, or {"error"} with the sentence that vLLM or the plugin gave.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment variables that are set where they are not: one process, few words, 1 GiB of KV cache on a CPU."""
BESIDE = 5
"""How many of the likeliest tokens' log-probabilities come with each token."""


def greedy(folder: str, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> dict[str, Any]:
    """`tokens` greedy tokens behind each prompt, and in front of each the log-probabilities of the likeliest and of
    itself, by token; `engine`, its version; `parameters`, how many the model loaded, and `rows`, how many attentions
    have a row of the KV cache. Options are `vllm.LLM`'s."""
    from vllm import LLM, SamplingParams, __version__

    longest = max(len(one) for one in prompts) + tokens
    given = {
        "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": longest, "max_num_seqs": len(prompts),
        "disable_log_stats": True,
    } | options  # fmt: skip
    llm = LLM(model=folder, **given)
    asked = SamplingParams(temperature=0, max_tokens=tokens, logprobs=BESIDE, detokenize=False, ignore_eos=True)
    try:
        outs = llm.generate([{"prompt_token_ids": list(one)} for one in prompts], asked, use_tqdm=False)
        made = [one.outputs[0] for one in outs]
        scores = [[{str(t): p.logprob for t, p in at.items()} for at in one.logprobs] for one in made]
        said = {"engine": f"vllm {__version__}", "tokens": [list(one.token_ids) for one in made], "scores": scores}
        return said | _held(llm)
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _held(llm: Any) -> dict[str, Any]:
    """What the one worker of this process holds; nothing where the workers are processes of their own."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
    runner = getattr(getattr(worker, "worker", None), "model_runner", None)
    if runner is None:
        return {}
    shared = getattr(runner, "shared_kv_cache_layers", {})
    rows = {name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names} - set(shared)
    return {"parameters": getattr(runner.model, "loaded_parameters", None), "rows": len(rows)}


def main() -> None:
    """Answer the job on standard input."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    job = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, in workers too, is no part of the answer
    found = []
    for folder in job["folders"]:
        try:
            found.append(greedy(folder, job["prompts"], job["tokens"], **job.get("options", {})))
        except Exception as error:  # whatever an engine raises is the answer
            found.append({"error": sentence(error)})
    json.dump(found, answer)
    answer.close()


def sentence(error: BaseException) -> str:
    """The first line of what was raised, without the frame that pydantic puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inner = [line.partition("Value error, ")[2] for line in lines if "Value error, " in line]
    text = inner[0] if inner else (lines[0] if lines else type(error).__name__)
    return text.partition(" [type=")[0]


if __name__ == "__main__":
    main()
