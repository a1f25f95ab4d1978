"""Runs in economize's environment: `BASE OUTPUT 1 4`, layers from 0 (its own count from 1).

Its `save_pretrained` writes the settings of its techniques and no model, so the pruned base model is saved.
"""

import sys

import economize
from economize.techniques.prune import DepthPruneConfig
from economize.unwrap import base_model_of
from transformers import AutoModelForCausalLM

base, output, *dropped = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
layers = tuple(int(layer) + 1 for layer in dropped)
pruned = economize.apply(model, DepthPruneConfig(num_blocks=len(layers), layers=layers))
base_model_of(pruned).save_pretrained(output)
