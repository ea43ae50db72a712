"""The Hub's metadata API: repositories, their files and their revisions, as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlencode

from weightferry.testing.hub.access import find_commit
from weightferry.testing.hub.commits import Commit, Entry
from weightferry.testing.hub.messages import ErrorResponse, Request, Response, error_response, json_response
from weightferry.testing.hub.repositories import Repo

# A part of a listing with `expand`: the Hub scans files for malware, this server does not.
_UNSCANNED = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
_EXPANDED_PAGE = 50


def info(request: Request, repo: Repo, revision: str = "main") -> Response:
    """Describe a repository at a revision; with ``expand``, only the requested fields."""
    commit = find_commit(repo, revision)
    names = {"_id": hashlib.sha256(repo.page.encode()).hexdigest()[:24], "id": repo.id}
    fields = {
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
    requested = request.query.get("expand")
    if requested is not None:
        fields = {name: value for name, value in fields.items() if name in requested}
    elif repo.type == "model":
        names["modelId"] = repo.id
    return json_response({**names, **fields})


def _sibling(entry: Entry, *, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        sibling |= {"blobId": entry.oid, "size": entry.blob.size}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.blob.size, "pointerSize": entry.pointer_size}
    return sibling


def tree(request: Request, repo: Repo, revision: str, folder: str, page_size: int) -> Response:
    """List a folder, page by page; the header Link holds the URL of the next page."""
    commit = find_commit(repo, revision)
    if folder and folder not in commit.folders:
        raise ErrorResponse(
            error_response(404, f'{folder} does not exist on "{revision}"', "EntryNotFound", X_Repo_Commit=commit.sha)
        )
    expand = request.flag("expand")
    paths = _below(commit, folder, recursive=request.flag("recursive"))
    limit = _number(request, "limit") or (min(page_size, _EXPANDED_PAGE) if expand else page_size)
    after = _decode_cursor(request.query.get("cursor", [""])[-1])
    page = [path for path in paths if path > after][:limit]
    response = json_response([_row(commit, path, expand=expand) for path in page])
    if not page or page[-1] == paths[-1]:
        return response
    query = {name: values[-1] for name, values in request.query.items()} | {
        "limit": limit,
        "cursor": _encode_cursor(page[-1]),
    }
    url = f"http://{request.headers.get('Host', '')}{request.target.partition('?')[0]}"
    return response.with_header(Link=f'<{url}?{urlencode(query)}>; rel="next"')


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


def paths_info(request: Request, repo: Repo, revision: str) -> Response:
    """Describe the paths of a POST. As on the Hub, paths that do not exist are left out without an error."""
    commit = find_commit(repo, revision)
    try:
        paths, expand = _read_paths(request)
    except ValueError:
        raise ErrorResponse(error_response(400, "the request body must be a form or JSON with paths")) from None
    known = [path for path in paths if path in commit.files or path in commit.folders]
    return json_response([_row(commit, path, expand=expand) for path in known])


def _read_paths(request: Request) -> tuple[list[str], bool]:
    if "json" not in request.headers.get("Content-Type", ""):
        form = parse_qs(request.body.decode())
        return form.get("paths", []), form.get("expand", [""])[-1].lower() == "true"
    body = json.loads(request.body)
    if not isinstance(body, dict) or not isinstance(body.get("paths"), list):
        raise ValueError("no paths")
    return body["paths"], bool(body.get("expand", False))


def refs(request: Request, repo: Repo) -> Response:
    """List branches and tags."""
    branches = [_ref(name, f"refs/heads/{name}", head.commit().sha) for name, head in sorted(repo.branches.items())]
    tags = [_ref(name, f"refs/tags/{name}", commit.sha) for name, commit in sorted(repo.tags.items())]
    found: dict[str, list[dict[str, str]]] = {"branches": branches, "converts": [], "tags": tags}
    if request.flag("include_prs"):
        found["pullRequests"] = []
    return json_response(found)


def _ref(name: str, ref: str, sha: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": sha}


def _number(request: Request, name: str) -> int:
    text = request.query.get(name, [""])[-1]
    return int(text) if text.isdecimal() else 0


def _encode_cursor(path: str) -> str:
    # Opaque, as on the Hub, so that no client depends on the format.
    return base64.urlsafe_b64encode(path.encode()).decode()


def _decode_cursor(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor).decode()
    except ValueError:
        raise ErrorResponse(error_response(400, "Invalid cursor")) from None
