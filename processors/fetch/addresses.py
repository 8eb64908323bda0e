"""Which addresses media may be fetched from: public ones, and those of networks that the operator allows."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from mmlora.errors import ConfigError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Clouds tell secrets of a machine at these, which count as public: Oracle's and Azure's metadata services.
_METADATA = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read networks such as `10.0.0.0/8`, `fd00::/8` or `127.0.0.1`.

    Raises:
        ConfigError: one is no network.
    """
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"allowed_media_networks={list(texts)!r}: {error}") from None


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet: not to a machine, a link, a private network or a group."""
    inner = _inner(address)
    if isinstance(inner, IPv6Address):
        return inner.is_global and inner in _GLOBAL_UNICAST
    return inner.is_global and not inner.is_multicast and not any(inner in network for network in _METADATA)


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    """Whether one of the networks holds an address, or the IPv4 address inside it."""
    return any(candidate in network for candidate in (address, _inner(address)) for network in networks)


def _inner(address: Address) -> Address:
    """The IPv4 address that packets to this one end at: mapped, 6to4 and NAT64 addresses hold one."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
