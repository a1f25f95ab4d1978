"""xLSTM keeps its states in tensors of its own, and its loop stores what each layer returns in that layer's place."""

from shoal.models.families import Family

FAMILY = Family(
    types=("xlstm",),
    in_order="the loop stores each layer's state in the place it was called from",
    pinned="the loop stores the state that it returns",
    once="a layer's recurrent state has one place only",
)
