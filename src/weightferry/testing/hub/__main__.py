"""``python -m weightferry.testing.hub FOLDER``: serve a folder as the Hugging Face Hub does."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from weightferry.testing.hub import HubOptions, HubServer


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a folder until SIGTERM or SIGINT, then exit with 0.

    It hashes all files first, so that no request waits for a hash, and then prints one line with the URL.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    sha256s = dict(pair.rpartition("=")[::2] for pair in options.sha256)
    hub_options = HubOptions(cdn_port=options.cdn_port, private_root=options.private, xet=options.xet, sha256s=sha256s)
    with HubServer(
        options.folder,
        host=options.host,
        port=options.port,
        tokens=options.token,
        bytes_per_second_per_connection=options.rate,
        options=hub_options,
    ) as hub:
        hub.hash_all()
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        threading.Event().wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weightferry.testing.hub",
        description="Serve FOLDER/org/name (FOLDER/datasets/org/name, FOLDER/spaces/org/name) as the Hugging Face Hub "
        "does. GET /-/stats returns counters as JSON, POST /-/reset sets them to zero.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port for the API (default: a free port)")
    parser.add_argument("--cdn-port", type=int, default=0, help="port for LFS files (default: a free port)")
    parser.add_argument("--token", action="append", default=[], help="a valid token; repeatable")
    parser.add_argument("--private", action="store_true", help="repositories are visible only with a token")
    parser.add_argument("--rate", type=float, metavar="BYTES_PER_S", help="rate of each connection (default: no limit)")
    parser.add_argument("--xet", action="store_true", help="serve files through Xet as well")
    parser.add_argument(
        "--sha256",
        action="append",
        default=[],
        metavar="PATH=HEX",
        help="SHA-256 of a large file below FOLDER, so that the server does not hash it; repeatable",
    )
    return parser


if __name__ == "__main__":
    main()
