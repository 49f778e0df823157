//! Point 8: what policies can say.

use std::net::SocketAddr;

use anyhow::Result;

use super::{POOL_A, Story, bare, ip, named, of};
use crate::probe::{self, Knock};

/// 8: patterns.
pub fn wildcards(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        s.fetch("shop/web", family, "https://x.one.example.net/", of(POOL_A, family))?;
        s.denied("shop/web", "x.y.one.example.net", family.record(), &[], &["name-not-allowed", "not-allowed"])?;
        s.fetch("shop/web", family, "https://x.y.many.example.net/", of(POOL_A, family))?;
        // Deny over allow.
        s.emptied("shop/web", "old.many.example.net", family.record(), &["denied-by-policy"])?;
    }
    Ok(())
}

/// 8: a namespace's annotation.
pub fn annotation(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        let pod = "annotated/app";
        // The annotation names no pool: the built-in one goes out by the gateway pod's own way.
        let seen = probe::curl(&s.place(pod)?, family, "https://api.example.com/", &[]);
        let gateways = ["gw-a", "gw-b"].map(|g| s.outside(g, family));
        let one = seen.source().is_some_and(|ip| gateways.iter().flatten().any(|g| *g == ip));
        s.check(
            pod,
            &format!("curl {} https://api.example.com/", family.flag()),
            "an answer, the server sees a gateway's node",
            seen.text(),
            one,
        );
        s.denied(pod, "www.example.com", family.record(), &[], &["name-not-allowed", "not-allowed"])?;
        s.resolve(pod, family, "tcp.example.com")?;
        for (to, open) in
            [(bare(family, 40, 7001), true), (named(family, 12, 7000), true), (bare(family, 40, 7009), false)]
        {
            if open {
                let seen = probe::knock(&s.place(pod)?, to)?;
                s.check(pod, &format!("tcp {to}"), "connected", seen.text(), seen == Knock::Open);
            } else {
                s.dropped(pod, to, &["not-allowed"])?;
            }
        }
        s.resolve(pod, family, "udp.example.com")?;
        let to = named(family, 13, 7001);
        let seen = probe::datagram(&s.place(pod)?, to, b"hello", true)?;
        let text = if seen.is_some() { "echo" } else { "no answer" };
        s.check(pod, &format!("udp {to}"), "echo", text, seen.is_some());
    }
    Ok(())
}

/// 8: addresses without names, and a pod that no policy selects.
pub fn prefixes(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        let (pod, source) = ("shop/worker", of(POOL_A, family));
        // Inside the narrow prefix both rules' ports hold.
        let inner = ip(family.pick("192.0.2.200", "2001:db8:200::8200"));
        s.echo(pod, SocketAddr::new(inner, 5432), source)?;
        s.echo(pod, SocketAddr::new(inner, 7009), source)?;
        s.echo(pod, bare(family, 50, 7000), source)?;
        s.dropped(pod, bare(family, 50, 5432), &["not-allowed"])?;
        s.dropped(pod, bare(family, 50, 7010), &["not-allowed"])?;
        // `except` is a hole in its rule; a deny is a deny.
        s.dropped(pod, bare(family, 7, 7000), &["not-allowed", "no-binding"])?;
        s.dropped(pod, bare(family, 66, 7000), &["denied-by-policy"])?;
        s.echo(pod, bare(family, 66, 7001), source)?;
    }
    // No policy of the shop selects this pod, so it is not isolated.
    let family = s.any();
    let source = s.outside("shop/batch", family)?;
    s.fetch("shop/batch", family, "https://other.example.org/", source)?;
    Ok(())
}

/// 8: cluster policies.
pub fn tiers(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        let (pod, source) = ("shop/web", of(POOL_A, family));
        s.fetch(pod, family, "https://granted.example.com/", source)?;
        s.denied(pod, "blocked.example.com", family.record(), &[], &["denied-by-policy"])?;
        s.fetch(pod, family, "https://passed.example.com/", source)?;
        s.denied(pod, "tie.example.com", family.record(), &[], &["denied-by-policy"])?;
        // Baseline speaks for the namespace without a policy of its own, and not for the shop.
        s.denied(pod, "base.example.com", family.record(), &[], &["name-not-allowed", "not-allowed"])?;
        let seen = probe::curl(&s.place("managed/app")?, family, "https://base.example.com/", &[]);
        s.check(
            "managed/app",
            &format!("curl {} https://base.example.com/", family.flag()),
            "an answer",
            seen.text(),
            seen.exit == 0,
        );
        s.denied("managed/app", "api.example.com", family.record(), &[], &["name-not-allowed", "not-allowed"])?;
    }
    Ok(())
}

/// 8: the most that a namespace may allow.
pub fn ceiling(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        let pod = "capped/app";
        let seen = probe::curl(&s.place(pod)?, family, "https://api.example.com/", &[]);
        s.check(
            pod,
            &format!("curl {} https://api.example.com/", family.flag()),
            "an answer",
            seen.text(),
            seen.exit == 0,
        );
        s.dropped(pod, named(family, 10, 8443), &["above-ceiling", "not-allowed"])?;
        s.denied(pod, "api.example.net", family.record(), &[], &["above-ceiling"])?;
    }
    Ok(())
}
