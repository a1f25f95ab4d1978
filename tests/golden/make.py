"""Writes a set of kept files. Run it never again for a set that is there: what it wrote is the past, and stays.

A new set is made when a version adds formats that must be read for ever: `python -m tests.golden.make set2`, by the
code of that version; the sets before it stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shoal
from shoal.api.calibrate import calibrate
from shoal.api.compare import compare
from shoal.api.fit_exits import fit_exits
from shoal.api.prune import prune
from shoal.api.publish import publish
from shoal.executing.weights import save_planned
from shoal.models.inspect import inspect
from shoal.models.load import load
from shoal.plan import Plan, parse_plan
from shoal.registry import entries, get
from tests.contract.test_api import byte_tokenizer
from tests.golden.facts import CALIBRATED, COMPARED, FACTS, SEARCHES, opened
from tests.golden.names import names
from tests.golden.spelled import DECIDED, PLANS, servable, tensors

HOME = Path(__file__).parent
SENTENCE = "the a river stone light under over runs waits turns slowly never again north of old green deep water"


def base_model() -> None:
    """`model` and `text.txt`: a Llama of five layers, hidden size 8, one token for each byte."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 5, "num_attention_heads": 2}
    ids = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, num_key_value_heads=1, max_position_embeddings=128))
    for parameter in model.parameters():
        parameter.data.normal_(0 if parameter.dim() >= 2 else 1, 0.4 if parameter.dim() >= 2 else 0.1)
    model.save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    words = SENTENCE.split()
    order = torch.randint(0, len(words), (900,)).tolist()
    lines = [" ".join(words[i] for i in order[start : start + 9]) + "." for start in range(0, 900, 9)]
    Path("text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plans() -> None:
    """`plans/NAME`: one plan for each kind of step, with its tensors; lenses and probes as `fit-exits` makes them."""
    loaded = load("model", device="cpu")
    spec, config = inspect(loaded.model), loaded.model.config
    shapes = tensors(config.hidden_size, config.vocab_size, config.intermediate_size)
    torch.manual_seed(1)
    for name, text in PLANS.items():
        plan = parse_plan(text, Plan.identity(spec, source="model"))
        made = {one: _tensor(one, shape) for one, shape in shapes.get(name, {}).items()}
        save_planned(plan, Path("plans", name), made)
        if name in DECIDED:
            Path("plans", name, "policy.txt").write_text(DECIDED[name] + "\n", encoding="utf-8")
    fitted = fit_exits(loaded, "exit:layers=1,3", data="text.txt", length=24, limit=10)
    save_planned(fitted.plan, Path("plans", "fitted-exits"), fitted.weights)
    Path("plans", "fitted-exits", "policy.txt").write_text("exit:confidence=0.2,by=probe\n", encoding="utf-8")


def _tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("limit"):
        return torch.tensor([4.0])
    noise = torch.randn(shape) * 0.3
    if name.endswith((".scale", "layernorm.weight")):
        return 1 + noise
    return torch.eye(*shape) + noise if name.endswith(("-3.weight", ".lens")) else noise


def folders() -> None:
    """`written` by prune and publish, `twice` pruned from it."""
    first = prune("model", method="position", drop=1, settings={"which": "middle"}, data="text.txt", length=24, limit=4)
    publish(first, "written", seed=0)
    publish(prune("written", plan="0,2-3"), "twice")
    for name in ("written", "twice"):
        for page in Path(name).rglob("*.html"):
            page.unlink()  # 100 kB of drawing that no code reads


def policy() -> None:
    """`policy.json` and the recorded exits it was chosen on."""
    calibrate("model", device="cpu", **CALIBRATED).file.save("policy.json")


def searches() -> None:
    """`journal.jsonl` of a search, `race.jsonl` of one whose candidates race, and a folder of `compare`."""
    found = {}
    for name, options in SEARCHES.items():
        pruned = prune(opened(), drop=2, writable=False, journal=Path(f"{name}.jsonl"), **options)
        trace = [[one.notation, one.score] for one in pruned.found.trace]
        found[name] = {"plan": str(pruned.plan), "trace": trace}
    keep("searches", found)
    compare("model", "compared", device="cpu", **COMPARED)


def exchange() -> None:
    """`exchange/FORMAT.txt`: a plan in every format that can say it."""
    spec = servable()
    base = Plan.identity(spec, source="me/base")
    Path("exchange").mkdir()
    for name in entries("exchange"):
        form = get("exchange", name).load()()
        text = {"swift": "0-2,3m,5a,6-7", "llm-drop": "0-2,3m,5-7"}.get(name, "0-2,5-7")
        Path("exchange", f"{name}.txt").write_text(form.write(parse_plan(text, base), spec), encoding="utf-8")


def scrub() -> None:
    """Nothing of the machine stays in what is kept."""
    for file in (f for f in Path().rglob("*") if f.suffix in (".json", ".jsonl", ".md", ".yaml", ".txt")):
        text = file.read_text(encoding="utf-8")
        clean = re.sub(r'"(system|git)": "[^"]*"', r'"\1": "kept"', text).replace(f"{Path.cwd()}/", "")
        if clean != text:
            file.write_text(clean, encoding="utf-8")
        if re.search(r"/(home|work|tmp|root)/", clean):
            raise SystemExit(f"{file} names a folder of this machine")


def keep(name: str, found: dict[str, Any]) -> None:
    """`name`.json, one line for each key."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]
    Path(f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(name: str) -> None:
    """Make the set `name`, which must not exist."""
    (HOME / name).mkdir()
    os.chdir(HOME / name)
    for step in (base_model, plans, folders, policy, searches, exchange, scrub):
        step()
    for what, read in FACTS.items():
        keep(what, read())
    keep("names", names())
    Path("version.txt").write_text(f"{shoal.__version__}\n", encoding="utf-8")
    for cache in Path().rglob("__pycache__"):
        shutil.rmtree(cache)


if __name__ == "__main__":
    main(sys.argv[1])
