"""The metadata API of the Hub, as JSON: repositories, their files, their revisions."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlencode

from weightferry.testing.hub.access import commit_of
from weightferry.testing.hub.commits import Commit, Entry
from weightferry.testing.hub.repos import Repo
from weightferry.testing.hub.wire import Answer, RefusedError, Request, error, json_answer

# What a listing with `expand` adds: the Hub scans files, this server does not.
_UNSCANNED = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
_EXPANDED_PAGE = 50


def info(request: Request, repo: Repo, revision: str = "main") -> Answer:
    """Describe a repository at a revision; with ``expand``, only by the fields that are asked for."""
    commit = commit_of(repo, revision)
    names = {"_id": hashlib.sha256(repo.page.encode()).hexdigest()[:24], "id": repo.id}
    facts = {
        "author": repo.id.partition("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": ["region:us"],
        "siblings": [_sibling(entry, blobs=request.flag("blobs")) for entry in commit.files.values()],
        "usedStorage": sum(entry.blob.size for entry in commit.files.values()),
    }
    wanted = request.query.get("expand")
    if wanted is not None:
        facts = {name: value for name, value in facts.items() if name in wanted}
    elif repo.type == "model":
        names["modelId"] = repo.id
    return json_answer({**names, **facts})


def _sibling(entry: Entry, *, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        sibling |= {"blobId": entry.oid, "size": entry.blob.size}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.blob.size, "pointerSize": entry.pointer_size}
    return sibling


def tree(request: Request, repo: Repo, revision: str, folder: str, page_size: int) -> Answer:
    """List a folder, page by page; the header Link leads on."""
    commit = commit_of(repo, revision)
    if folder and folder not in commit.folders:
        raise RefusedError(
            error(404, f'{folder} does not exist on "{revision}"', "EntryNotFound", X_Repo_Commit=commit.sha)
        )
    expand = request.flag("expand")
    paths = _below(commit, folder, recursive=request.flag("recursive"))
    limit = _number(request, "limit") or (min(page_size, _EXPANDED_PAGE) if expand else page_size)
    after = _unpack(request.query.get("cursor", [""])[-1])
    page = [path for path in paths if path > after][:limit]
    answer = json_answer([_row(commit, path, expand=expand) for path in page])
    if not page or page[-1] == paths[-1]:
        return answer
    query = {name: values[-1] for name, values in request.query.items()} | {"limit": limit, "cursor": _pack(page[-1])}
    url = f"http://{request.headers.get('Host', '')}{request.target.partition('?')[0]}"
    return answer.plus(Link=f'<{url}?{urlencode(query)}>; rel="next"')


def _below(commit: Commit, folder: str, *, recursive: bool) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    found = [path for path in (*commit.files, *commit.folders) if path.startswith(prefix)]
    return sorted(path for path in found if recursive or "/" not in path[len(prefix) :])


def _row(commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    entry = commit.files.get(path)
    if entry is None:
        row: dict[str, Any] = {"type": "directory", "oid": commit.folders[path], "size": 0, "path": path}
    else:
        row = {"type": "file", "oid": entry.oid, "size": entry.blob.size, "path": path}
        if entry.sha256:
            row["lfs"] = {"oid": entry.sha256, "size": entry.blob.size, "pointerSize": entry.pointer_size}
        if expand:
            row["securityFileStatus"] = _UNSCANNED
    if expand:
        row["lastCommit"] = {"id": commit.sha, "title": "Upload", "date": commit.date}
    return row


def paths_info(request: Request, repo: Repo, revision: str) -> Answer:
    """Describe the paths of a POST. As on the Hub, what does not exist is left out without a word."""
    commit = commit_of(repo, revision)
    try:
        paths, expand = _asked(request)
    except ValueError:
        raise RefusedError(error(400, "the body is neither a form nor JSON with paths")) from None
    known = [path for path in paths if path in commit.files or path in commit.folders]
    return json_answer([_row(commit, path, expand=expand) for path in known])


def _asked(request: Request) -> tuple[list[str], bool]:
    if "json" not in request.headers.get("Content-Type", ""):
        form = parse_qs(request.body.decode())
        return form.get("paths", []), form.get("expand", [""])[-1].lower() == "true"
    asked = json.loads(request.body)
    if not isinstance(asked, dict) or not isinstance(asked.get("paths"), list):
        raise ValueError("no paths")
    return asked["paths"], bool(asked.get("expand", False))


def refs(request: Request, repo: Repo) -> Answer:
    """List branches and tags."""
    branches = [_ref(name, f"refs/heads/{name}", head.commit().sha) for name, head in sorted(repo.branches.items())]
    tags = [_ref(name, f"refs/tags/{name}", commit.sha) for name, commit in sorted(repo.tags.items())]
    found: dict[str, list[dict[str, str]]] = {"branches": branches, "converts": [], "tags": tags}
    if request.flag("include_prs"):
        found["pullRequests"] = []
    return json_answer(found)


def _ref(name: str, ref: str, sha: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": sha}


def _number(request: Request, name: str) -> int:
    text = request.query.get(name, [""])[-1]
    return int(text) if text.isdecimal() else 0


def _pack(path: str) -> str:
    # Opaque, as on the Hub, so that nobody learns to make their own.
    return base64.urlsafe_b64encode(path.encode()).decode()


def _unpack(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor).decode()
    except ValueError:
        raise RefusedError(error(400, "Invalid cursor")) from None
