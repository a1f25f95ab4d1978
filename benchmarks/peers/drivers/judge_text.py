"""Perplexity of a written folder by plain transformers: `FOLDER TESTS`, where TESTS holds ids of windows by text."""

import json
import math
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, tests = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
found = {"layers": model.config.num_hidden_layers}
with torch.no_grad():
    for name, ids in load_file(tests).items():
        losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids]
        found[name] = round(math.exp(sum(losses) / len(losses)), 3)
print(json.dumps(found))
