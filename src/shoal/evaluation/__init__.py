"""What a model is worth: perplexity, agreement with the dense model, what it writes, how fast and how large it is."""

from shoal.evaluation.agreement import Agreement, Comparison, compare, compare_between
from shoal.evaluation.generation import PROMPTS, Generation, GenerationCheck, generation_check
from shoal.evaluation.memory import Memory, memory
from shoal.evaluation.perplexity import Perplexity, perplexity
from shoal.evaluation.scoring import Progress, sequence_nll
from shoal.evaluation.speed import Speed, VariantSpeed, speed
from shoal.evaluation.stats import Spread

__all__ = [
    "PROMPTS",
    "Agreement",
    "Comparison",
    "Generation",
    "GenerationCheck",
    "Memory",
    "Perplexity",
    "Progress",
    "Speed",
    "Spread",
    "VariantSpeed",
    "compare",
    "compare_between",
    "generation_check",
    "memory",
    "perplexity",
    "sequence_nll",
    "speed",
]
