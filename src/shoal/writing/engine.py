"""The proof of a folder under an engine: vLLM must write the tokens that transformers writes.

vLLM runs in a Python of its own, in which Shoal need not be: it asks for other versions of transformers. What it is
asked for and answers is JSON (`shoal_vllm.greedy`, in packages/shoal-vllm).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shoal.errors import ShoalError, UsageError, WriteError
from shoal.evaluation import Progress
from shoal.executing.weights import used_by
from shoal.models.checkpoint import read_json
from shoal.models.depth import permuted_config
from shoal.models.kinds import CAUSAL, loaded_by
from shoal.models.load import load
from shoal.models.opened import open_model
from shoal.plan import Shape, cost, shapes_of
from shoal.planned import handle_of
from shoal.writing.checks import Check
from shoal.writing.proof import Proof
from shoal.writing.reference import quiet

ENGINES = {"vllm": "shoal_vllm.greedy"}
"""The module that answers, by engine."""
LENGTHS = (9, 16, 23)
"""Of the prompts, in random tokens: none is another's multiple, so no batch is even."""
TOKENS = 24
LIMIT = 1e-3
"""By how much log-probabilities may differ in float32."""

Written = tuple[list[list[int]], list[torch.Tensor]]
"""(tokens, log-probabilities [tokens, vocabulary] in front of each) by prompt."""


def verify_engine(
    folder: str | Path, engine: str = "vllm", *, python: str | None = None, progress: Progress | None = None
) -> Proof:
    """Compare what `engine` writes from a folder with what transformers writes: 24 greedy tokens behind three random
    prompts, the log-probabilities in front of each, and for a planned checkpoint the parameters that were loaded and
    the rows of the KV cache. All in float32. `python`: the interpreter in whose environment the engine is (default:
    this one).

    Where the answers differ, a small random model of the same family is asked for as well, without a plan: if that is
    wrong too, the engine cannot compute the family, and `WriteError` W309 says so. Raises `UsageError` U730 for a
    python that does not start, U731 for one without the engine, U732 for another engine; `WriteError` W308 for a folder
    that the engine refuses; `ModelError` for what is no causal language model.
    """
    if engine not in ENGINES:
        raise UsageError(f"no engine is called {engine!r:.40}; choose {', '.join(ENGINES)}", code="U732")
    place = Path(folder)
    if progress is not None:
        progress(0, 1, "verify")
    with quiet():
        model = load(place, dtype="float32").model
    if loaded_by(model) != CAUSAL:
        raise UsageError(f"{engine} is asked for a causal language model, and {place} is none", code="U733")
    prompts = _prompts(model)
    right = _written(model, prompts)
    (answer,) = _asked(engine, python, [place], prompts, {"dtype": "float32"})
    if "error" in answer:
        raise WriteError(f"{engine} does not run {place}: {answer['error']}", code="W308")
    checks = (*_compared(answer, right, engine), *_counted(model, answer, place))
    if not all(check.passed for check in checks[:2]):
        _require_right_without_a_plan(model, engine, python)
    if progress is not None:
        progress(1, 1, "verify")
    passed = all(check.passed for check in checks)
    return Proof(passed, checks, {"engine": answer.get("engine", engine)}, against="what transformers computes")


def _prompts(model: PreTrainedModel) -> list[list[int]]:
    size = model.config.get_text_config(decoder=True).vocab_size
    made = torch.Generator().manual_seed(0)
    return [torch.randint(size // 8, size, (length,), generator=made).tolist() for length in LENGTHS]


def _written(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Written:
    tokens, scores = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with quiet(), torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=TOKENS,
                eos_token_id=-1, pad_token_id=0, repetition_penalty=1.0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        scores.append(torch.stack([torch.log_softmax(one[0].float(), -1) for one in out.logits]))
    return tokens, scores


def _asked(
    engine: str, python: str | None, folders: Sequence[Path], prompts: list[list[int]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the engine answers, folder by folder."""
    interpreter = python or sys.executable
    job = {"folders": [str(one.resolve()) for one in folders], "prompts": prompts, "tokens": TOKENS, "options": options}
    command = [interpreter, "-m", ENGINES[engine]]
    try:
        done = subprocess.run(  # noqa: S603 - the user names the Python that has the engine
            command, input=json.dumps(job), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UsageError(
            f"{interpreter} does not start ({error.strerror}); name a Python with --engine-python", code="U730"
        ) from None
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it says nothing")
        raise UsageError(
            f"{interpreter} does not run {engine} with its plugin ({last.strip():.160}); install packages/shoal-vllm "
            "beside vLLM and name that Python with --engine-python",
            code="U731",
        )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compared(answer: dict[str, Any], right: Written, engine: str) -> tuple[Check, Check]:
    tokens, scores = right
    same = sum(made == wanted for made, wanted in zip(answer["tokens"], tokens, strict=True))
    worst = 0.0
    for made, wanted, own, table in zip(answer["tokens"], tokens, answer["scores"], scores, strict=True):
        for step in range(TOKENS):
            if made[:step] != wanted[:step]:
                break
            worst = max([worst, *(abs(score - float(table[step][int(token)])) for token, score in own[step].items())])
    how = f"{TOKENS} greedy tokens behind random prompts of {', '.join(map(str, LENGTHS))} tokens, in float32"
    return (
        Check("tokens", same == len(tokens), f"{same} of {len(tokens)}", f"{len(tokens)} of {len(tokens)}", how),
        Check("scores", worst <= LIMIT, worst, LIMIT, f"largest difference of log-probabilities, {engine} beside it"),
    )


def _counted(model: PreTrainedModel, answer: dict[str, Any], folder: Path) -> list[Check]:
    """What the plan's cost says beside what the engine has loaded."""
    handle = handle_of(model)
    slots = read_json(folder / "config.json").get("slots")
    if handle is None or not slots or answer.get("parameters") is None:
        return []
    plan, weights = handle.plan, used_by(handle.plan, handle.bound.tensors)
    priced = cost(plan, open_model(model).spec, Shape(), shapes_of(weights))
    rows = sum(slot["part"] != "mlp" and "keys" not in slot for slot in slots["slots"])
    found, held = int(answer["parameters"]), int(answer["rows"])
    return [
        Check("parameters", found == priced.params, found, priced.params, "loaded by the engine, and the plan's cost"),
        Check("rows", held == rows, held, rows, "attentions with a row of the KV cache"),
    ]


def _require_right_without_a_plan(model: PreTrainedModel, engine: str, python: str | None) -> None:
    """Raise W309 where a small random model of the same family is not computed right either."""
    try:
        config = _small(model.config)
    except ShoalError:
        return
    with quiet(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _spread(plain)
        plain.save_pretrained(folder)
        prompts = _prompts(plain)
        right = _written(plain, prompts)
        options = {"dtype": "float32", "model_impl": "transformers"}
        (answer,) = _asked(engine, python, [Path(folder)], prompts, options)
    if "error" in answer:
        why = f"does not run it ({answer['error']})"
    else:
        tokens, scores = _compared(answer, right, engine)
        if tokens.passed and scores.passed:
            return
        why = f"writes {tokens.value} texts as transformers does, with log-probabilities {scores.value:.1g} apart"
    raise WriteError(
        f"{engine} computes {type(model).__name__} wrong without any plan: from a random model of 2 layers its "
        f"Transformers backend {why}; run the plan with Shoal",
        code="W309",
    )


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    return permuted_config(config, (0, 1) if config.get_text_config().num_hidden_layers > 1 else (0,))[0]


def _spread(model: nn.Module) -> None:
    """Numbers of which every layer makes something: matrices that keep lengths, and norms and biases off their rest."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
