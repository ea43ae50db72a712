"""How one operation uses origins: over the network or not, with which token, and with which cache of the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weightferry.errors import BadRequest
from weightferry.origins.base import Origin
from weightferry.origins.hub_cache import HF_HUB_OFFLINE, HubCacheOrigin, is_offline, user_hub_cache
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings

_NO_NETWORK = "allow_network of FetchConfig is False"


@dataclass(frozen=True)
class OriginAccess:
    """How one operation uses origins. Each rank has its own; it is never sent to another rank.

    Attributes
    ----------
    network : bool
        False: no request goes to any origin.
    token : bool or str or None
        For the Hub, as in `weightferry.FetchConfig`.
    hub_cache_dir : Path or None
        The user's Hugging Face cache; None: ``HF_HUB_CACHE``.
    """

    network: bool = True
    token: bool | str | None = field(default=None, repr=False)
    hub_cache_dir: Path | None = None

    @property
    def offline_reason(self) -> str:
        """Why the Hub must not be asked; empty if it may be asked."""
        return _NO_NETWORK if not self.network else HF_HUB_OFFLINE if is_offline() else ""

    @property
    def user_cache(self) -> Path:
        """The Hugging Face cache whose files are copied instead of downloaded."""
        return self.hub_cache_dir or user_hub_cache()

    def create_origin(self, scheme: str, settings: Settings) -> Origin:
        """Create the origin for a URL scheme, like `origin_for`.

        Raises
        ------
        BadRequest
            The scheme needs the network, and requests are not allowed.
        """
        if scheme == "hf" and self.network and self.token is not None:
            from weightferry.origins.hub import HubOrigin

            return HubOrigin(settings, self.token)
        if self.network or scheme == "file":
            return origin_for(scheme, settings)
        if scheme == "hf":
            return HubCacheOrigin([self.user_cache], _NO_NETWORK)
        raise BadRequest(
            f"{_NO_NETWORK}, and files of a {scheme} source come over the network. Allow it, or put the file into "
            "collect_in beforehand"
        )


DEFAULT_ACCESS = OriginAccess()
"""Over the network, with the token of this rank."""
