"""Label probe: how often a linear classifier on the states of a layer is wrong about the user's labels."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.tasks import rows_of
from shoal.fitting.classifier import fit_classifier
from shoal.models.context import positions_of
from shoal.models.opened import open_model
from shoal.models.precision import in_float64
from shoal.recording.observe import observe
from shoal.scores import Traits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)
WHAT = "the label probe"
Batch = tuple[torch.Tensor, torch.Tensor | None]


def label_probe(
    model: Any,
    data: Data | None = None,
    *,
    file: str | None = None,
    limit: int = 400,
    pool: Literal["mean", "last"] = "mean",
    folds: int = 5,
    ridge: float = 0.01,
    classes: int = 8,
    tokenizer: Any = None,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of items that a linear classifier on the output of layer i, fitted on other items, gets wrong.

    e_i = E_n[ argmax_c (W_i z_i,n + b_i)_c != label_n ], z_i,n [hidden] the mean over the tokens of item n of what
    layer i makes, or its last one, standardised; W_i, b_i the softmax regression with a `ridge`, every label weighing
    the same, on the items of the other of `folds` parts. Items are the first `limit` lines {"text": ..., "label": ...}
    of a .jsonl `file` (of a text beyond the context the end is read); without one the tokens of `data`, each with the
    token in front of it as its label, of those labels the `classes` most frequent. The detail holds `labels`, each with
    its number of items, `majority`, the share that always saying the most frequent one gets wrong, and `macro_f1` by
    layer, the mean over labels of F1. A diagnostic: where the curve is lowest the label is easiest to read, so that a
    task head could stand there and the layers above could go for that task alone.

    Source: Akash et al. 2024 (doi 10.1007/978-3-031-57853-3_25), classifiers on each layer of BERT for a data set of
    chats (Gittercom); linear classifiers on the states of each layer are Alain and Bengio's (2016, arXiv 1610.01644).

    How we differ: only the title of the paper was at hand. The classifier is linear where theirs is an MLP, so that it
    reads what is there and computes nothing of its own; rare labels weigh more, where SMOTE makes up items between two
    others. Standard errors are over items, or over sequences, which stay in one part together. Cost: one pass, and
    `folds` small fits for each layer; memory: one state for each layer and item. Raises U696 for options that leave
    nothing to fit, U697 for a line that is no such item, D450 and D451 for a file that holds none, U532 for a missing
    tokenizer or no text at all.
    """
    if folds < 2 or not 0 <= ridge < math.inf or classes < 2:
        raise UsageError(
            f"folds={folds}, ridge={ridge:g}, classes={classes} leave nothing to fit or to judge; use folds of 2 or "
            "more, a ridge of 0 or more and 2 classes or more",
            code="U696",
        )
    if file is not None:
        given = _items(model, file, limit, tokenizer, folds, batch)
    elif data is not None:
        given = _tokens(data, classes, folds, batch)
    else:
        raise UsageError("label-probe has nothing to read; give a file of labelled items or text", code="U532")
    states = _states(model, given, pool if file is not None else None, stack, progress)
    sums, f1 = [], []
    for layer, x in enumerate(states):
        guess = torch.zeros_like(given.labels)
        for part in given.parts.unique():
            held = given.parts == part
            guess[held] = fit_classifier(x[~held], given.labels[~held], len(given.words), ridge)(x[held])
        wrong = in_float64(guess != given.labels)
        sums.append(torch.zeros(len(given.names), dtype=torch.float64).index_add(0, given.group, wrong).tolist())
        f1.append(_macro_f1(guess, given.labels, len(given.words)))
        if progress is not None:
            progress(len(given.names) + layer + 1, len(given.names) + len(states), WHAT)
    sizes = torch.bincount(given.labels, minlength=len(given.words)).tolist()
    counts = torch.bincount(given.group, minlength=len(given.names)).tolist()
    majority = 1 - max(sizes) / sum(sizes)
    best = min(range(len(sums)), key=lambda layer: math.fsum(sums[layer]))
    note = (
        f"{len(sizes)} labels; always the most frequent one is wrong for {majority:.3f}, the classifier behind layer "
        f"{best} for {math.fsum(sums[best]) / sum(counts):.3f}"
    )
    return mean_scores(
        "label-probe", "share of items", sums, counts, given.said, stack=open_model(model).stack(stack).name,
        notes=(note,), removal=False,
        detail={
            "labels": [[word, size] for word, size in zip(given.words, sizes, strict=True)], "majority": majority,
            "macro_f1": f1,
        },
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Given:
    """What is classified."""

    batches: Sequence[Batch]
    names: Sequence[int]
    """The groups: items, or sequences of which tokens are classified."""
    counted: list[torch.Tensor]
    """Of each batch which tokens are looked at, bool [batch, length]."""
    labels: torch.Tensor
    """int64, by what is classified, in the order of `counted`."""
    group: torch.Tensor
    """Which group each is of."""
    parts: torch.Tensor
    """In which part each is judged; a group stays together."""
    words: list[str]
    said: Any

    def __post_init__(self) -> None:
        groups = len(self.group.unique())
        if len(self.words) < 2 or groups < 2:
            raise UsageError(
                f"there are {len(self.words)} labels on {groups} items or sequences, and nothing to tell apart or to "
                "judge by; give two or more of each",
                code="U696",
            )


def _items(model: Any, file: str, limit: int, tokenizer: Any, folds: int, batch: int) -> _Given:
    """The items of a file, dealt out to the parts label by label."""
    _, rows, _ = rows_of(file, limit=limit)
    if tokenizer is None:
        raise UsageError(f"reading the items of {file} needs the model's tokenizer; pass tokenizer=", code="U532")
    pairs = []
    for row, where in rows:
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int):
            raise UsageError(
                f'{where} is no labelled item; write {{"text": "...", "label": "..."}} on each line', code="U697"
            )
        pairs.append((text, str(label)))
    longest = positions_of(model)
    ids = [list(tokenizer(text)["input_ids"])[-longest if longest else None :] or [0] for text, _ in pairs]
    words = sorted({label for _, label in pairs})
    batches, counted = [], []
    for start in range(0, len(ids), batch):
        own = [torch.tensor(row) for row in ids[start : start + batch]]
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in own], batch_first=True)
        batches.append((padded, real))
        counted.append(real.bool())
    labels = torch.tensor([words.index(label) for _, label in pairs])
    every = torch.arange(len(pairs))
    parts = torch.empty_like(labels)
    parts[labels.argsort(stable=True)] = every % folds
    said = f"{Path(file).name}, {len(pairs)} items"
    return _Given(batches, range(len(pairs)), counted, labels, every, parts, words, said)


def _tokens(data: Data, classes: int, folds: int, batch: int) -> _Given:
    """Every token behind another one, with that as its label; sequences go to the parts in turn."""
    real = torch.ones_like(data.ids) if data.mask is None else data.mask.cpu()
    before = torch.cat([torch.full_like(data.ids[:, :1], -1), data.ids[:, :-1]], 1)
    before[:, 1:][(real[:, 1:] * real[:, :-1]) == 0] = -1
    found = Counter(before[before >= 0].tolist()).most_common()
    chosen = sorted(found, key=lambda one: (-one[1], one[0]))[:classes]
    number = {label: place for place, (label, _) in enumerate(chosen)}
    keep = torch.tensor([[label in number for label in row] for row in before.tolist()])
    labels = torch.tensor([number[label] for label in before[keep].tolist()], dtype=torch.long)
    group = torch.arange(len(data))[:, None].expand_as(keep)[keep]
    parts = group.unique(return_inverse=True)[1] % folds
    words = [f"token {label}" for label, _ in chosen]
    counted = list(keep.split(batch))
    return _Given(list(data.batches(batch)), range(len(data)), counted, labels, group, parts, words, data)


def _states(
    model: Any, given: _Given, pool: str | None, stack: str | None, progress: Progress | None
) -> list[torch.Tensor]:
    """By layer the states that are classified, float64 [n, hidden]; `pool` None: of each token its own."""
    found: list[list[torch.Tensor]] = [[] for _ in range(open_model(model).stack(stack).depth)]
    done, rows, keep = 0, iter(given.counted), given.counted[0]

    def before(ids: torch.Tensor, _: torch.Tensor | None) -> None:
        nonlocal done, keep
        keep = next(rows)
        done += len(ids)
        if progress is not None:
            progress(done, len(given.names) + len(found), WHAT)

    def watch(layer: int, _: torch.Tensor, made: torch.Tensor) -> None:
        states = in_float64(made.cpu())
        if pool is None:
            found[layer].append(states[keep])
        elif pool == "mean":
            found[layer].append(torch.where(keep[..., None], states, 0.0).sum(1) / keep.sum(1)[:, None])
        else:
            found[layer].append(states[torch.arange(len(keep)), keep.sum(1) - 1])

    observe(model, given.batches, watch, before=before, stack=stack)
    return [torch.cat(own) for own in found]


def _macro_f1(guess: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    both = [(guess == c, labels == c) for c in range(classes)]
    return sum(2 * float((g & w).sum()) / float(g.sum() + w.sum()) for g, w in both) / classes
