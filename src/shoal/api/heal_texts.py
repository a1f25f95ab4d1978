"""The windows that a stage of healing reads: the user's text, the built-in one, and what models write on."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shoal.api.assess import text_of
from shoal.atomic import replacing
from shoal.data import Data
from shoal.executing.weights import Tensors
from shoal.healing.answers import written_by
from shoal.healing.run_folder import RunFolder
from shoal.healing.stage import Stage
from shoal.healing.windows import Texts, concatenated, described
from shoal.live import running
from shoal.plan import Plan

if TYPE_CHECKING:
    from shoal.api.heal_stages import HealRun


def texts_of(
    run: HealRun, stage: Stage, texts: Texts, steps: int, number: int, kept: RunFolder, start: tuple[Plan, Tensors]
) -> tuple[Data, Data]:
    """What a stage trains on, of all its sources, and what is held out; `start` is what it begins with."""
    data = _trained_on(run, stage, texts, steps, number, kept, start)
    if not stage.own_terms or data.own is None:
        return data, texts.held
    share = sum(share for source, share in stage.data if source == "own") / sum(share for _, share in stage.data)
    count = len(texts.held) if share == 1 else min(len(texts.held), round(len(texts.held) * share / (1 - share)))
    some = described(texts.held, list(range(max(1, count))))
    own = _written(run, stage, some, f"held-{number}", kept, start)
    return data, concatenated([own] if share == 1 else [texts.held, own])


def _trained_on(
    run: HealRun, stage: Stage, texts: Texts, steps: int, number: int, kept: RunFolder, start: tuple[Plan, Tensors]
) -> Data:
    windows = max(1, math.ceil(steps * run.per_step / run.length))
    if stage.data == (("text", 1.0),):
        return texts.train
    total, parts = sum(share for _, share in stage.data), list[Data]()
    for source, share in stage.data:
        count = max(1, round(windows * share / total))
        if source == "builtin":
            parts.append(
                text_of(run.loaded, "builtin", split="calibrate", length=run.length, limit=count, seed=run.run.seed)
            )
            continue
        some = texts.train.only(range(min(count, len(texts.train))))
        if source == "text":
            parts.append(described(some, list(range(len(some)))))
        elif source == "answers":
            parts.append(_written(run, stage, some, f"answers-{number}", kept, None))
        else:
            # other beginnings in each round, as far as the text goes
            some = texts.train.only([(n + (number - 1) * count) % len(texts.train) for n in range(len(some))])
            parts.append(_written(run, stage, some, f"own-{number}", kept, start))
    return concatenated(parts)


def _written(
    run: HealRun, stage: Stage, some: Data, name: str, kept: RunFolder, writer: tuple[Plan, Tensors] | None
) -> Data:
    """What the whole model writes, or `writer`, of several processes the first one's; kept beside the checkpoints, as
    writing takes its time."""
    from safetensors.torch import load_file, save_file

    file = None if kept.place is None else kept.place / f"{name}.safetensors"
    who = "the whole model" if writer is None else "the plan"

    def tell(done: int, total: int) -> None:
        if run.progress is not None:
            run.progress(done, total, name)

    def made() -> Data:
        if file is not None and file.is_file():
            found = load_file(file)
            return described(Data(found["ids"], None, some.info, found["answers"]), list(range(len(found["ids"]))))
        run.say(f"{who} writes {len(some)} answers")
        with nullcontext() if writer is None else running(run.loaded.model, *writer):
            answers = written_by(run.loaded.model, some, temperature=stage.temperature, seed=run.run.seed, tell=tell)
        if file is not None and answers.answers is not None:
            with replacing(file) as draft:
                save_file({"ids": answers.ids, "answers": answers.answers}, draft)
        return answers

    found = run.run.processes.told(made)
    return found if writer is None else replace(found, own=torch.ones(len(found), dtype=torch.bool))
