"""ALBERT runs one shared group of layers again and again; which layer a run stands for is only a count."""

from shoal.models.families import Family

FAMILY = Family(
    types=("albert",),
    refused="its layers are one shared group that runs num_hidden_layers times, so no layer can be told from another; "
    "set num_hidden_layers in its config.json to run the group less often",
)
