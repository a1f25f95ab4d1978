"""What a correction changed against a kept set, which itself stays as it was written: the key, and why.

The golden test holds that these differ and that nothing else does.
"""

from __future__ import annotations

CORRECTED: dict[str, dict[str, dict[str, str]]] = {
    "set1": {
        "figures": {
            "method cqil": "no mlp sees a later attention",
            "method foldgpt": "layers that share matrices are ties with scales, in the places of their own",
            "method fusegpt": "influence is measured anew after every fusion",
            "method hsd": "the order of the policy by-position",
        },
        "hashes": {
            "llama 3@5,4-7": "a source may run later",
            "alternating 3@5,4-7": "a source may run later",
        },
        "plans": {
            "kv-source": "what a run reads of another layer it does not make, and params and FLOPs do not count it",
            "own-and-repeat": "what a run reads of another layer it does not make, and FLOPs do not count it",
            "own-tensors": "params counts no tensor of the base that new ones stand in for where nobody else reads it",
            "parts": "an attention and the mlp behind it are one layer of a stock checkpoint",
        },
        "policies": {
            "ffn-skip:cold_first=1,cold_last=0,threshold=0.5": "the cosine is that of the mlp's own input and output",
        },
    }
}
"""By set and file the keys that mean something else now, each with the reason that CHANGELOG.md gives."""
