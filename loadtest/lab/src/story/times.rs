//! Points in which something changes.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{POOL_A, Story, named, of};
use crate::lab::wait_for;
use crate::place::Running;
use crate::probe::{self, Echo, Family, Knock};

/// How long a policy edit may take to hold.
const EDIT: Duration = Duration::from_secs(5);

/// 9: audit, and the flip to enforce.
pub fn audit(s: &mut Story<'_>) -> Result<()> {
    let pod = "audited/app";
    let [managed, allow] = [("tidegate.dev/managed", "true"), ("tidegate.dev/allow", "api.example.com")];
    for family in s.families() {
        let source = s.outside(pod, family)?;
        // What enforcement would steer goes its own way too.
        s.fetch(pod, family, "https://api.example.com/", source)?;
        let name = s.at_gateways(&["name-not-allowed", "not-allowed"], "other.example.org").audited();
        let packet = s
            .at_node(pod, &["name-not-allowed", "not-allowed", "no-binding"], named(family, 14, 0).ip().to_string())?
            .audited();
        let seen = s.fetch(pod, family, "https://other.example.org/", source)?;
        s.check_why(pod, "the record of the name", "what would be denied", seen.text(), seen.exit == 0, &name);
        s.check_why(pod, "the record of the packet", "what would be denied", seen.text(), seen.exit == 0, &packet);
    }
    let any = s.any();
    s.lab.annotate("audited", &[managed, allow, ("tidegate.dev/mode", "enforce")])?;
    let held = wait_for(EDIT, || s.resolve(pod, any, "other.example.org").ok().filter(probe::Dig::is_denied));
    let seen = held.as_ref().map_or("it stays in audit".into(), probe::Dig::text);
    s.check(pod, "the flip to enforce, dig other.example.org", "NXDOMAIN with EDE", seen, held.is_some());
    for family in s.families() {
        // The gateway's DNS knows the flip a moment before the pod's node does.
        let to = named(family, 18, 443);
        let node = wait_for(EDIT, || probe::knock(&s.place(pod).ok()?, to).ok().filter(|k| *k == Knock::Silent));
        s.check(
            pod,
            "the flip at its node",
            "no answer",
            if node.is_some() { "no answer" } else { "connected" },
            node.is_some(),
        );
        s.dropped(pod, to, &["no-binding", "not-allowed"])?;
    }
    s.lab.annotate("audited", &[managed, allow, ("tidegate.dev/mode", "audit")])?;
    let back = wait_for(EDIT, || s.resolve(pod, any, "other.example.org").ok().filter(|d| !d.answers.is_empty()));
    s.check(
        pod,
        "back to audit, dig other.example.org",
        "its address",
        if back.is_some() { "its address" } else { "denied" },
        back.is_some(),
    );
    Ok(())
}

/// 12: expiry, and edits while its facts run out.
pub fn expiry_and_edits(s: &mut Story<'_>) -> Result<()> {
    expires(s, edits)
}

/// 12 without its edits: what it does concerns nobody else.
pub fn expiry(s: &mut Story<'_>) -> Result<()> {
    expires(s, |_| Ok(()))
}

fn expires(s: &mut Story<'_>, meanwhile: impl FnOnce(&mut Story<'_>) -> Result<()>) -> Result<()> {
    let pod = "shop/web";
    let mut live = Vec::new();
    for family in s.families() {
        s.resolve(pod, family, "short.example.com")?;
        let forwarded = Echo::connect(&s.place(pod)?, named(family, 26, 7000))?;
        let url = "https://short.example.com/stream";
        let relayed = s.place(pod)?.spawn(&["curl", "-sSN", family.flag(), url])?;
        relayed.wait_output("tick", Duration::from_secs(5));
        live.push(Live { family, forwarded, relayed });
    }
    // A second of TTL and a second of grace, and the kernel's clock counts whole seconds.
    std::thread::sleep(Duration::from_millis(4200));
    for Live { family, forwarded, .. } in &mut live {
        s.dropped(pod, named(*family, 26, 7000), &["binding-expired"])?;
        let seen = forwarded.say("still here\n");
        let text = seen.as_ref().map_or_else(|e| format!("{e:#}"), |()| "echo".into());
        s.check(pod, &format!("the live connection to {}", named(*family, 26, 7000)), "echo", text, seen.is_ok());
        s.resolve(pod, *family, "short.example.com")?;
        s.echo(pod, named(*family, 26, 7000), of(POOL_A, *family))?;
    }
    // The relay's facts outlive the kernel's by the longest wait for a hello, which is 10 s.
    let over = Instant::now() + Duration::from_millis(12_500);
    meanwhile(s)?;
    std::thread::sleep(over.saturating_duration_since(Instant::now()));
    for Live { family, relayed, .. } in &live {
        let before = relayed.output().len();
        let lives = wait_for(Duration::from_secs(2), || (relayed.output().len() > before).then_some(())).is_some();
        let text = format!("the live connection to {}", named(*family, 26, 443));
        s.check(pod, &text, "it lives", if lives { "it lives" } else { "cut" }, lives);
    }
    Ok(())
}

/// A live connection of each kind to one name.
struct Live {
    family: Family,
    forwarded: Echo,
    relayed: Running,
}

/// 12: a revocation, and edits of something else.
pub fn edits(s: &mut Story<'_>) -> Result<()> {
    let pod = "shop/web";
    let mut live = Vec::new();
    for family in s.families() {
        s.resolve(pod, family, "revoked.example.com")?;
        let forwarded = Echo::connect(&s.place(pod)?, named(family, 27, 7000))?;
        let url = "https://revoked.example.com/stream";
        let relayed = s.place(pod)?.spawn(&["curl", "-sSN", family.flag(), url])?;
        relayed.wait_output("tick", Duration::from_secs(5));
        live.push(Live { family, forwarded, relayed });
    }
    let any = s.any();
    // An edit of something else: another policy of the same namespace, and one of another.
    let [shop, billing] = ["shop.yaml", "billing.yaml"].map(|file| s.lab.manifest(file));
    let (shop, billing) = (shop?, billing?);
    s.lab.edit_manifest("shop.yaml", &shop.replace("matchName: www.example.com", "matchName: www2.example.com"))?;
    s.lab.edit_manifest(
        "billing.yaml",
        &billing.replace("matchName: bank.example.com", "matchName: bank2.example.com"),
    )?;
    let held = wait_for(EDIT, || s.resolve(pod, any, "www.example.com").ok().filter(probe::Dig::is_denied));
    s.check(
        pod,
        "an edit of another rule, dig www.example.com",
        "NXDOMAIN with EDE",
        if held.is_some() { "NXDOMAIN" } else { "an answer" },
        held.is_some(),
    );
    for one in &mut live {
        let text = format!("live {} connections to revoked.example.com", one.family.record());
        let forwarded = one.forwarded.say("still here\n").is_ok();
        let before = one.relayed.output().len();
        let relayed =
            wait_for(Duration::from_secs(2), || (one.relayed.output().len() > before).then_some(())).is_some();
        let seen = format!(
            "forwarded {}, relayed {}",
            if forwarded { "lives" } else { "cut" },
            if relayed { "lives" } else { "cut" }
        );
        s.check(pod, &text, "both live", seen, forwarded && relayed);
    }
    s.lab.edit_manifest("shop.yaml", &shop)?;
    s.lab.edit_manifest("billing.yaml", &billing)?;

    let revocable = s.lab.manifest("shop-revocable.yaml")?;
    s.lab.remove_manifest("shop-revocable.yaml")?;
    for one in &mut live {
        one.forwarded.patience(Duration::from_millis(500))?;
        let forwarded = wait_for(EDIT, || one.forwarded.say("still here?\n").is_err().then_some(())).is_some();
        let relayed = one.relayed.wait(EDIT);
        let seen = format!("forwarded {}, relayed {relayed:?}", if forwarded { "cut" } else { "lives" });
        let text = format!("live {} connections after its rules are gone", one.family.record());
        // 56 and 92 are curl's words for a connection that was cut.
        s.check(pod, &text, "both cut", seen, forwarded && relayed.is_some_and(|exit| exit != 0));
    }
    s.lab.edit_manifest("shop-revocable.yaml", &revocable)?;
    let back = wait_for(EDIT, || s.resolve(pod, any, "revoked.example.com").ok().filter(|d| !d.answers.is_empty()));
    s.check(
        pod,
        "its rules are back, dig revoked.example.com",
        "its address",
        if back.is_some() { "its address" } else { "denied" },
        back.is_some(),
    );
    Ok(())
}
