"""Runs in optipfair's environment: `BASE OUTPUT WINDOWS distil 3 13 14`. Its own depth pruning and `distill_model` with
its defaults, but one epoch and a step for each batch of two windows, as the others have. All weights learn.
Prints one line of JSON."""

import copy
import json
import sys
import time

import torch
from optipfair.distillation import distill_model
from optipfair.pruning.depth import prune_model_depth
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

base, output, windows, _, *dropped = sys.argv[1:]
torch.manual_seed(0)
ids = load_file(windows)["ids"]
teacher = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
student = prune_model_depth(
    copy.deepcopy(teacher), layer_indices=[int(layer) for layer in dropped], show_progress=False
)
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
began, cpu = time.monotonic(), time.process_time()
made = distill_model(
    student, teacher, DataLoader(rows, batch_size=2), epochs=1, accumulation_steps=1, show_progress=False
)
said = {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "tokens": ids.numel()}
made.save_pretrained(output)
print(json.dumps(said))
