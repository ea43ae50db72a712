"""Signed URLs of files at the CDN and of Xet blocks."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlencode

from weightferry.testing.hub.messages import ErrorResponse, Request, Response


class SignedUrls:
    """Signs URLs and checks them; a signed URL needs no token and expires.

    Parameters
    ----------
    lifetime
        Seconds until a URL expires. On the Hub it is about an hour.
    """

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._secret = secrets.token_bytes(16)

    def query(self, path: str) -> str:
        """Return the query that signs a decoded path; clients encode paths in different ways."""
        expires = str(int(time.time() + self._lifetime))
        return urlencode({"Expires": expires, "Signature": self._signature(path, expires), "Key-Pair-Id": "TEST"})

    def check(self, request: Request) -> None:
        """Raise a 403 `ErrorResponse` unless the request has a valid, unexpired signature."""
        query = request.query
        expires, signature = query.get("Expires", ["0"])[-1], query.get("Signature", [""])[-1]
        expected = self._signature(request.path, expires)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise ErrorResponse(_denied("Access denied"))
        if int(expires) <= time.time():
            raise ErrorResponse(_denied("Request has expired"))

    def expire(self) -> None:
        """Invalidate all URLs signed so far."""
        self._secret = secrets.token_bytes(16)

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()


def _denied(message: str) -> Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>{message}</Message></Error>'
    return Response(403, {"Content-Type": "application/xml"}, body.encode())
