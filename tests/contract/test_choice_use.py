"""What the term of exploration does to a policy that takes one of several."""

from __future__ import annotations

import torch

from shoal.deciding.learning import Learning
from shoal.healing.processes import Processes
from shoal.healing.windows import Windows, collated

from .healing import learner_of
from .planted import data_of
from .test_orders import HALF, two_orders, written


def test_exploration_makes_every_order_used() -> None:
    """On texts that all need the second order the other one is taken with a share that grows with the term."""
    ids = written(64, 11)
    data = Windows(data_of(ids[ids[:, 0] >= HALF]))
    batch = collated([data[row] for row in range(6)])
    first = {}
    for explore in (0.0, 3.0):
        terms = ["order-mixture:temperature=1,final_temperature=1", f"choice-use:weight={explore}"]
        with learner_of(
            two_orders(),
            *terms[: 2 if explore else 1],
            learn=("gates",),
            plan="0-3",
            policy="ordered:orders=1-2+2,1,relax=mixture",
        ) as learner:
            optimiser = torch.optim.Adam(learner.moving_tensors.values(), 0.02)
            taken: list[float] = []
            for step in range(60):
                learner.sides[0].learning = Learning(seed=step)
                optimiser.zero_grad()
                learner(**batch)["loss"].backward()
                optimiser.step()
                learner.averages.step(Processes())
                taken.append(float(learner.sides[0].learning.ledger["choices"][0].detach().mean()))
        first[explore] = sum(taken[-30:]) / 30
    assert first[0.0] < 0.05
    assert 0.2 < first[3.0] < 0.8
