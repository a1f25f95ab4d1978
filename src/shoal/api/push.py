"""A folder that Shoal wrote, on the Hub: looked through first, then sent by huggingface_hub."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    validate_repo_id,
)

from shoal.api.push_errors import hub_errors
from shoal.errors import UsageError, note
from shoal.writing.card import card_data
from shoal.writing.sendable import Sendable, sendable
from shoal.writing.sent_files import Sent

MESSAGE = "Upload a result of Shoal"
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was sent, or with `dry_run` what would be."""

    repo: str
    """owner/name, or the name alone where the owner is not known yet."""
    endpoint: str
    revision: str
    private: bool | None
    """None: as the Hub has it, public for a new repository unless its owner says otherwise."""
    sent: Sendable
    card: dict[str, Any]
    """The front matter of README.md."""
    url: str | None = None
    commit: str | None = None
    """The hash of the commit with the files; None after a dry run."""
    pull_request: str | None = None
    """The address of the pull request that was opened."""
    unchanged: bool = False
    """The repository held just these files before."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the files as {name, bytes, rewritten}."""
        return {
            "repo": self.repo,
            "endpoint": self.endpoint,
            "revision": self.revision,
            "private": self.private,
            "kind": self.sent.kind,
            "proof": self.sent.proof,
            "files": [
                {"name": one.name, "bytes": one.size, "rewritten": one.content is not None} for one in self.sent.files
            ],
            "bytes": self.sent.bytes,
            "left_out": list(self.sent.left_out),
            "card": self.card,
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "unchanged": self.unchanged,
        }


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    base: str | None = None,
    unproved: bool = False,
    dry_run: bool = False,
    bars: bool = False,
) -> Pushed:
    """Send a folder that Shoal wrote to the model repository `repo` (owner/name, or a name under one's own) of the Hub.
    The repository is made where there is none; files that it holds beside those of the folder stay.

    `private`: make a new repository so. `revision`: the branch, made where there is none (default: main); `create_pr`:
    open a pull request in its place. `message`: of the commit. `endpoint`: the address of the Hub (default:
    HF_ENDPOINT, else huggingface.co). `base`: the Hub id of the base, for a base that lay in a folder of this machine.
    `unproved`: send a checkpoint without a proof, too. `dry_run`: look and send nothing; no network is touched.
    `bars`: let huggingface_hub show its progress. Who pushes is known to huggingface_hub: `hf auth login` or HF_TOKEN.

    Raises before anything is sent `WriteError` W310 to W316 and what `shoal.writing.sendable` raises, `UsageError` U753
    for a name that no repository has, U760 for both of `revision` and `create_pr`, U761 for an address that is none.
    From the Hub: U754 nobody is logged in, U755 no permission, U756 no such repository or branch, U757 something else
    is writing there, U758 it cannot be reached, U759 another answer, U762 `private` and the repository is public.
    """
    _require_names(repo, base, endpoint)
    if create_pr and revision is not None:
        raise UsageError("a pull request is opened against main; leave --revision or --create-pr out", code="U760")
    ready = sendable(folder, repo, base=base, unproved=unproved)
    for name in ready.newer:
        note(f"{name} is newer than the folder's proof; `shoal verify {folder}` proves it again")
    api = huggingface_hub.HfApi(endpoint=endpoint, library_name="shoal")
    pushed = Pushed(repo, api.endpoint, revision or MAIN, private, ready, card_data(ready.folder / "README.md"))
    if dry_run:
        return pushed
    with _quiet(bars), tempfile.TemporaryDirectory(prefix="shoal-push-") as place:
        _lay(Path(place), ready.files)
        return _send(api, pushed, Path(place), message or MESSAGE, create_pr=create_pr)


def _require_names(repo: str, base: str | None, endpoint: str | None) -> None:
    for what, name in (("the repository", repo), ("--base", base)):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            why = str(error).split(":")[0].rstrip(".")
            raise UsageError(
                f"{what} {name!r} is no name on the Hub ({why}); give owner/name, such as me/smollm2-24", code="U753"
            ) from None
    if endpoint is not None and not endpoint.startswith(("https://", "http://")):
        raise UsageError(f"--endpoint {endpoint!r} is no address; give one such as https://huggingface.co", code="U761")


def _lay(place: Path, files: tuple[Sent, ...]) -> None:
    """Links to the files, and the contents of those that are sent otherwise than they are: just this is sent, whatever
    appears in the folder meanwhile."""
    for file in files:
        here = place / file.name
        here.parent.mkdir(parents=True, exist_ok=True)
        if file.content is not None:
            here.write_bytes(file.content)
            continue
        try:
            here.symlink_to(file.path.resolve())
        except OSError:  # a system that lets not everyone make links
            os.link(file.path.resolve(), here)


def _send(api: huggingface_hub.HfApi, wanted: Pushed, place: Path, message: str, *, create_pr: bool) -> Pushed:
    with hub_errors(wanted.repo, wanted.endpoint, wanted.revision, "nothing was sent"):
        made = api.create_repo(wanted.repo, private=wanted.private, repo_type="model", exist_ok=True)
        repo = made.repo_id
        private = api.repo_info(repo).private
        if wanted.private and private is False:
            raise UsageError(
                f"{repo} is there and public, which --private does not change; make it private in its settings, or "
                "leave --private out",
                code="U762",
            )
        if wanted.revision != MAIN and not wanted.revision.startswith("refs/"):
            api.create_branch(repo, branch=wanted.revision, exist_ok=True)
        before = api.repo_info(repo, revision=wanted.revision).sha
    with hub_errors(repo, wanted.endpoint, wanted.revision, "push again to send what is missing"):
        done = api.upload_folder(
            repo_id=repo,
            folder_path=place,
            commit_message=message,
            revision=None if create_pr else wanted.revision,
            create_pr=create_pr,
        )
    same = not create_pr and before is not None and done.oid == before
    return replace(
        wanted,
        repo=repo,
        private=private,
        url=f"{wanted.endpoint}/{repo}",
        commit=done.oid,
        pull_request=done.pr_url,
        unchanged=same,
    )


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """huggingface_hub says what it must as notes, and what it tries again not at all."""
    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not bars:
        disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")  # what it says to its own developers, its threads included
            warnings.simplefilter("always", UserWarning)
            yield
        for text in dict.fromkeys(" ".join(str(one.message).split()) for one in said):
            note(text)
    finally:
        logging.set_verbosity(level)
        if shown and not bars:
            enable_progress_bars()
