"""The Hugging Face Hub: a folder sent to it, and what its failures mean to the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buddy.errors import UserError


def check_name(repository: str, option: str) -> None:
    """Refuse what is not owner/name.

    Raises:
        UserError: it is not; names ``option``.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{option} {repository}: {error}") from None
    if repository.count("/") != 1:
        raise UserError(f"{option} {repository}: write owner/name")


def user() -> str:
    """Whose token this is.

    Raises:
        UserError: there is no token, the Hub does not know it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _sending("the Hub"):
        found: dict[str, Any] = HfApi().whoami()
        return str(found["name"])


def upload(folder: Path, repository: str, files: list[str], message: str, private: bool = False) -> str:
    """Send files to a model repository, which is made where there is none; other files in it stay.

    Args:
        folder: where the files are.
        repository: owner/name.
        files: their names in the folder and there.
        message: of the commit.
        private: who may see a repository that is made here.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _sending(repository):
        where = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files, commit_message=message)
    return str(where)


@contextmanager
def _sending(what: str) -> Iterator[None]:
    """Turn a failure to send into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        causes = list(_chain(error))
        status = next((c.response.status_code for c in causes if isinstance(c, errors.HfHubHTTPError)), None)
        if any(isinstance(cause, errors.LocalTokenNotFoundError) for cause in causes):
            reason = "no token; make one that may write on the Hub's page of your tokens, and set HF_TOKEN to it"
        elif any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
            reason = "HF_HUB_OFFLINE forbids to send anything; unset it on a machine with network"
        elif status in (401, 403, 404):
            reason = f"the Hub refused (HTTP {status}); may the token in HF_TOKEN write there?"
        elif status is not None:
            reason = f"the Hub answered HTTP {status}; try again later"
        else:
            reached = "not sent" if isinstance(error, ValueError | RuntimeError) else "the Hub cannot be reached"
            reason = f"{reached} ({' '.join(str(error).split())[:200]})"
        raise UserError(f"--push: {what}: {reason}") from error


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
