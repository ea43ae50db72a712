"""The proxies and certificates that the environment variables name."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3.util import create_urllib3_context

from weightferry.errors import BadRequest, redact

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables of OpenSSL, requests and curl. Each names a file with certificates, or a folder of hashed files."""


def proxy_for(url: str) -> str:
    """Return the URL of the proxy for a request; empty if there is none.

    It is ``HTTP_PROXY`` or ``HTTPS_PROXY``, else ``ALL_PROXY``, unless ``NO_PROXY`` names the host.
    """
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def create_ssl_context(environ: Mapping[str, str] = os.environ) -> ssl.SSLContext:
    """Return a context that checks the certificates of servers.

    It trusts the certificates that `CERTIFICATE_VARIABLES` name. If none of them is set, it trusts those of the system,
    and those of ``certifi``, which slim images and some Python builds have instead.

    Raises
    ------
    BadRequest
        A variable names no certificates.
    """
    context = create_urllib3_context()
    named = [name for name in CERTIFICATE_VARIABLES if environ.get(name)]
    for name in named:
        _load(context, name, environ[name])
    if not named:
        context.load_default_certs()
        with contextlib.suppress(ImportError):
            context.load_verify_locations(import_module("certifi").where())
    return context


def _load(context: ssl.SSLContext, variable: str, value: str) -> None:
    folders = [path for path in value.split(os.pathsep) if Path(path).is_dir()]
    try:
        if folders:
            context.load_verify_locations(capath=os.pathsep.join(folders))
        else:
            context.load_verify_locations(cafile=value)
    except OSError as error:  # ssl.SSLError is one
        raise BadRequest(
            redact(f"{variable} is {value!r}, but no certificates can be read there ({error}). Correct it or unset it")
        ) from error
