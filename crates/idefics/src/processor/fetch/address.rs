//! Which addresses belong to the public internet.
//!
//! Reference: the IANA special-purpose address registries (RFC 6890 and its updates).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether the address is one of a public host. Addresses that carry an IPv4 address inside (mapped, NAT64, 6to4,
/// Teredo) are judged as not public whatever they carry, except mapped ones, which are that IPv4 address.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => is_public_v4(v4),
            None => is_public_v6(v6),
        },
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let special = match address.octets() {
        // This network, private use, loopback; multicast, reserved, broadcast.
        [0 | 10 | 127 | 224..=255, ..] => true,
        // Carrier-grade NAT.
        [100, second, ..] => (64..=127).contains(&second),
        // Link-local, home of cloud metadata services.
        [169, second, ..] => second == 254,
        // Private use.
        [172, second, ..] => (16..=31).contains(&second),
        // Protocol assignments, documentation, 6to4 relays, private use.
        [192, second, third, _] => matches!((second, third), (0, 0 | 2) | (88, 99) | (168, _)),
        // Benchmarking, documentation.
        [198, second, third, _] => matches!((second, third), (18 | 19, _) | (51, 100)),
        // Documentation.
        [203, second, third, _] => (second, third) == (0, 113),
        _ => false,
    };
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    // Only 2000::/3 is handed out; of it, some blocks are special.
    let special = match address.segments() {
        // Protocol assignments (Teredo, benchmarking, ORCHID and others); documentation.
        [0x2001, second, ..] => second <= 0x01ff || second == 0x0db8,
        // 6to4.
        [0x2002, ..] => true,
        // Documentation.
        [0x3fff, second, ..] => second <= 0x0fff,
        _ => false,
    };
    (0x2000..0x4000).contains(&address.segments()[0]) && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_pass() {
        let public = [
            "1.1.1.1",
            "8.8.8.8",
            "93.184.216.34",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450:4001::1",
            "::ffff:8.8.8.8",
        ];
        let special = [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:2::1",
            "2001:10::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "5f00::1",
        ];
        for (addresses, expected) in [(&public[..], true), (&special[..], false)] {
            for address in addresses {
                assert_eq!(is_public(address.parse().unwrap()), expected, "{address}");
            }
        }
    }
}
