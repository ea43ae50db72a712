"""The Xet storage of `HubServer`, tested with plain HTTP; the contract suite reads it with `hf_xet`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.test_hub_server_http import RESOLVE, request
from weightferry.testing.hub import HubOptions, HubServer

CHUNK = 1 << 16
WEIGHTS = os.urandom(3 * CHUNK + 5)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(options=HubOptions(xet=True)) as server:
        server.add_repo("org/model", {"config.json": b"{}", "model.safetensors": WEIGHTS})
        yield server


def xet_headers(hub: HubServer) -> tuple[str, str]:
    """Return the Xet hash of the file, and the URL of its token."""
    headers = request(f"{hub.url}{RESOLVE}model.safetensors", "HEAD").headers
    route, _, rel = headers["Link"].partition(";")
    assert rel.strip() == 'rel="xet-auth"'
    return headers["X-Xet-Hash"], route.strip("<>")


def reconstruction(hub: HubServer, byte_range: str = "bytes=0-") -> Any:
    name, route = xet_headers(hub)
    token_info = json.loads(request(route).body)
    token = f"Bearer {token_info['accessToken']}"
    reply = request(f"{token_info['casUrl']}/v1/reconstructions/{name}", Authorization=token, Range=byte_range)
    return json.loads(reply.body) if reply.status == 200 else reply.status


def test_only_lfs_files_have_a_xet_hash(hub: HubServer) -> None:
    assert "X-Xet-Hash" not in request(f"{hub.url}{RESOLVE}config.json", "HEAD").headers
    assert len(xet_headers(hub)[0]) == 64


@pytest.mark.parametrize(("start", "stop"), [(0, len(WEIGHTS)), (70_000, 70_001), (CHUNK, 2 * CHUNK), (100_000, 10**9)])
def test_terms_and_blocks_make_the_range(hub: HubServer, start: int, stop: int) -> None:
    answer = reconstruction(hub, f"bytes={start}-{stop - 1}")
    content = b""
    for term in answer["terms"]:
        (block,) = answer["fetch_info"][term["hash"]]
        assert block["range"] == term["range"]
        reply = request(block["url"], Range="bytes={start}-{end}".format(**block["url_range"]))
        assert reply.status == 206
        chunks = unpack(reply.body)
        assert len(chunks) == term["range"]["end"] - term["range"]["start"]
        assert len(b"".join(chunks)) == term["unpacked_length"]
        content += b"".join(chunks)
    first = answer["offset_into_first_range"]
    assert content[first : first + stop - start] == WEIGHTS[start:stop]
    assert hub.content_bytes("model.safetensors") == len(content) + 8 * -(-len(content) // CHUNK)


def unpack(body: bytes) -> list[bytes]:
    chunks = []
    while body:
        version, stored, kind, size = body[0], body[1:4], body[4], int.from_bytes(body[5:8], "little")
        assert (version, kind, int.from_bytes(stored, "little")) == (0, 0, size)
        chunks.append(body[8 : 8 + size])
        body = body[8 + size :]
    return chunks


def test_a_range_beyond_the_end(hub: HubServer) -> None:
    assert reconstruction(hub, f"bytes={len(WEIGHTS)}-") == 416


def test_access_to_the_storage(hub: HubServer) -> None:
    name, route = xet_headers(hub)
    assert request(f"{hub.cdn_url}/v1/reconstructions/{name}").status == 401
    assert request(f"{hub.cdn_url}/v1/reconstructions/{name}", Authorization="Bearer other").status == 401
    assert request(f"{hub.cdn_url}/xet/{name}/0").status == 403
    hub.add_repo("org/model", {"model.safetensors": WEIGHTS}, gated=True, allowed_tokens=["hf_good"])
    assert request(route).status == 401
    assert request(route, Authorization="Bearer hf_good").status == 200


def test_block_urls_expire(hub: HubServer) -> None:
    answer = reconstruction(hub)
    ((block,),) = answer["fetch_info"].values()
    assert unpack(request(block["url"]).body)[0] == WEIGHTS[:CHUNK]
    hub.expire_links()
    assert request(block["url"]).status == 403


def test_unknown_paths_and_no_xet(hub: HubServer) -> None:
    assert request(f"{hub.cdn_url}/v2/reconstructions/{xet_headers(hub)[0]}").status == 404
    with HubServer() as without:
        without.add_repo("org/model", {"model.safetensors": WEIGHTS})
        assert request(f"{without.url}/api/models/org/model/xet-read-token/main").status == 404
        assert "X-Xet-Hash" not in request(f"{without.url}{RESOLVE}model.safetensors", "HEAD").headers
