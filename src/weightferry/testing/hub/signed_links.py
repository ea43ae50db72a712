"""Signed links of a Hub server: to files at its CDN, and to the blocks of Xet."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlencode

from weightferry.testing.hub.wire import Answer, RefusedError, Request


class SignedLinks:
    """Links that are valid for a time, for whoever holds them.

    Parameters
    ----------
    lifetime
        In seconds. The Hub's are valid for about an hour.
    """

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._secret = secrets.token_bytes(16)

    def query(self, path: str) -> str:
        """Sign a path (decoded: clients may quote it in their own way)."""
        expires = str(int(time.time() + self._lifetime))
        return urlencode({"Expires": expires, "Signature": self._signature(path, expires), "Key-Pair-Id": "TEST"})

    def check(self, request: Request) -> None:
        """Refuse, with 403, a request that has no valid signature (any more)."""
        query = request.query
        expires, signature = query.get("Expires", ["0"])[-1], query.get("Signature", [""])[-1]
        right = self._signature(request.path, expires)
        if not hmac.compare_digest(signature.encode(), right.encode()):
            raise RefusedError(_denied("Access denied"))
        if int(expires) <= time.time():
            raise RefusedError(_denied("Request has expired"))

    def expire(self) -> None:
        """Make all links invalid that were handed out so far."""
        self._secret = secrets.token_bytes(16)

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()


def _denied(message: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>{message}</Message></Error>'
    return Answer(403, {"Content-Type": "application/xml"}, body.encode())
