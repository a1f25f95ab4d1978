"""The proof's measurements, and the fresh process that takes them with nothing but torch and transformers.

`python proof_child.py REQUEST.json` loads each folder of the request as any user would, and writes what it measured.
The parent imports the same functions for its live side, so that both sides are asked the same questions.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

CACHES = ("past_key_values", "cache_params")


def _without_router_loss(measure: Callable[..., Any]) -> Callable[..., Any]:
    """Without the loss of experts' routers, which transformers cannot compute beside a cache, though a config asks."""

    def measured(model: Any, *args: Any) -> Any:
        own = vars(model.config.get_text_config(decoder=True))
        asked = {key: own[key] for key in own if key == "output_router_logits"}
        own |= dict.fromkeys(asked, False)
        try:
            return measure(model, *args)
        finally:
            own.update(asked)

    return measured


def uncached(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [b, t, vocab] of one pass over ids [b, t]; mask [b, t] is 0 where a row is padded on the left."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@_without_router_loss
def cached(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """The same logits by a prefill of half the tokens, a chunk of two as in verification (one where a layer keeps a
    recurrent state, which takes no chunks), then single tokens. None for a model that keeps no cache."""
    start, end, length = 0, (ids.shape[1] + 1) // 2, ids.shape[1]
    past: dict[str, Any] = {}
    pieces: list[torch.Tensor] = []
    while start < length:
        past, logits = _step(model, ids[:, start:end], mask[:, :end], past)
        if not past:
            return None
        recurrent = any(getattr(_only(past), "is_linear", ()))
        chunk = 2 if not pieces and not recurrent else 1
        pieces.append(logits)
        start, end = end, min(end + chunk, length)
    return torch.cat(pieces, 1)


def greedy(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[int], list[float]]:
    """`tokens` greedy tokens after prompt [1, t], by `generate`, and at each the gap between the two highest scores."""
    return _greedy(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, tokens)


@_without_router_loss
def _greedy(model: Any, given: dict[str, Any], tokens: int) -> tuple[list[int], list[float]]:
    """The same for one row of inputs. Of the model's own generation config only the ids of special tokens count, where
    they are ids: it may ask for drafts, contrasts or sampling, which compare other things than two models."""
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    for name in vars(type(own)()):
        kept = name in ("_from_model_config", "transformers_version")
        if not kept and not ("token_id" in name and is_special(getattr(own, name, None))):
            setattr(model.generation_config, name, None)
    try:
        given = {**given, "max_new_tokens": tokens, "min_new_tokens": tokens}
        out = model.generate(**given, do_sample=False, num_beams=1, return_dict_in_generate=True, output_scores=True)
    finally:
        model.generation_config = own
    best = [scores[0].float().topk(2).values.tolist() for scores in out.scores]
    return out.sequences[0, -len(best) :].tolist(), [first - second for first, second in best]


def is_special(value: Any) -> bool:
    """Whether a config's value is the id of a special token, or a list of them."""
    return value != [] and all(type(one) is int for one in (value if isinstance(value, list) else [value]))


@_without_router_loss
def kv_facts(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any] | None:
    """What the cache of one sequence ids [1, t] holds: `per_token`, bytes by which the second token lets it grow;
    `elements` at t tokens; `rows`, [window or 0, elements] of every row that holds something. None without a cache."""
    first, _ = _step(model, ids[:, :1], mask[:, :1], {})
    if not first:
        return None
    before = _bytes(first)
    growth = _bytes(_step(model, ids[:, 1:2], mask[:, :2], first)[0]) - before
    whole, _ = _step(model, ids, mask, {})
    rows = [
        [row.sliding_window if getattr(row, "is_sliding", False) else 0, sum(t.numel() for t in _tensors(vars(row)))]
        for row in _only(whole).layers
    ]
    return {"per_token": growth, "elements": sum(n for _, n in rows), "rows": [row for row in rows if row[1]]}


def bit_sums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """For each tensor the sum of its values' float32 bit patterns, modulo 2^64: exact, the same in any order and for
    any narrower dtype, and changed by a change of any one value."""
    sums = {}
    for name, tensor in tensors.items():
        flat, total = tensor.detach().reshape(-1), 0
        for start in range(0, flat.numel(), 1 << 24):  # in pieces, or a large embedding would be held twice
            piece = flat[start : start + (1 << 24)].float().contiguous()
            total += int(piece.view(torch.int32).sum(dtype=torch.int64))
        sums[name] = total
    return sums


def parameters(model: Any) -> int:
    """Parameters by unique storage: tied weights count once."""
    return sum({(p.data_ptr(), p.numel()): p.numel() for p in model.parameters()}.values())


def distance(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest absolute difference over the places where mask [b, t] is 1; NaN when any value there is NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    seen = mask.bool().to(ours.device)
    return float((ours.float() - theirs.to(ours.device).float())[seen].abs().max())


def _step(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, past: dict[str, Any]
) -> tuple[dict[str, Any], torch.Tensor]:
    """One cached forward after `past`, {keyword: cache} or empty; the new one is empty for a model without a cache."""
    out = model(input_ids=ids, attention_mask=mask, use_cache=True, **past)
    return {name: out[name] for name in CACHES if out.get(name) is not None}, out.logits


def _only(past: dict[str, Any]) -> Any:
    return next(iter(past.values()))


def _bytes(past: dict[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for row in _only(past).layers for t in _tensors(vars(row)))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a row of a cache; counters, which have no dimensions, hold no tokens."""
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Load one folder and measure it, as `job` asks: `_ask` of proof.py makes it."""
    from safetensors.torch import load_file

    if "shoal" in job:  # where the package is that loads a planned checkpoint
        sys.path.insert(0, job["shoal"])
        __import__("shoal.auto")
    model, info = getattr(transformers, job["auto"]).from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["dtype"]),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **job["options"],
    )
    if "adapter" in job:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"]).get_base_model()
    model = model.to(job["device"]).eval()
    found: dict[str, Any] = {
        "keys": {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "class": type(model).__name__,
        "parameters": parameters(model),
        "weights": bit_sums(model.state_dict()),
    }
    return found | (of_kind if "depths" in job else causal)(model, load_file(job["reference"], job["device"]), job)


def causal(model: Any, tensors: dict[str, torch.Tensor], job: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a causal language model."""
    found: dict[str, Any] = {
        "depth": model.config.get_text_config(decoder=True).num_hidden_layers,
        "logits": {},
        "cached_uncached": {},
        "largest": 0.0,
    }
    for name in sorted({key.partition(".")[0] for key in tensors}):
        ids, mask = tensors[f"{name}.ids"], tensors[f"{name}.mask"]
        whole, steps = uncached(model, ids, mask), cached(model, ids, mask)
        for kind, logits in (("uncached", whole), ("cached", steps)):
            if f"{name}.{kind}" in tensors and logits is not None:
                found["logits"][f"{name}.{kind}"] = distance(logits, tensors[f"{name}.{kind}"], mask)
        if steps is not None:
            found["cached_uncached"][name] = distance(steps, whole, mask)
        found["largest"] = max(found["largest"], float(whole[mask.bool()].abs().max()))
    found["kv"] = kv_facts(model, tensors["random.ids"], tensors["random.mask"])
    prompts = [torch.tensor([prompt], device=job["device"]) for prompt in job["prompts"]]
    found["greedy"] = [greedy(model, prompt, job["tokens"])[0] for prompt in prompts]
    return found


def of_kind(model: Any, tensors: dict[str, torch.Tensor], job: dict[str, Any]) -> dict[str, Any]:
    """What is asked of any other model: every floating tensor that it returns, and what a decoder makes of a cache.
    `tensors`: SET.in.NAME, SET.out.NAME and SET.cached; job["depths"]: by stack, the field that holds its depth."""
    found: dict[str, Any] = {"outputs": {}, "cached_whole": {}, "greedy": [], "kv": None, "largest": 0.0}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        inputs = {key.split(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.in.")}
        returned = outputs(model, inputs)
        for key, value in returned.items():
            found["largest"] = max(found["largest"], float(value.abs().max()))
            if f"{name}.out.{key}" in tensors:
                found["outputs"][f"{name} {key}"] = difference(value, tensors[f"{name}.out.{key}"])
        if "decoder_input_ids" in inputs:
            steps, found["kv"] = decoded(model, inputs)
            found["cached_whole"][name] = difference(steps, next(iter(returned.values())))
            if f"{name}.cached" in tensors:
                found["outputs"][f"{name} cached"] = difference(steps, tensors[f"{name}.cached"])
        if job["tokens"]:
            found["greedy"].append(written(model, inputs, job["tokens"])[0])
    found["depths"] = {name: reached(model.config, field) for name, field in job["depths"].items()}
    return found


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating tensor that one pass without a cache returns, by its name; the scores or states come first."""
    out = model(**inputs, **({"use_cache": False} if "decoder_input_ids" in inputs else {}))
    return {name: value for name, value in out.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


def decoded(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The decoder's scores (or states) [b, t, n] from half of its tokens at once and the others one by one, with one
    pass of the encoder; and the elements of keys and values that its self-attention then holds."""
    ids = inputs["decoder_input_ids"]
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    half, pieces = (ids.shape[1] + 1) // 2, []
    out = model(**given, decoder_input_ids=ids[:, :half], use_cache=True)
    mask = {name: value for name, value in given.items() if name == "attention_mask"}
    read = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
    for step in range(half, ids.shape[1] + 1):
        pieces.append(next(iter(out.values())))
        if step < ids.shape[1]:
            out = model(
                encoder_outputs=read,
                **mask,
                decoder_input_ids=ids[:, step : step + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    rows = out.past_key_values.self_attention_cache.layers
    return torch.cat(pieces, 1), sum(t.numel() for row in rows for t in _tensors(vars(row)))


def written(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> tuple[list[int], list[float]]:
    """`tokens` greedy tokens for the first row of the encoder's inputs, by `generate`, and the gaps as in `greedy`."""
    given = {name: value[:1] for name, value in inputs.items() if name != "decoder_input_ids"}
    return _greedy(model, given, tokens)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest absolute difference of all values; NaN when one is NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.float() - theirs.to(ours.device).float()).abs().max())


def reached(config: Any, field: str) -> Any:
    """The value of a field, which may be in a config inside this one."""
    for name in field.split("."):
        config = getattr(config, name)
    return config


def main(request_file: str) -> None:
    """Answer every job of the request; a job that fails gets {"error": ...}."""
    with open(request_file, encoding="utf-8") as stream:  # noqa: PTH123 - this script imports as little as it can
        request = json.load(stream)
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision(request["precision"])
    answers = []
    for job in request["jobs"]:
        try:
            with torch.no_grad():
                answers.append(answer(job))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    assert "shoal" not in sys.modules or any("shoal" in job for job in request["jobs"])
    with open(request["answers"], "w", encoding="utf-8") as stream:  # noqa: PTH123
        json.dump(answers, stream)


if __name__ == "__main__":
    main(sys.argv[1])
