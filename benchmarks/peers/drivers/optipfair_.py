"""Runs in optipfair's environment: `BASE OUTPUT 1 4`, layers from 0, as its README shows it."""

import sys

from optipfair.pruning.depth import prune_model_depth
from transformers import AutoModelForCausalLM

base, output, *dropped = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
pruned = prune_model_depth(model, layer_indices=[int(layer) for layer in dropped], show_progress=False)
pruned.save_pretrained(output)
