"""Whether a written folder is the model that was asked for; knows nothing but torch and transformers.

    python judge.py BASE OUTPUT 1 4

loads OUTPUT as anybody would, in this fresh process, and compares its logits with those of BASE, whose layers 1 and 4
hand on what they are given. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

LENGTH = 20
"""Tokens: several times the sliding windows and attention chunks of the checkpoints."""


def main(base: str, output: str, *dropped: str) -> None:
    found: dict[str, Any] = {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(found))
        return
    found |= {kind: sorted(map(str, info.get(f"{kind}_keys", ()))) for kind in ("missing", "unexpected", "mismatched")}
    found["layers"] = model.config.num_hidden_layers
    dense = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(3, dense.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = once(dense, ids)
        for layer in dropped:
            dense.model.layers[int(layer)].register_forward_hook(handed_on, with_kwargs=True)
        wanted, steps = once(dense, ids), stepwise(dense, ids)
        found["effect"] = apart(whole, wanted)
        found["reference"] = apart(wanted, steps)
        for name, work, right in (("uncached", once, wanted), ("cached", stepwise, steps)):
            try:
                found[name] = apart(work(model, ids), right)
            except Exception as error:
                found["error"] = f"{name} forward: {type(error).__name__}: {error}"
    print(json.dumps(found))


def handed_on(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def once(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, t, vocab] of one pass without a cache."""
    logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def stepwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The same by a prefill of half the tokens and single steps."""
    half = ids.shape[1] // 2
    pieces, past = [], None
    for start, end in [(0, half), *((i, i + 1) for i in range(half, ids.shape[1]))]:
        out = model(ids[:, start:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
