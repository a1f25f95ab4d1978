"""MiniMax makes decay rates from position and depth, and keeps them as buffers that a checkpoint holds."""

from shoal.models.families import Family

FAMILY = Family(types=("minimax",), numbering=("num_hidden_layers",))
