"""Distillation on what the plan itself writes."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.healing.stage import Recipe, Settings, Stage, labels_and_kd


def on_policy(
    *,
    rounds: int = 4,
    share: float = 0.5,
    temperature: float = 0.0,
    unlikelihood: float = 0.0,
    labels: float = 0.0,
    learn: str = "lora:rank=16",
    rate: float = 1e-3,
) -> Recipe:
    """In rounds the plan writes on behind beginnings of the text, and is distilled on that and on the text.

    So it is told what the whole model would do where its own mistakes have led it. `share` of the tokens are its own,
    drawn at `temperature` (0: the likeliest, as greedy decoding goes); each round begins with new ones, by what the
    rounds before made of it. `unlikelihood` is the weight of that term, which acts on what repeats; `labels` that of
    the cross-entropy, which takes the place of as much of the KL.

    Source: on-policy distillation, Agarwal et al. 2023 (GKD, arXiv 2306.13649); the optional term: Welleck et al. 2019
    (arXiv 1908.04319).

    How we differ: new text is written once a round, not for each step.
    """
    if rounds < 1 or not 0 < share <= 1:
        raise UsageError(
            f"on-policy: rounds={rounds} must be 1 or more and share={share:g} above 0 and at most 1; write rounds=4",
            code="U502",
        )
    terms = labels_and_kd(labels)
    if unlikelihood:
        terms = (*terms, f"unlikelihood:weight={unlikelihood}")
    data = (("own", share), *((("text", 1 - share),) if share < 1 else ()))
    return tuple(
        Stage(
            terms=terms, learn=(learn,), share=1 / rounds, data=data, temperature=temperature,
            settings=Settings(rate=rate),
        )
        for _ in range(rounds)
    )  # fmt: skip
