"""heal: train what a plan left, by a recipe, and judge the result on two texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shoal.api.assess import Source, _one_vocabulary, opened, opened_base, text_of
from shoal.api.heal_refusals import require_bare, require_told, stack_of
from shoal.api.heal_stages import HealRun, run_recipe
from shoal.api.judged import HELD, WATCHED, WATCHED_WINDOWS, Judged, judged
from shoal.data import Data
from shoal.deciding.gating import ungated
from shoal.errors import UsageError
from shoal.evaluation import Progress
from shoal.executing.weights import Tensors, plan_and_weights, shapes_in, used_by
from shoal.healing.processes import Processes
from shoal.healing.run_folder import RunFolder
from shoal.healing.stage import Fit, Recipe, Stage, selection_of, term_of
from shoal.healing.train import Run
from shoal.healing.windows import Texts, part
from shoal.models.kinds import is_causal, require_text, scores_text
from shoal.models.load import Loaded
from shoal.plan import Given, Plan, require, shapes_of
from shoal.record import plain
from shoal.report.tracking import require_trackers, tracking
from shoal.spelling import chosen


@dataclass(frozen=True)
class Healed:
    """What `heal` made. `texts` holds `held out` and `watched`; it is empty for a model without next-token scores."""

    loaded: Loaded
    start: Plan
    plan: Plan
    weights: Mapping[str, Any] = field(repr=False)
    """The tensors that `plan` names, in the dtypes of the base; those of gates in float32."""
    recipe: str
    stages: tuple[dict[str, Any], ...]
    """What each stage was told and did: steps, tokens, seconds, curve."""
    texts: dict[str, Judged]
    data: dict[str, Any]
    seconds: float
    """Of all stages, those of runs that were stopped among them; of killed ones what came before is not known."""
    stopped: bool = False
    """Whether it was told to stop; its checkpoints are kept then."""
    asked: dict[str, Any] = field(default_factory=dict)
    policy: str = ""
    """Who decides at the gates of `plan`, as `--policy` takes it; "" for nobody."""

    @property
    def tokens(self) -> int:
        """Tokens read in training steps."""
        return sum(stage.get("tokens", 0) for stage in self.stages)

    @property
    def better(self) -> bool:
        """Whether held-out text likes the result better than the start; True where nothing was trained. It is the
        objective that counts where a policy decides, since layers are left out that the start ran, and where what the
        plan says at its end is what it was, since something else is learnt then: exits of the whole model, masks."""
        changed = not ungated(self.start).is_identity()
        if not self.tokens and not any("transform" in stage for stage in self.stages):
            return True
        held = self.texts.get(HELD)
        if held is not None and not self.policy and changed and held.after.nll != held.before.nll:
            return held.after.nll < held.before.nll
        trained = [stage for stage in self.stages if "held_after" in stage]
        return not trained or trained[-1]["held_after"] < trained[-1]["held_before"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and the records."""
        return plain(
            {
                "start": str(self.start),
                "plan": str(self.plan),
                "hash": self.plan.hash,
                "policy": self.policy,
                "recipe": self.recipe,
                "asked": self.asked,
                "stages": list(self.stages),
                "tokens": self.tokens,
                "seconds": self.seconds,
                "data": self.data,
                "texts": {name: judged.to_dict() for name, judged in self.texts.items()},
                "weights": {name: list(tensor.shape) for name, tensor in self.weights.items()},
                "stopped": self.stopped,
            }
        )


def heal(
    source: Source,
    plan: Given,
    recipe: str = "logit-kd",
    *,
    weights: Tensors | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    settings: Mapping[str, Any] | None = None,
    terms: Sequence[str] = (),
    learn: Sequence[str] = (),
    teacher: Source | None = None,
    data: Any = "builtin",
    watch: Any = "builtin",
    length: int = 256,
    held: int = 8,
    batch: int = 2,
    accumulate: int = 1,
    seed: int = 0,
    stack: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    track: Sequence[str] = (),
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
    **options: Any,
) -> Healed:
    """Train what `plan` left of a model by `recipe` (`shoal ls recipes`; NAME or NAME:key=value,key=value) for so many
    `tokens`, or `minutes`, which are turned into tokens by timing three steps.

    Nothing of the model is changed and nothing written; what learned is in the result's `weights`, and `shoal.write`
    takes it with the result's `plan`. `terms` and `learn` in place of a recipe: one stage typed by hand, as
    `["logit-kd", "hidden-kd:weight=0.1"]` and `["near:width=1"]`. `settings`: options of the recipe. `teacher`: another
    model of the same vocabulary in place of the whole model itself. `data`: as `load_data` takes it; of conversations
    and of prompts with responses only what the assistant said counts. `held` windows of it are never trained on and say
    which tensors are kept; `watch` is a second text, only looked at. A step reads `batch` x `accumulate` windows of
    `length` tokens. `folder` keeps checkpoints (one each `save_every` seconds), and with `resume` a run goes on from
    there. `stop` is asked after each step. `track`: experiment trackers (`shoal.report.tracking`), told of every step.

    Started by `torchrun` or `accelerate launch`, the processes share the work (DDP): each reads its part of a step's
    windows, `batch` x `accumulate` of them, the first one writes to `folder`, and all have the result.

    Raises U641 for a plan that removes nothing, U679 for tied layers, U642 and U643 for a folder of another run,
    U644 for a model with adapters, U737 for one that is spread by a device map or left in files, U673 for an amount
    that is none, U674 where memory is too small, U675 where nothing learns, D494 where no token counts, U511 for a
    teacher of another vocabulary.
    """
    group = Processes.join(options.get("device"))
    if not group.first:
        say, progress = _silent, None
    named, stages = recipe_of(recipe, settings, terms, learn)
    amount, track = amount_of(tokens, minutes), require_trackers(track)
    loaded = opened_base(source, **options)
    require_bare(loaded)
    require_text(loaded.model, "healing")
    base = Plan.identity(loaded.opened.spec, source=loaded.source)
    start, own = plan_and_weights(plan, base, weights)
    own = used_by(start, own)
    require(start, loaded.opened.spec, shapes_of(own), shapes_in(loaded.opened.stacks))
    if ungated(start).is_identity() and not trains_whole(stages):
        raise UsageError(
            f"the plan {start} removes nothing, so there is nothing to heal; prune first (shoal prune --save-plan)",
            code="U641",
        )
    other = None if teacher is None else opened(teacher, **options)
    if other is not None:
        _one_vocabulary(loaded, other)
    name = stack_of(start, stack)
    require_told(stages, start, name, loaded.opened.spec)
    if isinstance(data, Data):
        length = data.info.length
    causal = is_causal(loaded.model)
    watched = None  # read before the work, which may take hours
    if scores_text(loaded.model):
        watched = text_of(loaded, watch, split="test", length=length, limit=WATCHED_WINDOWS)

    def texts(windows: int) -> Texts:
        text = text_of(loaded, data, split="calibrate", length=length, limit=windows + held, seed=seed)
        return part(text, held, causal=causal)

    run = HealRun(
        loaded=loaded,
        stack=name,
        stages=stages,
        teacher=None if other is None else other.opened,
        texts=texts,
        length=length,
        causal=causal,
        run=Run(
            batch=batch,
            accumulate=accumulate,
            seed=seed,
            save_every=save_every,
            stop=stop,
            processes=group,
        ),
        say=say,
        progress=progress,
    )
    kept = RunFolder(None if folder is None else Path(folder).expanduser(), group)
    facts = {
        "plan": str(start), "base": loaded.opened.spec.fingerprint, "recipe": [one.to_dict() for one in stages],
        "amount": amount, "data": str(data) if isinstance(data, str | Path) else "given", "length": length,
        "held": held, "batch": batch, "accumulate": accumulate, "seed": seed, "stack": name,
        "processes": group.count,
        "weights": {key: list(tensor.shape) for key, tensor in sorted(own.items())},
    }  # fmt: skip
    kept.begin(facts, resume=resume)
    with (
        torch.random.fork_rng(),  # training draws from torch's generator, which is the caller's
        kept.tidied(),
        tracking(track if group.first else (), "heal", {"model": loaded.source, "plan": str(start)}) as told,
    ):
        made = run_recipe(replace(run, run=replace(run.run, told=told)), start, own, amount, kept)
    found, stopped = dict[str, Judged](), made.stopped
    if watched is not None and not stopped:
        sides = {"dense": None, "before": (start, own, ""), "after": (made.plan, made.weights, made.policy)}
        asked = {HELD: made.held, WATCHED: watched}
        found = judged(loaded, asked, sides, kept, batch=batch, stop=stop, progress=progress)
        stopped = len(found) < 2
    return Healed(
        loaded, start, made.plan, made.weights, named, made.stages, found,
        {"train": made.train.info.to_dict(), "held": made.held.info.to_dict()},
        sum(stage["seconds"] for stage in made.stages), stopped,
        {**amount, "length": length, "batch": batch, "accumulate": accumulate, "seed": seed, "processes": group.count},
        made.policy,
    )  # fmt: skip


def recipe_of(
    text: str, settings: Mapping[str, Any] | None, terms: Sequence[str], learn: Sequence[str]
) -> tuple[str, Recipe]:
    """What to call it and its stages. Raises U501 and U502 for names and options, of terms and learners too."""
    if terms or learn:
        stages: Recipe = (Stage(terms=tuple(terms) or ("logit-kd",), learn=tuple(learn) or ("lora",)),)
        named = str(stages[0])
    else:
        entry, own = chosen("recipes", text, settings)
        stages, named = entry.load()(**own), text
    for stage in stages:
        if isinstance(stage, Fit):
            chosen("transforms", stage.transform)
            continue
        for one in (*stage.terms, *stage.own_terms):
            term_of(one)
        for one in stage.learn:
            selection_of(one)
        if stage.policy:
            chosen("policies", stage.policy)
    return named, stages


def trains_whole(stages: Recipe) -> bool:
    """Whether there is something to learn for a plan that removes nothing: gates, exits, or any order."""
    trained = [stage for stage in stages if isinstance(stage, Stage)]
    terms = [term_of(text) for stage in trained for text in stage.terms]
    return any(stage.policy or stage.shuffle for stage in trained) or any(
        getattr(import_module(term.entry.module), "TRAINS_WHOLE", False) for term in terms
    )


def amount_of(tokens: int | None, minutes: float | None) -> dict[str, Any]:
    """The one of the two that is given, by its name. Raises U673 for both, none, or what is no amount."""
    if (tokens is None) == (minutes is None):
        raise UsageError("say how long to train: --tokens 200k or --minutes 10, one of them", code="U673")
    if (tokens is not None and tokens < 0) or (minutes is not None and not 0 < minutes < math.inf):
        raise UsageError(
            f"{tokens if minutes is None else minutes} {'tokens' if minutes is None else 'minutes'} are no amount of "
            "training; write --tokens 200k or --minutes 10",
            code="U673",
        )
    return {"tokens": tokens} if minutes is None else {"minutes": minutes}


def _silent(_: str) -> None:
    """The first process speaks."""
