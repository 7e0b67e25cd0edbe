"""Where a run goes: to the server, to a folder, nowhere. No key is ever read into a variable that is kept."""

from __future__ import annotations

import logging
import netrc
import os
import re
import socket
import urllib.request
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import urlsplit

from buddy.errors import UserError, lacking, needs
from buddy.study.settings import Tracking

log = logging.getLogger("buddy.tracking")

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode | Literal["auto"]] = {
    "auto": "auto",
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What WANDB_MODE and the study may say, W&B's older names included."""

CONNECT_TIMEOUT_S = 3.0
KEY_HINT = "set WANDB_API_KEY, or run `wandb login` once"


def choose_mode(settings: Tracking) -> Mode:
    """Where this process's runs go: WANDB_MODE, else the study's mode; auto is online if there is a key.

    Without W&B's package they go nowhere, which is worth a warning only to who has asked for more.
    """
    named = os.environ.get("WANDB_MODE") or settings.mode
    mode = MODES.get(named)
    if find_spec("wandb") is None:
        if mode not in ("auto", "disabled"):
            warn(f"{named}, but {lacking('wandb')}")
        return "disabled"
    if mode is None:
        warn(f"WANDB_MODE={named} is not one of {', '.join(MODES)}; runs are kept offline")
        return "offline"
    if mode == "auto":
        return "online" if has_key() else "offline"
    if mode == "online" and not has_key():
        # W&B would ask for a key on the terminal, and wait.
        warn("online, but there is no key (WANDB_API_KEY or `wandb login`); runs are kept offline")
        return "offline"
    return mode


def has_key() -> bool:
    """Whether the environment or what ``wandb login`` wrote holds a key for the server."""
    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _key())


def _key() -> str:
    """The key for the server, "" if there is none; for use at once."""
    if given := os.environ.get("WANDB_API_KEY"):
        return given
    named = os.environ.get("NETRC")
    for file in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            found = netrc.netrc(os.path.expanduser(file)).authenticators(urlsplit(server()).netloc)
        except (OSError, ValueError, netrc.NetrcParseError):  # absent, not text, not understood
            continue
        if found and found[2]:
            return found[2]
    return ""


def server() -> str:
    """Address of the W&B server, from the environment or what ``wandb login`` wrote."""
    if named := os.environ.get("WANDB_BASE_URL"):
        return named
    import configparser

    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(os.path.join(os.path.expanduser(folder), "settings"))
    except (OSError, ValueError, configparser.Error):
        return "https://api.wandb.ai"
    return parser.get("default", "base_url", fallback="https://api.wandb.ai")


def check_reachable() -> None:
    """Fail at once where no connection can be made, as on most compute nodes; W&B would try for long.

    Raises:
        OSError: the server does not answer within seconds.
    """
    address = urlsplit(server())
    host = address.hostname or ""
    if urllib.request.getproxies().get(address.scheme) and not urllib.request.proxy_bypass(host):
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()


def keep_key_out_of_logs() -> None:
    """Turn off W&B's debugging of itself: its log, which lies among the results, would show every request with the key."""
    for name in ("WANDB_DEBUG", "WANDB_CORE_DEBUG"):
        if os.environ.pop(name, None):
            warn(f"{name} is not followed, since W&B would write your key into a log among the results")


def require_server(what: str) -> None:
    """Make sure that something can be sent.

    Args:
        what: what is to be sent, for the message.

    Raises:
        UserError: no client, no key, or no connection; says what is missing.
    """
    needs("wandb")
    keep_key_out_of_logs()
    if not has_key():
        raise UserError(f"W&B: no key for {server()}, so no {what} can be sent; {KEY_HINT}")
    try:
        check_reachable()
    except OSError as error:
        raise UserError(f"W&B: {server()} cannot be reached from here ({in_one_line(error)})") from None
    _check_key()


PATIENCE = {
    f"WANDB__{what}_{limit}": value
    for what in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
    for limit, value in (("RETRY_MAX", "4"), ("RETRY_WAIT_MAX_SECONDS", "4"), ("TIMEOUT_SECONDS", "30"))
}
"""Settings of the client, which would try a server that does not answer for an hour; the next call tries again."""
ASK_TIMEOUT_S = 15.0
"""For the server's word on a key."""
ASK_AGAIN = 3
"""Times that a server with an error of its own, or with too much to do, is asked again."""
ASK_WAIT_S = 0.5
"""Before it is asked again; twice as long each time."""


def _check_key() -> None:
    """Ask the server whose the key is: a key that it does not know is told apart from a server that fails.

    The client would ask through a process of its own, which a server that does not answer can keep alive for minutes.

    Raises:
        UserError: it does not know the key, or does not answer.
    """
    import requests
    from requests.adapters import HTTPAdapter, Retry

    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    key = _key()
    if not key:  # an identity token, which the client itself turns into one
        return
    again = Retry(
        connect=0,
        read=0,
        status=ASK_AGAIN,
        backoff_factor=ASK_WAIT_S,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )
    question: dict[str, Any] = {"query": "query Viewer { viewer { entity } }", "variables": {}}
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=again))
            answer = session.post(
                f"{server()}/graphql", json=question, auth=("api", key), timeout=(CONNECT_TIMEOUT_S, ASK_TIMEOUT_S)
            )
            answer.raise_for_status()
            viewer = (answer.json().get("data") or {}).get("viewer")
    except (requests.RequestException, ValueError, AttributeError) as error:
        raise UserError(f"W&B: {explain(error)}") from None
    if not viewer:
        raise UserError(f"W&B: {explain('401')}")


def explain(error: Exception | str) -> str:
    """What is wrong with a server that did not do what it was asked, and what to do."""
    text = " ".join(str(error).split())
    if re.search(r"\b(401|403)\b|not logged in|[Uu]nauthorized|[Pp]ermission", text):
        return f"{server()} does not accept this key; {KEY_HINT}, with a key of that server"
    if re.search(r"\b5\d\d\b", text):
        return f"{server()} has an error of its own ({_short(text)}); try again later, nothing is lost"
    if re.search(r"did not respond|[Tt]imed? ?out|deadline", text):
        return f"{server()} does not answer; try again later, nothing is lost"
    if re.search(r"\b429\b", text):
        return f"{server()} takes no more requests for now (429); try again later, nothing is lost"
    return f"{server()} failed ({_short(text)}); try again later, nothing is lost"


def _short(text: str) -> str:
    return text.rpartition("while retrying: ")[2][:160]


_warned: set[str] = set()


def warn(message: str, error: Exception | None = None) -> None:
    """Say it once per process: a command may open many runs."""
    if message not in _warned:
        _warned.add(message)
        log.warning("W&B: %s%s", message, f" ({in_one_line(error)})" if error is not None else "")


def in_one_line(error: Exception) -> str:
    """An error of any kind, short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
