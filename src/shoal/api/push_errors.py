"""What the Hub and its client say when they refuse, as one sentence with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

from shoal.errors import ShoalError, UsageError, first_line


@contextmanager
def hub_errors(repo: str, endpoint: str, revision: str, state: str) -> Iterator[None]:
    """Any failure of a request to the Hub as a `UsageError` that ends with `state`, what there is now: U754 (401), U755
    (403), U756 (404), U757 (409, 412), U758 no connection, U759 any other."""
    try:
        yield
    except ShoalError:
        raise
    except Exception as error:  # the client raises those of its HTTP library, OSError, ValueError and RuntimeError
        raise _said(error, repo, endpoint, revision, state) from error


def _said(error: Exception, repo: str, endpoint: str, revision: str, state: str) -> UsageError:
    chain = list(_causes(error))
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return UsageError(f"HF_HUB_OFFLINE is set, so {state}; unset it and push again", code="U758")
    response = next((one.response for one in chain if getattr(one, "response", None) is not None), None)  # type: ignore[attr-defined]
    if response is None:
        return _without_answer(error, chain, endpoint, state)
    status, words = int(response.status_code), _words(response)
    where = f"{endpoint} answers {status}{f' ({words})' if words else ''}"
    if any(isinstance(one, RevisionNotFoundError) for one in chain):
        return UsageError(f"{repo} has no branch {revision} ({where}); {state}; name another --revision", code="U756")
    match status:
        case 401:
            remedy = "log in with `hf auth login`, or put a token that may write into HF_TOKEN"
            return UsageError(
                f"nobody whom the Hub knows is logged in for {repo}: {where}; {state}; {remedy}", code="U754"
            )
        case 403:
            remedy = "take a token that may write there, or push to a name of your own, or with --create-pr"
            return UsageError(f"this account may not write to {repo}: {where}; {state}; {remedy}", code="U755")
        case 404:
            remedy = "see that its name and --endpoint are right, and that your token may read it"
            return UsageError(f"{repo} is not to be found: {where}; {state}; {remedy}", code="U756")
        case 409 | 412:
            return UsageError(
                f"something else changed {repo} meanwhile: {where}; {state}; wait for it and push again", code="U757"
            )
        case _:
            remedy = "try again later" if status == 429 or status >= 500 else "mend what it names"
            return UsageError(f"the Hub did not take {repo}: {where}; {state}; {remedy}", code="U759")


def _without_answer(error: Exception, chain: list[Exception], endpoint: str, state: str) -> UsageError:
    """No connection by whatever library, or an answer that its client cannot use."""
    module = {type(one).__module__.partition(".")[0] for one in chain}
    if module & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"} or isinstance(error, OSError):
        why, remedy = first_line(error, 120), "see that the network, --endpoint and HF_ENDPOINT are right"
        return UsageError(f"{endpoint} cannot be reached ({why}); {state}; {remedy}", code="U758")
    why = ": ".join(dict.fromkeys(first_line(one, 120).rstrip(".") for one in (error, chain[-1])))
    return UsageError(f"the Hub's client gave up ({why}); {state}; mend what it names", code="U759")


def _causes(error: BaseException | None) -> Iterator[Exception]:
    seen = 0
    while isinstance(error, Exception) and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _words(response: Any) -> str:
    """What the answer itself says: its header or its `error`."""
    said = response.headers.get("X-Error-Message")
    if not said:
        try:
            found = response.json()
        except Exception:  # a page, or an answer whose rest was not read
            found = None
        said = found.get("error") if isinstance(found, dict) else None
    return " ".join(said.split())[:160].rstrip(".;") if isinstance(said, str) else ""
