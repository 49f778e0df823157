//! Frames for the kernel.

use std::net::IpAddr;

use etherparse::{IpHeaders, IpNumber, PacketBuilder, PacketBuilderStep, TcpHeader};

fn ends(source: &str, destination: &str) -> PacketBuilderStep<IpHeaders> {
    let eth = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => eth.ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => eth.ipv6(s.octets(), d.octets(), 64),
        _ => panic!("two families"),
    }
}

fn header(port: u16, syn: bool) -> TcpHeader {
    let mut h = TcpHeader::new(40_000, port, 1, 1_000);
    h.syn = syn;
    h.ack = !syn;
    h
}

pub fn tcp(source: &str, destination: &str, port: u16, syn: bool) -> Vec<u8> {
    let mut out = Vec::new();
    ends(source, destination).tcp_header(header(port, syn)).write(&mut out, &[]).unwrap();
    out
}

pub fn tcp_with(source: &str, destination: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let builder = ends(source, destination).tcp_header(header(port, false));
    builder.write(&mut out, payload).unwrap();
    // The builder sets don't-fragment, which is what the tests set themselves.
    if out[12..14] == [8, 0] {
        out[20] = 0;
    }
    out
}

pub fn udp(source: &str, destination: &str, port: u16) -> Vec<u8> {
    udp_with(source, destination, port, b"payload")
}

pub fn udp_with(source: &str, destination: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    ends(source, destination).udp(40_000, port).write(&mut out, payload).unwrap();
    out
}

pub fn raw(source: &str, destination: &str, proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    ends(source, destination).write(&mut out, IpNumber(253), payload).unwrap();
    let at = if out[12..14] == [8, 0] { 14 + 9 } else { 14 + 6 };
    out[at] = proto;
    out
}

/// An ARP request.
pub fn arp(sender: &str, target: &str) -> Vec<u8> {
    let octets = |ip: &str| ip.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut out = vec![0xff; 6];
    out.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1]);
    out.extend(octets(sender));
    out.extend([0; 6]);
    out.extend(octets(target));
    out
}

/// A neighbour solicitation; `option` tells the asker's link-layer address.
pub fn solicitation(asker: &str, target: &str, option: bool) -> Vec<u8> {
    let t = target.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
    body.extend(t);
    if option {
        body.extend([1, 1, 2, 0, 0, 0, 0, 1]);
    }
    let group = format!("ff02::1:ff{:02x}:{:02x}{:02x}", t[13], t[14], t[15]);
    let mut out = raw(asker, &group, 58, &body);
    out[21] = 255;
    out
}
