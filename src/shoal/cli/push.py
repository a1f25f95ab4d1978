"""shoal push: a folder that Shoal wrote, on the Hub."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli._shared import emit, table

if TYPE_CHECKING:
    from shoal.api.push import Pushed


def push(
    folder: Annotated[str, typer.Argument(help="A folder that shoal wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="The repository: owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository that only its owner sees.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, made where there is none (default: main).")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request and leave the branch.")] = False,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Address of the Hub (default: HF_ENDPOINT, huggingface.co).")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Hub id of the base, in place of its folder on this machine.")
    ] = None,
    unproved: Annotated[
        bool, typer.Option("--unproved", help="Also a checkpoint whose proof is missing or did not pass.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent, and where; touch no network.")
    ] = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Send a folder that shoal wrote to a model repository of the Hugging Face Hub, as whoever `hf auth login` or
    HF_TOKEN says; there is no option for a token."""
    from shoal.api.push import push as send

    done = send(
        folder, repo, private=private or None, revision=revision, message=message, create_pr=create_pr,
        endpoint=endpoint, base=base, unproved=unproved, dry_run=dry_run, bars=not quiet and sys.stderr.isatty(),
    )  # fmt: skip
    emit(done.to_dict(), _listing(done) if dry_run else _text(done), as_json=json_)


def _text(done: Pushed) -> str:
    if done.pull_request is not None:
        return f"{_how_much(done)} sent to {done.repo}, to be merged: {done.pull_request}"
    if done.unchanged:
        return f"{done.url} holds all {_how_much(done)} already; nothing was changed"
    return f"{_how_much(done)} sent to {done.url}, {done.revision}, commit {str(done.commit)[:12]}"


def _how_much(done: Pushed) -> str:
    count = len(done.sent.files)
    return f"{count} file{'' if count == 1 else 's'} ({done.sent.bytes:,} bytes)"


def _listing(done: Pushed) -> str:
    rows = [
        [one.name, one.size, "without paths of this machine" if one.content is not None else ""]
        for one in done.sent.files
    ]
    seen = "private" if done.private else "public, or as its owner's settings say"
    proof = {"none": "", "passed": ", proved"}.get(done.sent.proof, f", proof {done.sent.proof}")
    lines = [
        table(rows, ["file", "bytes", ""]),
        f"would send {_how_much(done)}: {done.sent.kind}{proof}",
        f"to {done.endpoint}/{done.repo}, {done.revision}; if new, it is {seen}",
        _card(done.card),
    ]
    if done.sent.left_out:
        lines.append(f"stays here: {', '.join(done.sent.left_out)}")
    return "\n".join(lines)


def _card(data: dict[str, object]) -> str:
    names = ("pipeline_tag", "base_model", "license", "datasets")
    said = [f"{name} {data[name]}" for name in names if name in data]
    index = data.get("model-index")
    results = index[0].get("results") if isinstance(index, list) and index and isinstance(index[0], dict) else None
    said += [f"{len(results)} results" if len(results) != 1 else "1 result"] if isinstance(results, list) else []
    return f"the card says: {'; '.join(said)}" if said else "there is no card (README.md) with a front matter"
