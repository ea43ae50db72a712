"""What differs between the releases of huggingface_hub: 0.x uses requests, 1.x httpx, 2.x httpx2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download, utils
from huggingface_hub.errors import HfHubHTTPError

_BASES = [kind.__module__.partition(".")[0] for kind in HfHubHTTPError.__mro__]
HTTP_LIBRARY = next(name for name in _BASES if name in ("requests", "httpx", "httpx2"))
HUB_VERSION = tuple(int(part) for part in huggingface_hub.__version__.split(".")[:2])


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make huggingface_hub use the Hub at `url`. It reads HF_ENDPOINT only at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # 0.x has a copy there
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def close_hub_session() -> None:
    """Close the connections of huggingface_hub; the next request opens new ones."""
    if HTTP_LIBRARY != "requests":
        huggingface_hub.close_session()
        return
    utils.get_session().close()  # each thread has its own
    utils._http.reset_sessions()  # type: ignore[attr-defined]


@contextmanager
def hub_reaches(host: str, at: str) -> Iterator[None]:
    """Make the session of huggingface_hub connect to `at` where a URL has `host`, as a program with a proxy would."""
    if HTTP_LIBRARY == "requests":
        set_factory, default = huggingface_hub.configure_http_backend, utils._http._default_backend_factory  # type: ignore[attr-defined]
    else:
        set_factory, default = huggingface_hub.set_client_factory, utils._http.default_client_factory
    set_factory(lambda: _detour(host, at))
    try:
        yield
    finally:
        set_factory(default)


def _detour(host: str, at: str) -> Any:
    library: Any = import_module(HTTP_LIBRARY)
    if HTTP_LIBRARY == "requests":

        class Adapter(import_module("requests.adapters").HTTPAdapter):  # type: ignore[misc]
            def send(self, request: Any, *args: Any, **options: Any) -> Any:
                request.url = request.url.replace(f"//{host}", f"//{at}")
                return super().send(request, *args, **options)

        session = library.Session()
        session.mount("http://", Adapter())
        return session

    class Transport(library.HTTPTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            if request.url.host == host:
                request.url = request.url.copy_with(host=at)
            return super().handle_request(request)

    return library.Client(transport=Transport(), follow_redirects=True, timeout=5)
