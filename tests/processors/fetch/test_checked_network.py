"""Public addresses and allowed networks."""

from ipaddress import ip_address

import pytest

from mmlora.errors import ConfigError
from mmlora.processors.fetch.checked_network import is_public, is_within, parse_networks

PUBLIC = ["8.8.8.8", "151.101.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "239.1.1.1",
    "240.0.0.1", "255.255.255.255", "192.0.2.1",
    "::1", "::", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001::1",
    "2001:db8::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "4000::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_global_addresses_are_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses_are_not_public_in_any_spelling(address):
    assert not is_public(ip_address(address))


def test_a_network_contains_its_addresses_in_every_spelling():
    networks = parse_networks(["10.0.0.0/8", "127.0.0.1", "fd00::/8"])
    within = ["10.255.0.1", "127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "fd12::1"]
    outside = ["11.0.0.1", "127.0.0.2", "::ffff:127.0.0.2", "fe80::1"]
    assert [is_within(ip_address(text), networks) for text in within + outside] == [True] * 5 + [False] * 4


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "localhost", ""])
def test_an_invalid_network_is_a_configuration_error(text):
    with pytest.raises(ConfigError, match="allowed_media_networks"):
        parse_networks([text])
