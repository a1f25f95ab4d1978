"""Which engines load the written model of a plan: rules as data, not runs, nothing is started.

Sources: vLLM 0.32 served plain pruned folders and nemotron-nas block_configs (CPU, 2026-11-21); its classes are those
of `vllm/model_executor/models/registry.py` at commit 0002bff0. llama.cpp's classes are those that its converter
registers (commit 7bca1fd9), with gguf 0.19. An engine learns: a class that is not named here may load with a newer
one, so that is said as "no rule" and not as a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a rule may ask of a plan and its model."""

    architecture: str
    """The class that loads the written folder, such as LlamaForCausalLM."""
    refused: str | None
    """Why no stock checkpoint can be written; None when one can."""
    uniform: bool
    """Do all layers of the written model have tensors of the same shapes?"""
    blocks_refused: str | None
    """Why nemotron-nas's block_configs cannot say the plan; None when they can."""


@dataclass(frozen=True)
class Rule:
    """One reason for which an engine does not load a folder, or for which nobody has a rule."""

    holds: Callable[[Target], bool]
    because: Callable[[Target], str]
    """Said where the rule does not hold."""
    known: bool = True
    """False: where it does not hold, no rule says what happens."""


@dataclass(frozen=True)
class Engine:
    """One that loads folders; it loads a target when all its rules hold."""

    name: str
    version: str
    """That the rules were taken from."""
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules of one engine say."""

    engine: str
    version: str
    loads: bool | None
    """None: no rule."""
    because: str | None

    def __str__(self) -> str:
        said = {True: "loads", False: "does not", None: "no rule"}[self.loads]
        return f"{said}, because {self.because}" if self.because else said


VLLM = frozenset([
    "Afmoe", "Apertus", "Arcee", "Arctic", "Bamba", "Bloom", "Cohere", "Cohere2", "Cwm", "Dbrx", "DeepseekV2",
    "DeepseekV3", "DeepseekV32", "Dots1", "Ernie4_5", "Ernie4_5_Moe", "Exaone", "Exaone4", "Falcon", "FalconMamba",
    "FalconH1", "FlexOlmo", "Gemma", "Gemma2", "Gemma3", "Gemma3n", "Glm", "Glm4", "Glm4Moe", "GptOss",
    "GPTBigCode", "GPTJ", "GPTNeoX", "Granite", "GraniteMoe", "GraniteMoeHybrid", "GraniteMoeShared",
    "HunYuanDenseV1", "HunYuanMoEV1", "Jais2", "Jamba", "Lfm2", "Lfm2Moe", "Llama", "Llama4", "LongcatFlash",
    "Mamba", "Mamba2", "MiniCPM3", "MiniMax", "MiniMaxM2", "Mistral", "Mixtral", "Mpt", "Nemotron", "NemotronH",
    "Olmo", "Olmo2", "Olmo3", "Olmoe", "OPT", "Persimmon", "Phi", "Phi3", "PhiMoE", "Qwen2", "Qwen2Moe", "Qwen3",
    "Qwen3Moe", "Qwen3Next", "SeedOss", "StableLm", "Starcoder2", "Zamba2",
])  # fmt: skip
"""Classes NAMEForCausalLM; GPT2LMHeadModel besides."""

LLAMA_CPP = frozenset([
    "Apertus", "Arcee", "Arctic", "Bloom", "Cohere", "Cohere2", "Dbrx", "DeepseekV2", "DeepseekV3", "Dots1",
    "Ernie4_5", "Ernie4_5_Moe", "Exaone", "Exaone4", "Falcon", "FalconH1", "FalconMamba", "Gemma", "Gemma2",
    "Gemma3", "Gemma3n", "Glm4", "Glm4Moe", "GptOss", "GPTBigCode", "GPTNeoX", "Granite", "GraniteMoe",
    "GraniteMoeHybrid", "GraniteMoeShared", "Jamba", "Lfm2", "Lfm2Moe", "Llama", "Mamba", "Mamba2", "MiniCPM3",
    "MiniMaxM2", "Mistral", "Mixtral", "Mpt", "Nemotron", "NemotronH", "Olmo", "Olmo2", "Olmo3", "Olmoe", "Phi",
    "Phi3", "PhiMoE", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3", "StableLm", "Starcoder2",
])  # fmt: skip
"""Classes NAMEForCausalLM; GPT2LMHeadModel besides."""

STOCK = Rule(lambda t: t.refused is None, lambda t: f"no stock folder can be written: {t.refused}")
"""The portable target is a plain folder of a stock class with fewer layers; every engine but nemotron-nas needs it."""


def _named(classes: frozenset[str], where: str) -> Rule:
    def holds(target: Target) -> bool:
        return target.architecture == "GPT2LMHeadModel" or target.architecture.removesuffix("ForCausalLM") in classes

    return Rule(holds, lambda t: f"{t.architecture} is not among the classes {where}", known=False)


ENGINES = (
    Engine("transformers", "the installed one, on the meta device", (STOCK,)),
    Engine("vLLM", "0.32", (STOCK, _named(VLLM, "of its registry; its Transformers backend may load it"))),
    Engine(
        "llama.cpp (GGUF)",
        "converter of commit 7bca1fd9, gguf 0.19",
        (
            STOCK,
            _named(LLAMA_CPP, "that its converter registers"),
            Rule(
                lambda t: t.uniform or not t.architecture.startswith(("Llama", "Mistral", "Qwen2ForC", "Qwen3ForC")),
                lambda _: "layers of different sizes need the deci architecture's arrays",
            ),
        ),
    ),
    Engine(
        "nemotron-nas block_configs",
        "vLLM 0.32, Llama-like models",
        (Rule(lambda t: t.blocks_refused is None, lambda t: f"{t.blocks_refused}"),),
    ),
)


def verdicts(target: Target) -> tuple[Verdict, ...]:
    """What every engine's rules say of `target`; the first rule that does not hold decides."""
    found = []
    for engine in ENGINES:
        broken = next((rule for rule in engine.rules if not rule.holds(target)), None)
        if broken is None:
            found.append(Verdict(engine.name, engine.version, True, None))
        else:
            loads = False if broken.known else None
            found.append(Verdict(engine.name, engine.version, loads, broken.because(target)))
    return tuple(found)
