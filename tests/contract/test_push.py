"""shoal push, against a stand-in of the Hub: every byte arrives, and what must not leave is refused before it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shoal
from shoal.api.push import push
from shoal.errors import ShoalError, ShoalNote
from shoal.executing.weights import save_planned
from shoal.plan import Plan, load_plan, parse_plan
from shoal.writing.planned_folder import write_planned

from .hub import Hub, serving
from .verbs import run

ROW = {
    "name": "perplexity", "metric": "perplexity", "source": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "split": "test", "unit": "", "dense": 3.0, "pruned": 4.0, "how": "8 x 64 tokens",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serving() as made:
        yield made
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def made(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an adapter, and what Shoal made of them: a stock and a planned checkpoint, and a plan."""
    place = tmp_path_factory.mktemp("push")
    tiny_llama.save_pretrained(place / "base")
    inner = AutoModelForCausalLM.from_pretrained(place / "base")
    settings = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    peft.get_peft_model(inner, settings).save_pretrained(place / "lora")
    loaded = shoal.load(place / "base", device="cpu")
    command = f"shoal write {place / 'base'} --plan 0,2-3"
    shoal.write(loaded, "0,2-3", place / "out", card=[ROW], command=command, adapter=place / "lora", records=[{"a": 1}])
    write_planned(loaded, "0,2,2,3", place / "planned", prove=False)
    plan = parse_plan("0,2-3", Plan.identity(loaded.opened.spec, source=str(place / "base")))
    save_planned(plan, place / "plan")
    return place


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the stock checkpoint, to be spoiled."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def test_every_byte_arrives_and_a_second_push_changes_nothing(hub: Hub, out: Path) -> None:
    done = push(out, "me/small", endpoint=hub.endpoint, message="six layers")
    there = hub.repos["me/small"].branches["main"]
    assert set(there) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    rewritten = {file.name for file in done.sent.files if file.content is not None}
    assert rewritten == {"adapter/adapter_config.json", "shoal/plan.json"}
    for name in set(there) - rewritten:
        assert there[name] == (out / name).read_bytes(), name
    assert hub.large, "large files go by LFS"
    assert hub.repos["me/small"].messages == ["six layers"] and hub.tokens == {"Bearer hf_test"}
    assert done.commit == hub.repos["me/small"].sha("main") and not done.unchanged
    again = push(out, "me/small", endpoint=hub.endpoint)
    assert again.unchanged and again.commit == done.commit and len(hub.repos["me/small"].messages) == 1
    (out / "README.md").write_text("# new\n")
    third = push(out, "me/small", endpoint=hub.endpoint)
    assert not third.unchanged and there["README.md"] == b"# new\n"
    assert sum(line.startswith("PUT") for line in hub.asked) == 2, "weights are sent once"


def test_what_arrives_runs_and_names_no_path_of_this_machine(hub: Hub, made: Path, tmp_path: Path) -> None:
    push(made / "out", "me/small", endpoint=hub.endpoint)
    there = hub.repos["me/small"].branches["main"]
    assert not [name for name, content in there.items() if str(made).encode() in content]
    for name, content in there.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert load_plan(tmp_path / "got").hash == load_plan(made / "out").hash
    assert load_plan(tmp_path / "got").base.source == "base"
    assert json.loads(there["adapter/adapter_config.json"])["base_model_name_or_path"] == "me/small"
    ids = torch.arange(8)[None]
    mine, theirs = (AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (made / "out", tmp_path / "got"))
    assert torch.equal(mine, theirs)


def test_the_other_kinds_of_folder(hub: Hub, made: Path) -> None:
    for name, kind, proof in (
        ("planned", "planned checkpoint", "missing"),
        ("plan", "plan", "none"),
        ("out/adapter", "adapter", "missing"),
    ):
        options: dict[str, Any] = {"unproved": proof == "missing", "base": "me/small"}
        if kind == "adapter":
            shutil.copytree(made / name, made / "alone", dirs_exist_ok=True)
            name = "alone"  # noqa: PLW2901 - its proof lies in the folder that it was taken out of
        done = push(made / name, f"me/{name}", endpoint=hub.endpoint, **options)
        there = hub.repos[f"me/{name}"].branches["main"]
        assert (done.sent.kind, done.sent.proof) == (kind, proof) and len(there) == len(done.sent.files)
        assert not [name for name, content in there.items() if str(made).encode() in content]
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "me/small"
    assert push(made / "out/adapter", "me/a", base="me/b", dry_run=True).sent.proof == "passed"


def test_where_it_goes(hub: Hub, out: Path) -> None:
    push(out, "small", endpoint=hub.endpoint, private=True)
    assert hub.repos["me/small"].private
    done = push(out, "me/small", endpoint=hub.endpoint, revision="next")
    assert not done.unchanged or hub.repos["me/small"].branches["next"] == hub.repos["me/small"].branches["main"]
    (out / "README.md").write_text("# new\n")
    push(out, "me/small", endpoint=hub.endpoint, revision="next")
    assert hub.repos["me/small"].branches["next"]["README.md"] == b"# new\n"
    assert hub.repos["me/small"].branches["main"]["README.md"] != b"# new\n"
    asked = push(out, "me/small", endpoint=hub.endpoint, create_pr=True)
    assert asked.pull_request and hub.repos["me/small"].requests[asked.pull_request]["README.md"] == b"# new\n"
    assert hub.repos["me/small"].branches["main"]["README.md"] != b"# new\n"


def test_a_dry_run_touches_no_network(hub: Hub, out: Path) -> None:
    (out / ".DS_Store").write_text("x")
    said = run(["push", str(out), "me/small", "--endpoint", hub.endpoint, "--dry-run", "--private"])
    assert said.exit_code == 0 and not hub.asked, said.output
    assert "stock checkpoint, proved" in said.output and "it is private" in said.output
    assert "pipeline_tag text-generation" in said.output and "1 result" in said.output
    assert "stays here: .DS_Store" in said.output
    found = json.loads(run(["push", str(out), "me/small", "--dry-run", "--json"]).output)
    assert found["commit"] is None and found["bytes"] == sum(one["bytes"] for one in found["files"])


def test_the_command_says_what_it_did(hub: Hub, out: Path) -> None:
    said = run(["push", str(out), "me/small", "--endpoint", hub.endpoint, "-q"])
    assert said.exit_code == 0 and f"sent to {hub.endpoint}/me/small, main, commit " in said.output
    again = run(["push", str(out), "me/small", "--endpoint", hub.endpoint, "-q"])
    assert again.output.strip().endswith("already; nothing was changed")
    asked = run(["push", str(out), "me/small", "--endpoint", hub.endpoint, "--create-pr", "--json"])
    assert json.loads(asked.output)["pull_request"] is None, "a pull request without a change is none"


def spoil(out: Path, how: str) -> Path:
    """The folder with one thing that must not be sent."""
    proof = out / "shoal" / "proof.json"
    match how:
        case "W310 of another":
            shutil.rmtree(out / "shoal")
        case "W311":
            (out / "optimizer.pt").write_bytes(b"x")
        case "W312":
            (out / "notes.txt").symlink_to(out.parent / "secret.txt")
        case "W313":
            (out / "README.md").write_text(f"made of {out.parent / 'base'}.\n")
        case "W313 in a config":
            (out / "generation_config.json").write_text(json.dumps({"from": str(Path.home() / "models")}))
        case "W314":
            (out / ".model.safetensors.shoal-12-ab.partial").write_bytes(b"x")
        case "W315":
            proof.unlink()
        case "W316":
            found = json.loads(proof.read_text())
            found["checks"][0]["passed"] = False
            proof.write_text(json.dumps(found))
        case "M309":
            with (out / "model.safetensors").open("rb+") as stream:
                stream.truncate(1000)
        case "M310":
            tensors = load_file(out / "model.safetensors")
            del tensors["model.norm.weight"]
            save_file(tensors, out / "model.safetensors", {"format": "pt"})
        case "M309 of its adapter":
            (out / "adapter" / "adapter_model.safetensors").unlink()
    return out


@pytest.mark.parametrize(
    "how",
    ["W310 of another", "W311", "W312", "W313", "W313 in a config", "W314", "W315", "W316", "M309", "M310",
     "M309 of its adapter"],
)  # fmt: skip
def test_what_is_not_sent(hub: Hub, out: Path, how: str) -> None:
    with pytest.raises(ShoalError, match=f"^{how[:4]}: .{{40}}"):
        push(spoil(out, how), "me/small", endpoint=hub.endpoint)
    assert not hub.asked, "nothing is asked before the folder is looked through"


@pytest.mark.parametrize("how", ["W315", "W316"])
def test_without_a_proof_only_by_word(hub: Hub, out: Path, how: str) -> None:
    done = push(spoil(out, how), "me/small", endpoint=hub.endpoint, unproved=True)
    assert done.sent.proof == {"W315": "missing", "W316": "failed"}[how]


def test_weights_that_are_newer_than_their_proof_are_told(out: Path) -> None:
    import os

    later = (out / "shoal" / "proof.json").stat().st_mtime + 60
    os.utime(out / "model.safetensors", (later, later))
    with pytest.warns(ShoalNote, match=r"model\.safetensors is newer than the folder's proof"):
        push(out, "me/small", dry_run=True)


def test_no_such_folder(made: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", made / "base" / "config.json", made / "base", made / "lora"):
        with pytest.raises(ShoalError, match=r"^W31[05]: .*give|^W315: "):
            push(folder, "me/small", dry_run=True)


@pytest.mark.parametrize(
    ("code", "options"),
    [("U753", {"repo": "me/../small"}), ("U753", {"repo": "a/b/c"}), ("U753", {"base": "no good"}),
     ("U760", {"revision": "next", "create_pr": True}), ("U761", {"endpoint": "huggingface.co"})],
)  # fmt: skip
def test_names_that_are_none(made: Path, code: str, options: dict[str, Any]) -> None:
    with pytest.raises(ShoalError, match=f"^{code}: .{{40}}"):
        push(made / "out", **({"repo": "me/small", "dry_run": True} | options))


@pytest.mark.parametrize(
    ("code", "request_", "status", "state"),
    [
        ("U754", "POST /api/repos/create", 401, "nothing was sent"),
        ("U755", "POST /api/repos/create", 403, "nothing was sent"),
        ("U756", "GET /api/models/me/small", 404, "nothing was sent"),
        ("U757", "POST /api/models/me/small/commit", 409, "push again"),
        ("U755", "POST /api/models/me/small/commit", 403, "push again"),
        ("U755", "PUT /lfs/", 403, "push again"),
        ("U759", "POST /api/models/me/small/commit", 413, "push again"),
        ("U759", "POST /api/validate-yaml", 400, "push again"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, made: Path, code: str, request_: str, status: int, state: str
) -> None:
    hub.refuse = {request_: (status, {})}
    if status in (401, 403) and "create" in request_:
        hub.refuse["GET /api/models/me/small"] = (404, {"X-Error-Code": "RepoNotFound"})
    said = run(["push", str(made / "out"), "me/small", "--endpoint", hub.endpoint, "-q"])
    lines = said.stderr.strip().splitlines()
    assert said.exit_code == 1 and said.stdout == "" and len(lines) == 1, said.output
    assert lines[0].startswith(f"shoal: {code}: ") and state in lines[0] and len(lines[0]) < 500, lines


def test_no_hub_there(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShoalError, match=r"^U758: http://127.0.0.1:9 cannot be reached \(.*nothing was sent"):
        push(made / "out", "me/small", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ShoalError, match=r"^U758: HF_HUB_OFFLINE is set, so nothing was sent; unset it"):
        push(made / "out", "me/small", endpoint=hub.endpoint)


def test_private_is_not_promised_of_a_public_repository(hub: Hub, made: Path) -> None:
    push(made / "plan", "me/small", endpoint=hub.endpoint)
    with pytest.raises(ShoalError, match=r"^U762: me/small is there and public"):
        push(made / "out", "me/small", endpoint=hub.endpoint, private=True)
    assert "config.json" not in hub.repos["me/small"].branches["main"]
