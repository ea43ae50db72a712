"""Replace a cached file by a part of it, as a killed job leaves it; run it on the node.

keep_part.py CACHE SHA256 NUMBER OF
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

from weightferry.cache.partial import PartialFile, WrittenRange


def main() -> None:
    cache, sha256, number, of = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    (blob,) = cache.glob(f"hub/*/blobs/{sha256}")
    content = blob.read_bytes()
    start, stop = (len(content) * part // of for part in (number, number + 1))
    partial = PartialFile(cache / "partial" / blob.parents[1].name / sha256, len(content), sha256)
    partial.write(start, content[start:stop])
    partial.record(WrittenRange(start, stop, zlib.crc32(content[start:stop])))
    blob.unlink()


if __name__ == "__main__":
    main()
