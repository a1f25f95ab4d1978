"""What one writes without a tool: `BASE OUTPUT 1 4`, the layers deleted and counted again."""

import sys

from torch import nn
from transformers import AutoModelForCausalLM

base, output, *dropped = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
kept = [layer for i, layer in enumerate(model.model.layers) if str(i) not in dropped]
model.model.layers = nn.ModuleList(kept)
model.config.num_hidden_layers = len(kept)
model.save_pretrained(output)
