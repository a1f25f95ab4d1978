"""What a model is worth: perplexity, agreement with the dense model, what it writes, how fast and how large it is."""

from shoal.evaluate.agreement import Agreement, Comparison, compare, compare_between
from shoal.evaluate.generation import PROMPTS, Generation, GenerationCheck, generation_check
from shoal.evaluate.memory import Memory, memory
from shoal.evaluate.perplexity import Perplexity, perplexity
from shoal.evaluate.scoring import Progress, sequence_nll
from shoal.evaluate.speed import Speed, VariantSpeed, speed
from shoal.evaluate.stats import Spread

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
