"""Attentions learn to read the keys and values of another layer."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def kv_share(*, learn: str = "all:part=attention", rate: float = 3e-4) -> Recipe:
    """KL to the whole model while attentions learn, for plans in which layers read another layer's keys and values.

    For what `shoal fuse --with share-kv:...` and `--with share-maps:...` wrote: the projections that are left learn to
    make, and to read, what is shared.

    Source: uptraining of shared KV, as Brandon et al. 2024 (CLA, arXiv 2405.12981) and Wu and Tu 2024 (LCKV, arXiv
    2405.10637) train it, and of shared maps, as Rajabzadeh et al. 2024 (EchoAtt, arXiv 2409.14595).

    How we differ: a pretrained model is its own teacher, where most of these train from random numbers on labels.
    """
    return (Stage(terms=("logit-kd",), learn=(learn,), settings=Settings(rate=rate)),)
