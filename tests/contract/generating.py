"""All that `generate` can be asked in one place: how it is asked, of a live plan as of the written model, and what must
come out. `shoal.plan.generate_ways` says what is right and what is refused."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from shoal.live import apply
from shoal.models.stacks import find_stack

from .families import VOCAB, tiny_of
from .live_models import PADDED
from .paged import SIZES

ONE = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
PROMPT = {"input_ids": ONE, "attention_mask": torch.ones_like(ONE)}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
Ask = Callable[[Any], Any]


def plain(model: Any, **more: Any) -> torch.Tensor:
    """The greedy tokens of the one prompt."""
    made: torch.Tensor = model.generate(**PROMPT, **(GREEDY | more))
    return made


def sampled(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return plain(model, do_sample=True, num_return_sequences=3)


def other_model(depth: int = 2) -> PreTrainedModel:
    """Another model with the same vocabulary."""
    return tiny_of("llama", depth)


def with_planned_assistant(model: Any) -> torch.Tensor:
    other = other_model(4)
    handle = apply(other, "0,2")
    try:
        return plain(model, assistant_model=other)
    finally:
        handle.restore()


def letters(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `count` tokens, each a letter."""
    names = ["<pad>", "<s>", "</s>", *(chr(ord("0") + n) for n in range(count - 3))]
    made = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **dict(zip(("pad_token", "bos_token", "eos_token"), names, strict=False))
    )


def with_foreign_assistant(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    config = copy.deepcopy(other_model().config)
    config.vocab_size = 40
    other = type(other_model())(config).eval()
    return plain(model, assistant_model=other, tokenizer=letters(VOCAB), assistant_tokenizer=letters(40))


def allowed(_: int, __: torch.Tensor) -> list[int]:
    return [7, 9, 11]


def only_even(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)


def constrained(model: Any) -> torch.Tensor:
    processors = LogitsProcessorList([only_even])
    return torch.cat([plain(model, prefix_allowed_tokens_fn=allowed), plain(model, logits_processor=processors)])


def loop(model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
         **kwargs: Any) -> torch.Tensor:  # fmt: skip
    """A decoding loop of one's own, without a cache."""
    for _ in range(6):
        best = model(input_ids=input_ids, use_cache=False).logits[:, -1].argmax(-1)
        input_ids = torch.cat([input_ids, best[:, None]], 1)
    return input_ids


def batched(model: Any) -> list[list[int]]:
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(**SIZES)
    made = model.generate_batch([ONE[0].tolist()], generation_config=settings, continuous_batching_config=sizes)
    return [ONE[0].tolist() + one.generated_tokens for one in made.values()]


class Rounded(QuantizedLayer):
    """A quantised row whose rounding loses nothing, for machines without a library that quantises."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        return tensor.double()

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        return q_tensor.float()


def quantised(model: Any) -> torch.Tensor:
    depth = find_stack(model).depth
    return plain(model, past_key_values=Cache(layers=[Rounded(residual_length=3) for _ in range(depth)]))


@contextmanager
def compiling() -> Any:
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def compiled_step(model: Any) -> torch.Tensor:
    how = CompileConfig(backend="eager", mode=None, fullgraph=False)
    how._compile_all_devices = True
    return plain(model, cache_implementation="static", compile_config=how)


def compiled_alone(model: Any) -> torch.Tensor:
    with compiling():
        return compiled_step(model)


def compiled_model(model: Any) -> torch.Tensor:
    with compiling():
        compiled = torch.compile(model, backend="eager")
        return compiled.generate(**PROMPT, **GREEDY)


def own_cache(model: Any) -> torch.Tensor:
    found = [
        plain(model, past_key_values=cache)
        for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=16))
    ]
    return torch.cat(found)


def filled_cache(model: Any) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    first = plain(model, past_key_values=cache, max_new_tokens=3)
    return model.generate(first, past_key_values=cache, max_new_tokens=3, do_sample=False)


def short_cache(model: Any) -> torch.Tensor:
    return plain(model, past_key_values=DynamicCache(config=other_model().config))


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        pass


def streamed(model: Any) -> torch.Tensor:
    streamer = Collecting()
    made = plain(model, streamer=streamer)
    assert streamer.seen == made[0].tolist()
    return made


def stopped(model: Any) -> torch.Tensor:
    stops = StoppingCriteriaList([lambda ids, _: torch.tensor([ids.shape[1] >= 14])])
    return plain(model, stopping_criteria=stops, max_time=60.0)


def told(name: str) -> Ask:
    """Hidden states or attentions of all steps."""

    def ask(model: Any) -> list[torch.Tensor]:
        out = plain(model, **{f"output_{name}": True}, return_dict_in_generate=True)
        return [out.sequences, *(one for step in getattr(out, name) for one in step)]

    return ask


def in_training(model: Any) -> torch.Tensor:
    model.train()
    try:
        return plain(model)
    finally:
        model.eval()


def in_inference_mode(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return plain(model)


def adapted(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])  # of no effect until trained
    wrapped = peft.get_peft_model(model, config)
    try:
        return plain(wrapped)
    finally:
        wrapped.unload()


def from_threads(model: Any) -> list[torch.Tensor]:
    """Three prompts from three threads, which take turns in the middle of every layer."""
    stack = find_stack(model)
    handles = [
        stack.layer(index).register_forward_pre_hook(lambda *_: time.sleep(0.0005)) for index in range(stack.depth)
    ]
    found: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def run(start: int) -> None:
        ids = torch.arange(start, start + 8)[None]
        try:
            found[start] = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(start,)) for start in (3, 20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    if errors:
        raise errors[0]
    return [found[start] for start in (3, 20, 40)]


def one_after_the_other(model: Any) -> list[torch.Tensor]:
    rows = [torch.arange(start, start + 8)[None] for start in (3, 20, 40)]
    return [model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY) for ids in rows]


def offloaded(model: Any) -> torch.Tensor:
    """With stand-ins for the streams of a device, which is not needed for what is asked here."""

    class Stream(AbstractContextManager[None]):
        def __exit__(self, *_: Any) -> None:
            pass

        def wait_stream(self, _: Any) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Stream", Stream)
        patch.setattr(torch.cuda, "default_stream", lambda _: Stream())
        return torch.cat([plain(model, cache_implementation=f"offloaded{kind}") for kind in ("", "_static")])


def asking(**more: Any) -> Ask:
    return lambda model: plain(model, **more)


ASKS: dict[str, Ask] = {
    "greedy": plain,
    "sampling": sampled,
    "beams": asking(num_beams=3, num_return_sequences=2),
    "beams without a cache": asking(num_beams=3, use_cache=False),
    "prompt lookup": asking(prompt_lookup_num_tokens=3),
    "assistant": lambda model: plain(model, assistant_model=other_model()),
    "assistant with a plan": with_planned_assistant,
    "assistant itself": lambda model: plain(model, assistant_model=model),
    "assistant of another vocabulary": with_foreign_assistant,
    "early exit": asking(assistant_early_exit=2),
    "multi-token prediction": asking(use_mtp=True),
    "dflash": lambda model: plain(model, speculation_type="dflash", assistant_model=other_model()),
    "dola": asking(dola_layers="low", custom_generate=loop),
    "contrastive search": asking(penalty_alpha=0.6, top_k=4),
    "group beams": asking(num_beams=4, num_beam_groups=2),
    "forced words": asking(num_beams=2, force_words_ids=[[7]]),
    "constrained": constrained,
    "custom decoding": asking(custom_generate=loop),
    "continuous batching": batched,
    "static cache": asking(cache_implementation="static"),
    "offloaded cache": offloaded,
    "quantised cache": quantised,
    "compiled": compiled_alone,
    "compiled model": compiled_model,
    "own cache": own_cache,
    "own cache, filled": filled_cache,
    "own cache, too short": short_cache,
    "no cache": asking(use_cache=False),
    "prompt in pieces": asking(prefill_chunk_size=4),
    "hidden states": told("hidden_states"),
    "attentions": told("attentions"),
    "streamer": streamed,
    "stops": stopped,
    "left padding": lambda model: model.generate(**PADDED, **GREEDY),
    "inference mode": in_inference_mode,
    "training mode": in_training,
    "adapter": adapted,
    "threads": from_threads,
}
"""By name, what is asked of a model."""

_GREEDY = (
    "prompt lookup", "assistant", "assistant with a plan", "assistant itself", "assistant of another vocabulary",
    "custom decoding", "static cache", "quantised cache", "compiled", "compiled model",
    "own cache, filled", "no cache", "prompt in pieces", "streamer", "inference mode", "training mode", "adapter",
)  # fmt: skip
GREEDY_TEXT: dict[str, Ask] = {
    **dict.fromkeys(_GREEDY, plain),
    "offloaded cache": lambda model: plain(model).repeat(2, 1),
    "own cache": lambda model: plain(model).repeat(3, 1),
    "continuous batching": lambda model: plain(model).tolist(),
    "threads": one_after_the_other,
}
"""What is asked of the written model where the text must be the one of greedy decoding; else the same is asked."""


def same(one: Any, other: Any) -> bool:
    """Equal tokens and nearly equal states."""
    if isinstance(one, list) and one and isinstance(one[0], torch.Tensor):
        return len(one) == len(other) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def face(model: PreTrainedModel) -> dict[str, Any]:
    """All of a model that a block may not change: settings, modules, hooks, and what stands on the instances."""
    seen: dict[str, Any] = {
        "config": (model.config, copy.deepcopy(model.config.to_dict())),
        "run as": model.config._attn_implementation,
        "generation config": (model.generation_config, copy.deepcopy(vars(model.generation_config))),
    }
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        own = {key for key in vars(module) if key != "_shoal_opened"}
        seen[name] = id(module), own, {key: id(child) for key, child in module._modules.items()}, hooks
    return seen
