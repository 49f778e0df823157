//! A node that does not confirm what it was told, of names or of an edit: no answer before its time is over, and then
//! answers that do not need it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "load/support.rs"]
mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::probe::{Knock, dig, knock};
use tidegate_lab::{Lab, Place};

use self::support::{GATEWAYS, name, netstat, policy, scenario, up};

/// An agent that does nothing until this is dropped.
struct Frozen<'a>(&'a Lab, &'static str);

impl<'a> Frozen<'a> {
    fn new(lab: &'a Lab, node: &'static str) -> Self {
        lab.signal(node, Signal::SIGSTOP, None).unwrap();
        Self(lab, node)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // Without the process there is nothing to wake.
        let _ = self.0.signal(self.1, Signal::SIGCONT, None);
    }
}

fn fresh(n: u16) -> String {
    format!("f{n}.fresh.example.com")
}

fn address(n: u16, family: Family) -> SocketAddr {
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 51, 96, 0)) + u32::from(n));
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 9, 0, 0, 2, n);
    SocketAddr::new(family.pick(IpAddr::from(v4), v6.into()), 7000)
}

#[test]
fn a_node_that_does_not_confirm_gets_no_answer_until_it_steers() {
    let mut scenario = scenario();
    scenario.internet.prefixes.push("198.51.96.0/21".parse().unwrap());
    for n in 0..400 {
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (address(n, FAMILIES[0]).ip(), address(n, FAMILIES[1]).ip()) else {
            panic!()
        };
        scenario.internet.names.push(name(fresh(n), vec![v4], vec![v6]));
    }
    let (_one, lab) = up("stall", scenario);
    let rule = [json!({"matchPattern": "*.fresh.example.com"})];
    lab.edit_manifest("load.yaml", &policy("shop", Some("partner-a"), &rule, 7000)).unwrap();
    let web = lab.pod("shop/web");
    // Nobody asks for a name twice.
    let numbers = std::cell::Cell::new(0);
    let next = || numbers.replace(numbers.get() + 1);
    let resolves = |family: Family| {
        wait_for(Duration::from_secs(20), || {
            let n = next();
            (dig(&web, &fresh(n), family.record(), &[]).status == "NOERROR").then(|| address(n, family))
        })
        .unwrap()
    };
    for family in FAMILIES {
        // An edit reaches the gateway's DNS a moment before the node's kernel.
        let to = resolves(family);
        let open = wait_for(Duration::from_secs(20), || (knock(&web, to).unwrap() == Knock::Open).then_some(()));
        assert!(open.is_some(), "{to}");
    }

    let frozen = Frozen::new(&lab, "node-1");
    for family in FAMILIES {
        let (mark, started, n) = (lab.mark(), Instant::now(), next());
        let seen = dig(&web, &fresh(n), family.record(), &[]);
        assert_eq!(seen.status, "SERVFAIL", "{}", seen.text());
        assert!(started.elapsed() >= Duration::from_millis(200), "after {:?}", started.elapsed());
        let record = lab.wait_audit(&GATEWAYS, &mark, |r| r["name"] == fresh(n)).unwrap();
        assert_eq!(record["reason"], "barrier-timeout", "{record}");
        assert_eq!((&record["kind"], &record["verdict"]), (&json!("dns"), &json!("deny")), "{record}");
        assert_eq!((&record["namespace"], &record["pod"]), (&json!("shop"), &json!("web")), "{record}");
    }
    let timeouts = |g: &&str| lab.metric(g, "tidegate_decisions_total", &["reason=\"barrier-timeout\""]).unwrap();
    assert!(GATEWAYS.iter().map(timeouts).sum::<f64>() >= 2.0);

    // Its stream counts as dead after a while: by then its kernel steers what it does not know, and the gateway judges.
    for family in FAMILIES {
        let to = resolves(family);
        let again = web.within(|| netstat("TCPSynRetrans")).unwrap();
        assert_eq!(knock(&web, to).unwrap(), Knock::Open, "{to}: a name that only the gateway knows");
        assert_eq!(web.within(|| netstat("TCPSynRetrans")).unwrap(), again, "with its first packet");
        // An address that no name of the pod's has stays closed.
        let stranger = address(399, family);
        let mark = lab.mark();
        assert_eq!(knock(&web, stranger).unwrap(), Knock::Silent);
        let fits = |r: &serde_json::Value| {
            r["verdict"] == "deny" && r["destination"]["asked"]["ip"] == stranger.ip().to_string()
        };
        assert!(lab.wait_audit(&GATEWAYS, &mark, fits).is_some(), "{stranger}: the gateway refuses it");
    }

    drop(frozen);
    let back = wait_for(Duration::from_secs(20), || {
        let text = GATEWAYS.map(|g| lab.admin(g, "/status").unwrap().1);
        let connected = |t: &String| {
            serde_json::from_str::<serde_json::Value>(t).unwrap()["core"]["nodes"]["node-1"]["connected"] == true
        };
        text.iter().all(connected).then_some(())
    });
    assert!(back.is_some(), "the agent is back");
    for family in FAMILIES {
        assert_eq!(knock(&web, resolves(family)).unwrap(), Knock::Open);
    }
}

#[test]
fn a_pod_is_answered_by_an_edit_when_its_node_holds_it() {
    let (_one, lab) = up("edit", scenario());
    // Isolated by a policy of its own, beside worker, which may use the name.
    let own = policy("shop", Some("partner-a"), &[json!({"matchName": "nothing.example.net"})], 7000);
    lab.edit_manifest("batch.yaml", &own.replace("app: web", "app: batch")).unwrap();
    let (batch, worker) = (lab.pod("shop/batch"), lab.pod("shop/worker"));
    let status = |pod: &Place<'_>, family: Family| dig(pod, "tcp.example.com", family.record(), &["+tries=1"]).status;
    for family in FAMILIES {
        let to = SocketAddr::new(family.pick("198.51.100.12", "2001:db8:100::12").parse().unwrap(), 7000);
        // The names' facts are on the node: nothing but the pod's own group is missing.
        assert_eq!(status(&worker, family), "NOERROR");
        let denied = wait_for(Duration::from_secs(20), || (status(&batch, family) == "NXDOMAIN").then_some(()));
        assert!(denied.is_some(), "batch is isolated");
        let pods = lab.manifest("pods.yaml").unwrap();
        let moved = pods.replace("app: batch", "app: web");
        assert_ne!(pods, moved);

        let frozen = Frozen::new(&lab, "node-2");
        lab.edit_manifest("pods.yaml", &moved).unwrap();
        let first = wait_for(Duration::from_secs(10), || Some(status(&batch, family)).filter(|s| s != "NXDOMAIN"));
        assert_eq!(first.as_deref(), Some("SERVFAIL"), "{family:?}: the node still holds the old group");
        drop(frozen);
        let found = wait_for(Duration::from_secs(20), || (status(&batch, family) == "NOERROR").then_some(()));
        assert!(found.is_some(), "{family:?}: and then the new one");
        let again = batch.within(|| netstat("TCPSynRetrans")).unwrap();
        assert_eq!(knock(&batch, to).unwrap(), Knock::Open, "{to}");
        assert_eq!(batch.within(|| netstat("TCPSynRetrans")).unwrap(), again, "{to}: with its first packet");

        lab.edit_manifest("pods.yaml", &pods).unwrap();
    }
}

#[test]
fn two_names_that_share_an_address_are_reached_at_the_first_try() {
    let mut scenario = scenario();
    let (v4, v6) = (Ipv4Addr::new(198, 51, 100, 77), Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x77));
    for n in ["a.shared.example.com", "b.shared.example.com"] {
        scenario.internet.names.push(name(n.into(), vec![v4], vec![v6]));
    }
    let (_one, lab) = up("shared", scenario);
    // A rule for each: together on one address they are a class that no node was told of beforehand.
    let a = policy("shop", Some("partner-a"), &[json!({"matchName": "a.shared.example.com"})], 7000);
    let b =
        "  - name: more\n    toFQDNs: [{matchName: b.shared.example.com}]\n    toPorts: [{protocol: TCP, port: 443}]\n";
    lab.edit_manifest("load.yaml", &format!("{a}{b}")).unwrap();
    let web = lab.pod("shop/web");
    let resolved = |name: &str, family: Family| {
        let ask = || dig(&web, name, family.record(), &[]).status == "NOERROR";
        assert!(wait_for(Duration::from_secs(20), || ask().then_some(())).is_some(), "{name} {family:?}");
    };
    for family in FAMILIES {
        let to = SocketAddr::new(family.pick(v4.into(), v6.into()), 7000);
        for name in ["a.shared.example.com", "b.shared.example.com"] {
            resolved(name, family);
            let again = web.within(|| netstat("TCPSynRetrans")).unwrap();
            assert_eq!(knock(&web, to).unwrap(), Knock::Open, "{to} after {name}");
            assert_eq!(web.within(|| netstat("TCPSynRetrans")).unwrap(), again, "{to} after {name}, the first packet");
        }
    }
}
