//! Points about the way of packets.

use std::net::SocketAddr;

use anyhow::Result;

use super::{POOL_A, POOL_B, Story, bare, ip, named, of, unseen};
use crate::probe;
use crate::world::METADATA;

/// What a drop may be called when nothing was ever learnt about an address.
const UNKNOWN: &[&str] = &["no-binding", "not-allowed"];

/// The IPv6 address of AWS's metadata service. It has no server here: the drop's reason tells.
const METADATA6: &str = "fd00:ec2::254";

/// 1: the first try works, and the source is the pool's from every node.
pub fn allowed(s: &mut Story<'_>) -> Result<()> {
    for pod in ["shop/web", "shop/worker", "shop/local"] {
        for family in s.families() {
            let mark = s.lab.mark();
            s.fetch(pod, family, "https://api.example.com/", of(POOL_A, family))?;
            // The answer waits for the ack of the pod's node: not even the first SYN may be lost, as TCP would hide it.
            let to = named(family, 10, 443).ip().to_string();
            let lost = s.lab.audit(&s.node(pod)?, &mark)?.into_iter().find(|r| r["destination"]["asked"]["ip"] == to);
            let seen = lost.as_ref().map_or("none".into(), |r| format!("{} dropped", r["reason"]));
            s.check(pod, &format!("packets to {to} that the node dropped"), "none", seen, lost.is_none());
        }
    }
    let family = s.any();
    s.fetch("shop/web", family, "https://alias.example.com/", of(POOL_A, family))?;
    Ok(())
}

/// 3: never resolved.
pub fn never_resolved(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        // The kernel's own counter: what user space counts of the records is another one.
        let counter = |s: &Story<'_>| -> Result<f64> {
            let of = |reason: &&str| {
                let labels = ["hook=\"pod_egress\"", "outcome=\"drop\"", &format!("reason=\"{reason}\"")];
                s.lab.metric(&s.node("shop/web")?, "tidegate_packets_total", &labels)
            };
            UNKNOWN.iter().map(of).sum()
        };
        let before = counter(s)?;
        s.dropped("shop/web", named(family, 14, 443), UNKNOWN)?;
        let counted =
            crate::lab::wait_for(std::time::Duration::from_secs(5), || counter(s).ok().filter(|now| *now > before));
        let seen = counted.map_or("it stays".to_owned(), |now| format!("{before} to {now}"));
        s.check("node-1", "the drop counter", "grows", seen, counted.is_some());
    }
    Ok(())
}

/// 4: resolved by another namespace only.
pub fn resolved_by_another(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        s.fetch("billing/pay", family, "https://bank.example.com/", of(POOL_B, family))?;
        s.dropped("shop/web", named(family, 15, 443), UNKNOWN)?;
        // One rule of the platform grants both names to both namespaces: only who resolved what tells them apart.
        s.resolve("shop/web", family, "granted.example.com")?;
        s.fetch("billing/pay", family, "https://lent.example.com/", of(POOL_B, family))?;
        s.dropped("shop/web", named(family, 30, 443), UNKNOWN)?;
    }
    Ok(())
}

/// 6: a port that no rule names.
pub fn other_port(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        s.resolve("shop/web", family, "api.example.com")?;
        s.dropped("shop/web", named(family, 10, 8443), &["not-allowed"])?;
    }
    Ok(())
}

/// 7: forwarded without inspection.
pub fn forwarded(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        s.resolve("shop/web", family, "tcp.example.com")?;
        s.echo("shop/web", named(family, 12, 7000), of(POOL_A, family))?;
        s.resolve("shop/worker", family, "udp.example.com")?;
        s.udp("shop/worker", named(family, 13, 7001), of(POOL_A, family))?;
    }
    Ok(())
}

/// 10: untouched and guarded pods.
pub fn untouched(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        for pod in ["untouched/app", "shop/batch", "guarded/app"] {
            let source = s.outside(pod, family)?;
            // A pod of a production namespace that no EgressPolicy selects is guarded by the platform's policies.
            s.fetch(pod, family, "https://other.example.org/", source)?;
        }
        s.emptied("guarded/app", "secret.example.org", family.record(), &["denied-by-policy"])?;
        s.dropped("guarded/app", bare(family, 66, 7000), &["denied-by-policy"])?;
        let source = s.outside("guarded/app", family)?;
        s.echo("guarded/app", bare(family, 67, 7000), source)?;
    }
    Ok(())
}

/// 11: inside the cluster, and from outside.
pub fn in_cluster(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        let own = s.pod_address("shop/web", family)?;
        s.fetch("shop/web", family, "http://backend.untouched:8080/", own)?;
        let other = s.pod_address("untouched/app", family)?;
        s.fetch("untouched/app", family, "http://web.shop:8080/", other)?;
        let to = SocketAddr::new(own, 8080);
        let seen = probe::curl(&s.place("internet")?, family, &format!("http://{to}/"), &[]);
        s.check("internet", &format!("curl http://{to}/"), "an answer", seen.text(), seen.exit == 0);
        let seen = probe::datagram(&s.place("internet")?, SocketAddr::new(own, 7001), b"hello", true)?;
        let text = if seen.is_some() { "echo" } else { "no answer" };
        s.check("internet", &format!("udp {own} port 7001"), "echo", text, seen.is_some());
    }
    let family = s.any();
    let seen = s.resolve("shop/web", family, "no-such.shop.svc.cluster.local")?;
    s.check("shop/web", "dig no-such.shop.svc.cluster.local", "NXDOMAIN", seen.text(), seen.status == "NXDOMAIN");
    let name = crate::serve::zone::reverse(s.pod_address("shop/web", family)?);
    let seen = probe::dig(&s.place("shop/web")?, &name, "PTR", &[]);
    s.check(
        "shop/web",
        &format!("dig {name} PTR"),
        "its service",
        seen.text(),
        seen.status == "NOERROR" && !seen.answers.is_empty(),
    );
    Ok(())
}

/// 13: sources that are not the pod's.
pub fn forged(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        s.resolve("shop/worker", family, "tcp.example.com")?;
        let watch = s.lab.watch(named(family, 12, 0).ip(), "")?;
        // An address of its own making, one of another pod of its node that may do the same, and one of a pod
        // elsewhere; the pod has root in its namespace.
        let own = family.pick("10.244.2.99", "fd00:10:244:2::99").to_owned();
        let ledger = s.pod_address("billing/ledger", family)?.to_string();
        let web = s.pod_address("shop/web", family)?.to_string();
        s.resolve("billing/ledger", family, "tcp.example.com")?;
        for forged in [own, ledger, web] {
            let length = family.pick(32, 128);
            // Without `nodad` an IPv6 address may still be tentative when curl binds it.
            let add = format!("ip addr replace {forged}/{length} dev lo {}", family.pick("", "nodad"));
            s.place("shop/worker")?.run(&["sh", "-c", &add]);
            let why = s.at_node("shop/worker", &["spoofed-source"], &*forged)?;
            let url = format!("http://{}/", named(family, 12, 7000));
            let seen = probe::curl(&s.place("shop/worker")?, family, &url, &["--interface", &forged, "-m", "1"]);
            let (good, text) = unseen(seen.exit == 28, &seen.text(), &watch)?;
            s.check_why("shop/worker", &format!("curl --interface {forged} {url}"), "no answer", text, good, &why);
            s.place("shop/worker")?.run(&["ip", "addr", "del", &format!("{forged}/{length}"), "dev", "lo"]);
        }
    }
    Ok(())
}

/// 13: what could carry anything.
pub fn carriers(s: &mut Story<'_>) -> Result<()> {
    let fragmented = vec![b'.'; s.lab.scenario().mtu as usize + 2500];
    for family in s.families() {
        for name in ["tcp.example.com", "udp.example.com"] {
            s.resolve("shop/worker", family, name)?;
        }
        let watch = s.lab.watch(named(family, 12, 0).ip(), "")?;
        // GRE by hand: the node must not let protocols out that nobody checks.
        let to = named(family, 12, 0).ip();
        let why = s.at_node("shop/worker", &["protocol"], to.to_string())?;
        let target = family.pick(format!("IP4-SENDTO:{to}:47"), format!("IP6-SENDTO:[{to}]:47"));
        let out = s.place("shop/worker")?.run(&["sh", "-c", &format!("printf tunnel | socat -u - '{target}'")]);
        let (good, text) = unseen(out.status == 0, &format!("sent, exit {}", out.status), &watch)?;
        s.check_why("shop/worker", &format!("GRE to {to}"), "dropped", text, good, &why);

        let node = s.node_address("shop/web", family)?;
        s.udp_dropped("shop/worker", SocketAddr::new(node, 8475), b"vxlan", &["tunnel-port"])?;
        s.udp_dropped("shop/worker", named(family, 13, 7001), &fragmented, &["fragment"])?;
    }
    Ok(())
}

/// 13: names that nobody sees, and the cloud's metadata.
pub fn encrypted_dns(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        s.resolve("shop/worker", family, "tcp.example.com")?;
        s.dropped("shop/worker", named(family, 12, 853), &["encrypted-dns"])?;
        // DNS over QUIC.
        s.udp_dropped("shop/worker", named(family, 12, 853), b"quic", &["encrypted-dns"])?;
        let to = SocketAddr::new(ip(family.pick(METADATA, METADATA6)), 80);
        s.dropped("shop/worker", to, &["metadata"])?;
    }
    Ok(())
}

/// Who holds the pair with this address.
fn holder(s: &Story<'_>, address: std::net::IpAddr) -> Option<String> {
    let status: serde_json::Value = serde_json::from_str(&s.lab.admin("gw-a", "/status").ok()?.1).ok()?;
    let address = address.to_string();
    let pairs = status["core"]["pairs"].as_array()?;
    let pair = pairs.iter().find(|p| p["pair"].as_str().is_some_and(|text| text.contains(&address)))?;
    pair["owner"].as_str().map(str::to_owned)
}

/// 14: each pair's owner serves its own scopes.
pub fn two_gateways(s: &mut Story<'_>) -> Result<()> {
    for (pod, name, pool, gateway, other) in [
        ("shop/web", "api.example.com", POOL_A, "gw-a", "gw-b"),
        ("billing/ledger", "bank.example.com", POOL_B, "gw-b", "gw-a"),
    ] {
        // The configured owner, unless it came so late or was silent for so long (a machine that is much too busy) that
        // the other one holds the pair: then that one must serve, and alone.
        let moved = holder(s, of(pool, s.any()));
        let (gateway, other) = if moved.as_deref() == Some(other) { (other, gateway) } else { (gateway, other) };
        for family in s.families() {
            let mark = s.lab.mark();
            s.fetch(pod, family, &format!("https://{name}/"), of(pool, family))?;
            let namespace = pod.split('/').next().unwrap_or_default();
            let about = |r: &serde_json::Value| r["namespace"] == namespace && r.to_string().contains(name);
            let wrote = s.lab.wait_audit(&[gateway], &mark, about).is_some();
            // A stand-in may have answered the question while the owner was silent; it carries nothing.
            let stray = s.lab.audit(other, &mark)?.iter().any(|r| about(r) && r["kind"] != "dns");
            let seen = if !wrote {
                "nothing"
            } else if stray {
                "both"
            } else {
                gateway
            };
            s.check(pod, &format!("who recorded {name}"), gateway, seen, wrote && !stray);
        }
    }
    Ok(())
}
