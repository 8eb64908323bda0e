"""`CheckedNetwork`: connections to checked addresses only.

A name is looked up once, every address that it has is checked, and the connection goes to one of these: a server of
names that answers otherwise the next time changes nothing. The name stays that of the request and of the certificate.
"""

import asyncio
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any, Final

import httpcore

from mmlora.errors import MediaError
from mmlora.processors.fetch.addresses import Address, Network, is_public, is_within

MAX_TRIED: Final = 4  # addresses of one name


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses, and to others that are allowed.

    Args:
        networks: that are allowed beside public addresses.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of a name that answers.

        Raises:
            MediaError: the name has no address, or one that is not allowed.
            httpcore.NetworkError, httpcore.TimeoutException: none answers.
        """
        addresses = (await self._look_up(host, port))[:MAX_TRIED]
        each_s = timeout / len(addresses) if timeout is not None else None
        failure: Exception | None = None
        for address in addresses:
            try:
                stream = await self._backend.connect_tcp(str(address), port, each_s, local_address, socket_options)
            except (httpcore.NetworkError, httpcore.TimeoutException) as error:
                failure = error
                continue
            if _leads_here(stream) and not is_within(address, self._networks):
                await stream.aclose()
                raise _refusal(host)
            return stream
        assert failure is not None
        raise failure

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._backend.sleep(seconds)

    async def _look_up(self, host: str, port: int) -> list[Address]:
        """Every address of a name, each of them checked."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
        if not addresses:
            raise MediaError(f"the host {host!r} of a media URL cannot be found")
        if not all(is_public(address) or is_within(address, self._networks) for address in addresses):
            raise _refusal(host)
        return addresses


def _leads_here(stream: httpcore.AsyncNetworkStream) -> bool:
    """Whether both ends are one machine: its own public address passes by the firewall that guards it outside."""
    near, far = stream.get_extra_info("client_addr"), stream.get_extra_info("server_addr")
    return bool(near) and bool(far) and near[0] == far[0]


def _refusal(host: str) -> MediaError:
    """Names the host and not what it resolves to: clients are not told about names of the inner network."""
    return MediaError(
        f"the host {host!r} of a media URL has an address that is not allowed; allowed are public addresses and those "
        "of --allowed-media-networks"
    )
