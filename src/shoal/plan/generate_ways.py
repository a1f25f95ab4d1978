"""What transformers' `generate` may be asked while a plan runs: one table, for who refuses and for the page.

A row for each thing that can be asked, an answer under a plan and one under a plan with a policy. What a *step* can do
is in `shoal.plan.capabilities`; here is what does not depend on the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.plan.answers import OK, PAGED_POLICY, Answer, Refused, Right

BY_NUMBER = Refused(
    "P142",
    "{asked} counts the layers of the base model, and a running plan has others; leave it out, or write the plan "
    "(shoal.write) and ask the written model",
)
EARLY_EXIT = Refused(
    "P142",
    "{asked} runs the first layers by another number in the config, which a running plan does not follow; leave it "
    "out, draft with shoal.speculating.speculator.Speculator on the model without a plan, or write the plan "
    "(shoal.write) and ask the written model",
)
ANOTHER_DEPTH = Refused(
    "P143",
    "the config of this model said {before} layers when the plan was put on it and says {now} now; set it back, and "
    "take other layers by another plan",
)
SHORT_CACHE = Refused(
    "P144",
    "this KV cache has rows for {rows} layers, and the plan needs the row of layer {needed}; make it from this model's "
    "own config, or leave past_key_values out",
)
CHUNKED_POLICY = Refused(
    "P145",
    "{asked} hands in the prompt in pieces, and a policy takes all behind the first for generated text; leave it out",
)
TWO_THREADS = Refused(
    "P146",
    "two threads run this model at once, and its policy remembers one text; let one thread generate after the other, "
    "or give each a model of its own",
)
BEAMS_POLICY = Refused(
    "U580",
    "beam search reorders the sequences in the KV cache, and what a policy skipped for each could not be told apart "
    "any more; generate with num_beams=1",
)


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Transformers answers itself, and as it does without a plan."""

    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One thing that `generate` can be asked."""

    typed: str
    """What the user adds to the call."""
    plan: Answer | Unchanged = OK
    policy: Answer | Unchanged = OK


ON_THE_HUB = Unchanged("transformers has no code for it and asks for trust_remote_code")
_SHIFTED = Right("one entry for each run")

WAYS: dict[str, Asked] = {
    "greedy": Asked(typed="do_sample=False"),
    "sampling": Asked(typed="do_sample=True, num_return_sequences=3"),
    "beams": Asked(typed="num_beams=3, num_return_sequences=2", policy=BEAMS_POLICY),
    "beams without a cache": Asked(typed="num_beams=3, use_cache=False"),
    "prompt lookup": Asked(typed="prompt_lookup_num_tokens=3"),
    "assistant": Asked(typed="assistant_model=other"),
    "assistant with a plan": Asked(typed="assistant_model=other, on which another plan runs"),
    "assistant itself": Asked(typed="assistant_model=model"),
    "assistant of another vocabulary": Asked(typed="assistant_model=other, tokenizer=..., assistant_tokenizer=..."),
    "early exit": Asked(typed="assistant_early_exit=2", plan=EARLY_EXIT, policy=EARLY_EXIT),
    "multi-token prediction": Asked(typed="use_mtp=True", plan=BY_NUMBER, policy=BY_NUMBER),
    "dflash": Asked(typed='speculation_type="dflash"', plan=BY_NUMBER, policy=BY_NUMBER),
    "dola": Asked(typed='dola_layers="low", custom_generate=...', plan=BY_NUMBER, policy=BY_NUMBER),
    "contrastive search": Asked(typed="penalty_alpha=0.6, top_k=4", plan=ON_THE_HUB, policy=ON_THE_HUB),
    "group beams": Asked(typed="num_beams=4, num_beam_groups=2", plan=ON_THE_HUB, policy=ON_THE_HUB),
    "forced words": Asked(typed="num_beams=2, force_words_ids=[[7]]", plan=ON_THE_HUB, policy=ON_THE_HUB),
    "constrained": Asked(typed="prefix_allowed_tokens_fn=..., or logits_processor=[...]"),
    "custom decoding": Asked(typed="custom_generate=function, or a folder with trust_remote_code=True"),
    "continuous batching": Asked(
        typed='generate_batch(...), or cache_implementation="paged"',
        plan=Right("see the row *paged*"),
        policy=PAGED_POLICY,
    ),
    "static cache": Asked(typed='cache_implementation="static"'),
    "offloaded cache": Asked(typed='cache_implementation="offloaded", or "offloaded_static"'),
    "quantised cache": Asked(typed='cache_implementation="quantized"'),
    "compiled": Asked(
        typed='cache_implementation="static", compile_config=CompileConfig(...)',
        policy=Right("and not compiled (U655)"),
    ),
    "compiled model": Asked(typed="torch.compile(model).generate(...), or model.compile()"),
    "own cache": Asked(typed="past_key_values=DynamicCache(config=model.config)"),
    "own cache, filled": Asked(typed="past_key_values=what this plan has filled"),
    "own cache, too short": Asked(
        typed="past_key_values=a cache of fewer layers", plan=SHORT_CACHE, policy=SHORT_CACHE
    ),
    "no cache": Asked(typed="use_cache=False"),
    "prompt in pieces": Asked(typed="prefill_chunk_size=4", policy=CHUNKED_POLICY),
    "hidden states": Asked(typed="output_hidden_states=True", plan=_SHIFTED, policy=_SHIFTED),
    "attentions": Asked(typed="output_attentions=True", plan=_SHIFTED, policy=_SHIFTED),
    "streamer": Asked(typed="streamer=..."),
    "stops": Asked(typed="stopping_criteria=[...], max_time=60.0, stop_strings=..."),
    "left padding": Asked(typed="attention_mask with zeros in front"),
    "inference mode": Asked(typed="under torch.inference_mode()"),
    "training mode": Asked(typed="model.train()"),
    "adapter": Asked(typed="a PEFT model's generate"),
    "threads": Asked(typed="several calls from threads at once", policy=TWO_THREADS),
}
"""By name, all that is asked in the contract tests (`tests/contract/test_generate_ways.py`)."""


def says(answer: Refused, **names: object) -> tuple[str, str]:
    """The sentence of a refusal with its names filled in, and its code."""
    return answer.sentence.format(**names), answer.code
