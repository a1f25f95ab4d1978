"""What a model is worth: perplexity, agreement with the dense model, what it writes, how fast and how large it is."""

from shoal.evaluation.agreement import Agreement, Comparison, compare, compare_between
from shoal.evaluation.generation import PROMPTS, Generation, GenerationCheck, generation_check
from shoal.evaluation.memory import Memory, memory
from shoal.evaluation.perplexity import Perplexity, perplexity
from shoal.evaluation.prefix import KVHeld, perplexity_behind_prefix
from shoal.evaluation.ranking import RankAgreement, SubsampleAgreement, agreement_table, enough, rank_agreement
from shoal.evaluation.scoring import Progress, sequence_nll
from shoal.evaluation.speed import Speed, VariantSpeed, speed
from shoal.evaluation.stats import Spread

__all__ = [
    "PROMPTS",
    "Agreement",
    "Comparison",
    "Generation",
    "GenerationCheck",
    "KVHeld",
    "Memory",
    "Perplexity",
    "Progress",
    "RankAgreement",
    "Speed",
    "Spread",
    "SubsampleAgreement",
    "VariantSpeed",
    "agreement_table",
    "compare",
    "compare_between",
    "enough",
    "generation_check",
    "memory",
    "perplexity",
    "perplexity_behind_prefix",
    "rank_agreement",
    "sequence_nll",
    "speed",
]
