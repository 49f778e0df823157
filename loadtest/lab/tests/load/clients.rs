//! Ordinary clients and a dead first address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use tidegate_lab::family::FAMILIES;
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{Knock, dig, knock};

use crate::support::{GATEWAYS, name, policy, scenario, up};

/// A Go client that fetches a URL over one family and says how long it took.
const GO: &str = r#"package main

import ("context"; "fmt"; "io"; "net"; "net/http"; "os"; "time")

func main() {
	dialer := net.Dialer{}
	dial := func(c context.Context, _, address string) (net.Conn, error) { return dialer.DialContext(c, os.Args[1], address) }
	client := http.Client{Transport: &http.Transport{DialContext: dial}, Timeout: 20 * time.Second}
	started := time.Now()
	answer, err := client.Get(os.Args[2])
	if err != nil { fmt.Fprintln(os.Stderr, err); os.Exit(1) }
	io.Copy(io.Discard, answer.Body)
	fmt.Println(time.Since(started).Seconds())
}
"#;

/// The same in Python, which tries addresses one after the other.
const PYTHON: &str = r#"
import socket, ssl, sys, time
family = socket.AF_INET if sys.argv[1] == "tcp4" else socket.AF_INET6
host = sys.argv[2].split("/")[2]
context = ssl.create_default_context()
started = time.time()
for info in socket.getaddrinfo(host, 443, family, socket.SOCK_STREAM):
    try:
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.settimeout(20)
        raw.connect(info[4])
        break
    except OSError:
        continue
with context.wrap_socket(raw, server_hostname=host) as s:
    s.sendall(("GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host).encode())
    assert b"200" in s.recv(65536)
print(time.time() - started)
"#;

/// The first address of an allowed name is dead: every client gets through in under a second, and the record says where.
#[test]
fn a_dead_first_address_costs_less_than_a_second() {
    let go = tempfile::tempdir().unwrap();
    std::fs::write(go.path().join("main.go"), GO).unwrap();
    let client = go.path().join("client");
    let built = std::process::Command::new("go")
        .args(["build", "-o"])
        .arg(&client)
        .arg("main.go")
        .current_dir(go.path())
        .env("CGO_ENABLED", "0")
        .env("GO111MODULE", "off")
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    let mut scenario = scenario();
    let v4 = |n| Ipv4Addr::new(198, 51, 100, n);
    let v6 = |n| Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, n);
    let names: Vec<String> = ["curl", "python", "go"].map(|c| format!("{c}.two.example.com")).into();
    for n in &names {
        scenario.internet.names.push(name(n.clone(), vec![v4(90), v4(91)], vec![v6(0x90), v6(0x91)]));
    }
    let (_one, lab) = up("dead", scenario);
    let router = lab.place("router").unwrap();
    let rules = format!(
        "table inet dead {{ chain dead {{ type filter hook forward priority 0; ip daddr {} drop; ip6 daddr {} drop; }}; }}",
        v4(90),
        v6(0x90)
    );
    tidegate_lab::netns::nft(router.netns(), &rules).unwrap();
    lab.edit_manifest(
        "load.yaml",
        &policy("shop", Some("partner-a"), &[json!({"matchPattern": "*.two.example.com"})], 443),
    )
    .unwrap();
    let web = lab.pod("shop/web");
    for n in &names {
        for family in FAMILIES {
            let known = wait_for(Duration::from_secs(10), || {
                (dig(&web, n, family.record(), &[]).answers.len() == 2).then_some(())
            });
            assert!(known.is_some(), "{n}");
        }
    }
    for family in FAMILIES {
        let dead: IpAddr = family.pick(v4(90).into(), v6(0x90).into());
        // The relay races over both families, whichever the client asked by.
        let live = [IpAddr::from(v4(91)), v6(0x91).into()].map(|ip| ip.to_string());
        assert_eq!(knock(&router, SocketAddr::new(dead, 443)).unwrap(), Knock::Open, "the router's own packets pass");
        let tcp = family.pick("tcp4", "tcp6");
        let urls: Vec<String> = names.iter().map(|n| format!("https://{n}/")).collect();
        let curl = ["curl", "-sS", "-m", "20", family.flag(), "-o", "/dev/null", "-w", "%{time_total}", &urls[0]];
        let python = ["python3", "-c", PYTHON, tcp, &urls[1]];
        let go = [client.to_str().unwrap(), tcp, &urls[2]];
        for (command, host) in [&curl[..], &python, &go].into_iter().zip(&names) {
            // Whichever address a client picks first, it must be quick; the dead one must have been among them.
            let mut dead_first = false;
            for _ in 0..12 {
                let mark = lab.mark();
                let out = web.run(command);
                assert_eq!(out.status, 0, "{host} {tcp}: {}", out.stderr);
                let took: f64 = out.stdout.trim().parse().unwrap();
                assert!(took < 1.0, "{host} {tcp}: {took} s");
                let fits = |r: &serde_json::Value| r["kind"] == "open" && r["sni"] == **host;
                let record = lab.wait_audit(&GATEWAYS, &mark, fits).unwrap();
                assert_eq!(record["verdict"], "allow", "{record}");
                let destination = &record["destination"];
                let actual = destination["actual"]["ip"].as_str().unwrap();
                assert!(live.iter().any(|ip| ip == actual), "{record}");
                if destination["asked"]["ip"] == dead.to_string() {
                    dead_first = true;
                    println!("{host} {tcp}: {took:.3} s by way of {dead}");
                    break;
                }
            }
            assert!(dead_first, "{host} {tcp}: nobody asked for the dead address");
        }
    }
}
