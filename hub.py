"""The Hugging Face hub: which names are folders here and which hub ids, getting files, and why the hub gave nothing."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from files import UserError, first_line, within

# What belongs to a model beside config and weights, and is copied along.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def local_path(name: str | Path) -> Path | None:
    """The path that a name is, `~` expanded, or None for a hub id, `owner/name` or `owner/name@revision`. What is there is a
    path; so is what no hub id looks like, and a name without revision in a folder that is there: a typo is not asked for at
    the hub."""
    text = os.path.expanduser(name)
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", text) and ".." not in text
    typo = "@" not in text and os.path.isdir(text.split("/")[0])
    return None if hub_id and not os.path.exists(text) and not typo else Path(text)


def fetch(name: str, patterns: Sequence[str], error: type[UserError], remedy: str, kind: str = "model") -> Path:
    """The folder in the hub's cache with a repository's files of these patterns. name: `owner/name` or
    `owner/name@revision`. Raises `error`, saying why there is nothing and, for what may lie here instead, the remedy."""
    repository, _, revision = name.partition("@")
    try:
        from huggingface_hub import snapshot_download

        # Not hf_hub_download: without a network it retries for 20 seconds and prints warnings before it gives up.
        at = revision or None
        return Path(snapshot_download(repository, repo_type=kind, revision=at, allow_patterns=list(patterns)))
    except Exception as e:  # the hub client raises its own, requests', httpx's and the system's errors
        what = f"{name}/{patterns[0]}" if kind == "dataset" else name
        raise error(f"{what}: the hub gave nothing ({why(e, repository, revision)}); {remedy}") from None


def why(error: BaseException, repository: str, revision: str) -> str:
    """Why a download failed, and what to do. The client wraps what the server said in errors that ask for a connection."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), 0)
    if "GatedRepoError" in kinds:
        return f"HTTP {status}, gated: accept its licence on https://huggingface.co/{repository}, then set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return f"HTTP {status}: it has no revision {revision!r}"
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set, and the cache lacks it: unset it, or copy it into the cache"
    told = {
        401: "no such repository, or a private one: check the name, set HF_TOKEN",
        403: "the token may not read it: ask for access, set another HF_TOKEN",
        404: "no such repository: check the name",
        429: "too many requests: wait some minutes, or set HF_TOKEN",
    }
    if status:
        return f"HTTP {status}, {told.get(status, 'the server failed: try later' if status >= 500 else first_line(error))}"
    if kinds & {"ConnectError", "TimeoutException", "ProxyError", "ConnectionError"}:
        return f"no connection ({type(chain[-1]).__name__}: {first_line(chain[-1])})"
    return f"{type(error).__name__}: {first_line(error)}"


def repository_of(path: Path) -> Path | None:
    """The folder of the hub's cache that holds a repository's commits, if the path lies in one of these."""
    return next((p.parent for p in [path, *path.parents] if p.name == "snapshots"), None)


def commit_of(folder: Path) -> str | None:
    """The commit of a folder of the hub's cache; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def again(path: Path) -> str:
    """How to get a damaged file whole: by a download only where it came from one."""
    repository = repository_of(path)
    return f"remove {repository}, and it is downloaded again" if repository else "copy or save it again"


def check_link(path: Path, error: type[UserError]) -> None:
    """Raises `error` for a link out of its folder: what is read would be copied. The hub's cache has links to its blobs."""
    if path.is_symlink() and not within(path, repository_of(path) or path.parent):
        raise error(f"{path}: is a link to a file elsewhere ({os.readlink(path)}); put the file itself there")
