"""The types of the second survey, each with the Auto class of its usual checkpoints, and what single ones need."""

from __future__ import annotations

from typing import Any

MASKED, SEQ2SEQ, SPEECH = "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"
IMAGES, BASE = "AutoModelForImageClassification", "AutoModel"

TYPES: dict[str, str] = {
    **dict.fromkeys(
        (
            "albert", "bert", "camembert", "deberta-v2", "distilbert", "ernie", "esm", "layoutlm", "megatron-bert",
            "modernbert", "mpnet", "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer",
            "xlm-roberta",
        ),
        MASKED,
    ),
    "electra": "AutoModelForPreTraining",
    **dict.fromkeys(
        (
            "bart", "blenderbot", "m2m_100", "marian", "mbart", "mt5", "pegasus", "plbart", "prophetnet", "t5",
            "t5gemma", "umt5",
        ),
        SEQ2SEQ,
    ),
    "whisper": SPEECH,
    **dict.fromkeys(("beit", "dinov2", "dinov2_with_registers", "swin", "vit", "vit_msn"), IMAGES),
    **dict.fromkeys(
        ("clip", "clip_vision_model", "deit", "dinov3_vit", "ijepa", "siglip", "siglip_vision_model"),
        BASE,
    ),
}  # fmt: skip
"""By model type."""

DEEP_VISION: dict[str, Any] = {"vision_config": {"num_hidden_layers": 6}}

KIND_OVERRIDES: dict[str, dict[str, Any]] = {
    "clip": DEEP_VISION,
    "siglip": DEEP_VISION,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4},
    "swin": {"num_heads": [2, 4], "depths": [2, 4], "window_size": 7, "embed_dim": 16, "patch_size": 2},
    "t5": {"d_kv": 8},
    "mt5": {"d_kv": 8},
    "umt5": {"d_kv": 8},
    "t5gemma": {"encoder": {"num_hidden_layers": 6}},
    "whisper": {"max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 8},
}
"""By model type, where names alone do not make a sound small config."""
