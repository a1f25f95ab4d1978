"""Runs in an environment of transformers and peft alone, as their documentation shows it: take the layers out, put LoRA
on what is left, train.

`BASE OUTPUT WINDOWS OBJECTIVE 3 13 14`: WINDOWS is a safetensors file with `ids` [windows, tokens]; OBJECTIVE is
`labels` (cross-entropy) or `distil` (forward KL to a second copy of the base). Prints one line of JSON.
"""

import copy
import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

base, output, windows, objective, *dropped = sys.argv[1:]
torch.manual_seed(0)
ids = load_file(windows)["ids"]
teacher = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
student = copy.deepcopy(teacher)
kept = [layer for n, layer in enumerate(student.model.layers) if n not in map(int, dropped)]
for place, layer in enumerate(kept):
    layer.self_attn.layer_idx = place
student.model.layers = nn.ModuleList(kept)
student.config.num_hidden_layers = len(kept)
if getattr(student.config, "layer_types", None):
    student.config.layer_types = [t for n, t in enumerate(student.config.layer_types) if n not in map(int, dropped)]
matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules=matrices))
learning = [p for p in model.parameters() if p.requires_grad]
optimiser = torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
steps = len(ids) // 2
schedule = get_cosine_schedule_with_warmup(optimiser, min(6, steps // 4), steps)
began, cpu = time.monotonic(), time.process_time()
model.train()
for step in range(steps):
    batch = ids[2 * step : 2 * step + 2]
    out = model(input_ids=batch, labels=batch, use_cache=False)
    loss = out.loss
    if objective == "distil":
        with torch.no_grad():
            told = teacher(input_ids=batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        found = out.logits[:, :-1].log_softmax(-1)
        loss = nn.functional.kl_div(found, told, log_target=True, reduction="sum") / told[..., 0].numel()
    loss.backward()
    nn.utils.clip_grad_norm_(learning, 1.0)
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
said = {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "tokens": steps * 2 * ids.shape[1]}
model.merge_and_unload().save_pretrained(output)
print(json.dumps(said))
