"""`CheckedNetwork`: connections to allowed addresses only, against server-side request forgery (SSRF).

It resolves a host once, checks every address, and connects to a checked address, which defeats DNS rebinding. The host
name stays that of the request and of the certificate.
"""

import asyncio
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

import httpcore

from mmlora.errors import ConfigError, MediaError
from mmlora.utils.text import shorten

MAX_TRIED: Final = 4  # addresses of one host

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Oracle's and Azure's metadata services, which hand out credentials, have addresses that count as public.
_METADATA = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Network backend of httpcore that connects only to public addresses and allowed networks.

    Args:
        networks: allowed besides public addresses.
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
        """Connect to the first address of a host that accepts the connection.

        Raises:
            MediaError: the host has no address, or one that is not allowed.
            httpcore.NetworkError, httpcore.TimeoutException: no address accepts.
        """
        addresses = (await self._resolve(host, port))[:MAX_TRIED]
        each_s = timeout / len(addresses) if timeout is not None else None
        failure: Exception | None = None
        for address in addresses:
            try:
                stream = await self._backend.connect_tcp(str(address), port, each_s, local_address, socket_options)
            except (httpcore.NetworkError, httpcore.TimeoutException) as error:
                failure = error
                continue
            if _is_own_machine(stream) and not is_within(address, self._networks):
                await stream.aclose()
                raise _refusal(host)
            return stream
        assert failure is not None
        raise failure

    async def sleep(self, seconds: float) -> None:
        """Sleep, as httpcore asks for between retries."""
        await self._backend.sleep(seconds)

    async def _resolve(self, host: str, port: int) -> list[Address]:
        """Return all addresses of a host, each of them checked."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
        if not addresses:
            raise MediaError(f"the host {shorten(host)} of a media URL cannot be found")
        if not all(is_public(address) or is_within(address, self._networks) for address in addresses):
            raise _refusal(host)
        return addresses


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Parse networks such as `10.0.0.0/8`, `fd00::/8` or `127.0.0.1`.

    Raises:
        ConfigError: one is not a network.
    """
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"allowed_media_networks={list(texts)!r}: {error}") from None


def is_public(address: Address) -> bool:
    """Return whether an address is global: not loopback, link-local, private, multicast or a metadata service."""
    inner = _embedded_ipv4(address)
    if isinstance(inner, IPv6Address):
        return inner.is_global and inner in _GLOBAL_UNICAST
    return inner.is_global and not inner.is_multicast and not any(inner in network for network in _METADATA)


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    """Return whether one of the networks contains an address, or the IPv4 address embedded in it."""
    return any(candidate in network for candidate in (address, _embedded_ipv4(address)) for network in networks)


def _embedded_ipv4(address: Address) -> Address:
    """Return the IPv4 address that packets are routed to: IPv4-mapped, 6to4 and NAT64 addresses contain one."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_own_machine(stream: httpcore.AsyncNetworkStream) -> bool:
    """Return whether both ends are this machine: connections to its own public address bypass an outer firewall."""
    near, far = stream.get_extra_info("client_addr"), stream.get_extra_info("server_addr")
    return bool(near) and bool(far) and near[0] == far[0]


def _refusal(host: str) -> MediaError:
    """Name the host but not its addresses, so that clients cannot explore the internal network."""
    return MediaError(
        f"the host {shorten(host)} of a media URL has an address that is not allowed; allowed are public addresses and "
        "those of --allowed-media-networks"
    )
