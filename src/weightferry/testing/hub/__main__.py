"""``python -m weightferry.testing.hub FOLDER``: serve a folder as the Hugging Face Hub would."""

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

    One line with the URL is printed once all files are hashed and requests are answered without delay.
    """
    parser = _parser()
    wanted = parser.parse_args(arguments)
    if not wanted.folder.is_dir():
        parser.error(f"no folder {wanted.folder}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    sha256s = dict(pair.rpartition("=")[::2] for pair in wanted.sha256)
    options = HubOptions(cdn_port=wanted.cdn_port, private_root=wanted.private, xet=wanted.xet, sha256s=sha256s)
    with HubServer(
        wanted.folder,
        host=wanted.host,
        port=wanted.port,
        tokens=wanted.token,
        bytes_per_second_per_connection=wanted.rate,
        options=options,
    ) as hub:
        hub.hash_all()
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        threading.Event().wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weightferry.testing.hub",
        description="Serve FOLDER/org/name (FOLDER/datasets/org/name, FOLDER/spaces/org/name) as the Hugging Face Hub "
        "would. GET /-/stats returns counters as JSON, POST /-/reset sets them to zero.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--cdn-port", type=int, default=0, help="port for LFS files (default: a free one)")
    parser.add_argument("--token", action="append", default=[], help="a valid token; may be given again")
    parser.add_argument("--private", action="store_true", help="repositories are seen only with a token")
    parser.add_argument("--rate", type=float, metavar="BYTES_PER_S", help="of each connection (default: no limit)")
    parser.add_argument("--xet", action="store_true", help="let files be read through Xet as well")
    parser.add_argument(
        "--sha256",
        action="append",
        default=[],
        metavar="PATH=HEX",
        help="the hash of a large file below FOLDER, which is then not read for it; may be given again",
    )
    return parser


if __name__ == "__main__":
    main()
