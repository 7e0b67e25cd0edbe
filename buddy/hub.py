"""The Hugging Face Hub: what its failures mean to the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from buddy.errors import UserError


@contextmanager
def explained(kind: str, repository: str, revision: str) -> Iterator[None]:
    """Turn a failed request to the Hub into one line that says what to do.

    Args:
        kind: "model" or "data set", for the message.
        repository: owner/name.
        revision: branch, tag or commit asked for.

    Raises:
        UserError: the repository or revision is absent, gated or private, or the Hub cannot be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{kind} {repository}: {_reason(error, revision)}") from error


def _reason(error: BaseException, revision: str) -> str:
    from huggingface_hub import errors

    causes = list(_chain(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        return (
            "the repository is gated; accept its licence on its Hub page, then set HF_TOKEN to your token "
            "(or run `hf auth login`)"
        )
    if caused_by(errors.RepositoryNotFoundError):
        return "no such repository on the Hub; check owner/name (a private one needs your token in HF_TOKEN)"
    if caused_by(errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; give a commit, tag or branch that its Hub page lists"
    if caused_by(errors.HFValidationError):
        return "not a repository name; write owner/name"
    if caused_by(errors.OfflineModeIsEnabled):
        return "not in the local cache, and HF_HUB_OFFLINE forbids fetching it; unset it on a machine with network"
    status = next((c.response.status_code for c in causes if isinstance(c, errors.HfHubHTTPError)), None)
    if status in (401, 403):
        return f"the Hub refused access (HTTP {status}); check the token in HF_TOKEN"
    if status is not None:
        return f"the Hub answered HTTP {status}; try again later"
    if caused_by(errors.LocalEntryNotFoundError) or isinstance(error, errors.HTTPError):
        return "not in the local cache, and the Hub cannot be reached; run this once on a machine with network"
    return f"cannot be fetched ({' '.join(str(error).split())})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it: the Hub's client wraps the telling error in a general one."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
