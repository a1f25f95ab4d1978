"""transformers' Trainer on a learner: the one file of healing that knows it. Checkpoints hold what learns, as
safetensors, beside the Trainer's own state."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shoal.deciding.learning import Learning
from shoal.healing.averages import Averages
from shoal.healing.learner import Learner
from shoal.healing.processes import Processes
from shoal.healing.stage import Settings

LEARNT, BEST, AVERAGES = "learnt.safetensors", "best.safetensors", "averages.json"
Tell = Callable[[dict[str, Any], int, int], None]
"""Called with what is known of a step, steps done and steps in all."""


class NotFiniteError(Exception):
    """The loss of a step was NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


class HealTrainer(Trainer):
    """Trains a `Learner`; looks at held-out text now and then and keeps what it likes best."""

    control: TrainerControl

    def __init__(
        self,
        learner: Learner,
        held_loss: Callable[[], float],
        settings: Settings,
        tell: Tell,
        processes: Processes,
        **options: Any,
    ):
        self.learner, self.held_loss, self.settings, self.tell = learner, held_loss, settings, tell
        self.processes = processes
        self.best: dict[str, torch.Tensor] | None = None
        """What held-out text likes best, when that is not the start."""
        self.best_loss, self.worse = math.inf, 0
        self._step, self._micro = 0, 0
        super().__init__(model=learner, **options)
        self.remove_callback(PrinterCallback)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._tell_step()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.processes.any(not bool(torch.isfinite(loss).all()))[0]:
            raise NotFiniteError(self.state.global_step + 1)
        return loss

    def _tell_step(self) -> None:
        """What fades, and a policy that learns, know how far the stage is; what is drawn is other in each step, in each
        of its micro-batches and in each process, and the same after a kill."""
        step = self.state.global_step
        if step != self._step:
            self._step, self._micro = step, 0
        progress = step / max(1, self.state.max_steps)
        if self.learner.fading is not None:
            self.learner.fading.progress = progress
        number = (step * self.args.gradient_accumulation_steps + self._micro) * self.processes.count
        seed = self.args.seed * 1_000_003 + number + self.processes.rank
        self.learner.sides[0].learning = Learning(progress, step, seed)
        self._micro += 1

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The objective on held-out text, which decides what is kept and when to stop."""
        loss = self.held_loss()
        self.log({"held_loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.worse = loss, 0
            self.best = self.learner.copies() if self.state.global_step else None
        else:
            self.worse += 1
            enough = self.worse >= self.settings.patience
            self.control.should_training_stop = self.control.should_training_stop or enough
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"held_loss": loss})
        return {"held_loss": loss}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and len(self.learner.parts) > 1:
            logs |= {f"loss {name}": float(value) for name, value in self.learner.parts.items()}
        super().log(logs, start_time)
        self.tell(self.state.log_history[-1], self.state.global_step, self.state.max_steps)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        place = Path(output_dir or str(self.args.output_dir))
        place.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.learner.copies().items()}, place / LEARNT)
        if self.best is not None:
            save_file({name: tensor.contiguous() for name, tensor in self.best.items()}, place / BEST)
        (place / AVERAGES).write_text(json.dumps(self.learner.averages.known), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint)
        self.learner.put(load_file(place / LEARNT))
        self.best = load_file(place / BEST) if (place / BEST).is_file() else None
        if (place / AVERAGES).is_file():  # earlier versions wrote none
            self.learner.averages.known = json.loads((place / AVERAGES).read_text(encoding="utf-8"))
        seen = TrainerState.load_from_json(str(place / "trainer_state.json")).log_history
        for loss in (entry["held_loss"] for entry in seen if "held_loss" in entry):
            self.worse = 0 if loss < self.best_loss else self.worse + 1
            self.best_loss = min(self.best_loss, loss)


class Pace(TrainerCallback):
    """Saves by the clock, and when the run is told to stop; evaluates at the very end."""

    def __init__(
        self,
        every: float | None,
        stop: Callable[[], bool],
        *,
        evaluates: bool,
        processes: Processes,
        averages: Averages,
    ) -> None:
        """`every`: seconds between two checkpoints (None: no checkpoint); `stop` is asked after each step."""
        self.averages = averages
        self.every, self.stop, self.evaluates, self.last = every, stop, evaluates, time.monotonic()
        self.processes = processes
        self.stopped = False
        """Whether any process was told to stop."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.averages.step(self.processes)
        control.should_evaluate |= bool(self.evaluates and state.global_step >= state.max_steps)
        due = self.every is not None and self.processes.first and time.monotonic() - self.last >= self.every
        self.stopped, due = self.processes.any(self.stop(), due)
        if self.stopped:
            control.should_save, control.should_training_stop = self.every is not None, True
        elif due:
            control.should_save, self.last = True, time.monotonic()
        return control


def arguments(
    folder: Path, settings: Settings, *, steps: int, batch: int, accumulate: int, seed: int, device: torch.device,
    fresh: bool, every: int,
) -> TrainingArguments:  # fmt: skip
    """What Trainer is told; `every`: steps from one evaluation to the next. One GPU a process: with several, torchrun
    starts a process for each."""
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=settings.rate,
        max_grad_norm=settings.clip,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        save_strategy="no",  # `Pace` says when
        save_total_limit=2,
        eval_strategy="steps" if settings.evaluations else "no",
        eval_steps=every,
        eval_on_start=fresh and bool(settings.evaluations),
        logging_strategy="steps",
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        report_to="none",  # `shoal.report.tracking` hears of each step by `Tell`
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
    )
    made._n_gpu = min(made.n_gpu, 1)
    return made


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage: Trainer writes its state last, and a kill may come before."""
    found = [one for one in folder.glob("checkpoint-*") if one.name.rpartition("-")[2].isdecimal() and _is_whole(one)]
    return max(found, key=lambda one: int(one.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
