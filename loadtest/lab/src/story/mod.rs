//! The story in fourteen points: what must be seen to work, told by the demo and held by the tests.
//!
//! Every point stands alone: it resolves what it needs, and leaves policies as it found them.

mod names;
mod paths;
mod rules;
mod times;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::lab::Lab;
use crate::observe::{Mark, Watch};
use crate::place::Place;
use crate::probe::{self, Curl, Dig, Echo, Family, Knock};

/// One step, told.
#[derive(Clone, Debug)]
pub struct Line {
    /// The point of the story, from 1.
    pub point: u8,
    /// From where.
    pub from: String,
    /// What was tried.
    pub tried: String,
    /// What should happen.
    pub expected: String,
    /// What happened.
    pub seen: String,
    /// The reason code of the audit record, and who wrote it.
    pub reason: Option<String>,
    /// The egress address that the server saw.
    pub egress: Option<IpAddr>,
    /// Whether it is as expected.
    pub good: bool,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.good { "ok  " } else { "FAIL" };
        let reason = self.reason.as_deref().map(|r| format!("; {r}")).unwrap_or_default();
        let egress = self.egress.map(|e| format!("; egress {e}")).unwrap_or_default();
        write!(
            f,
            "  {mark} {:<14} {}: expected {}; seen {}{reason}{egress}",
            self.from, self.tried, self.expected, self.seen
        )
    }
}

/// A teller: tries things in a lab and keeps what it saw.
#[derive(Debug)]
pub struct Story<'a> {
    lab: &'a Lab,
    families: Vec<Family>,
    point: u8,
    print: bool,
    lines: Vec<Line>,
}

/// Tells one part of a point; parts of one point do not disturb each other.
type Tell = fn(&mut Story<'_>) -> Result<()>;

/// The points: what each is about, and how its parts are told.
const POINTS: [(&str, &[Tell]); 14] = [
    ("an allowed name works at the first try, from the pool's address, from every node", &[paths::allowed]),
    ("a name that is not allowed, whatever server is asked", &[names::denied]),
    ("an address never resolved is dropped in the node's kernel", &[paths::never_resolved]),
    ("an address that only another namespace resolved is dropped in the node's kernel", &[paths::resolved_by_another]),
    ("an allowed address with another SNI is reset by the gateway", &[names::other_sni]),
    ("a port that no rule names is dropped in the node's kernel", &[paths::other_port]),
    ("TCP without TLS and UDP are forwarded from the pool's address", &[paths::forwarded]),
    (
        "wildcards, annotations, selectors, prefixes, tiers, ceilings",
        &[rules::wildcards, rules::annotation, rules::prefixes, rules::tiers, rules::ceiling],
    ),
    ("audit mode, and the flip to enforce", &[times::audit]),
    ("untouched and guarded pods", &[paths::untouched]),
    ("in-cluster traffic, cluster names, connections from outside", &[paths::in_cluster]),
    ("expiry, revocation, and edits of something else", &[times::expiry_and_edits]),
    ("forged sources, tunnels, fragments, port 853, metadata", &[paths::forged, paths::carriers, paths::encrypted_dns]),
    ("two gateways, each with its own pair", &[paths::two_gateways]),
];

/// Tells the given points, all if there are none; gives the number of surprises.
///
/// # Errors
/// When a point could not even be tried.
pub fn play(lab: &Lab, points: &[u8], print: bool) -> Result<usize> {
    for point in points {
        ensure!((1..=POINTS.len()).contains(&usize::from(*point)), "the story has points 1 to {}", POINTS.len());
    }
    let mut surprises = 0;
    for (i, (about, parts)) in (1..).zip(POINTS) {
        if !points.is_empty() && !points.contains(&i) {
            continue;
        }
        if print {
            println!("\n{i}. {about}");
        }
        let mut story = Story { lab, families: lab.scenario().families.clone(), point: i, print, lines: Vec::new() };
        parts.iter().for_each(|tell| story.tell(*tell));
        surprises += story.lines.iter().filter(|l| !l.good).count();
    }
    Ok(surprises)
}

/// Points that do not disturb each other: what one of them sends, none of the others looks for.
const TOGETHER: [&[u8]; 3] = [&[1, 2], &[3, 4, 6, 13], &[5, 7, 8, 9, 10, 11, 14]];
/// The point that edits what both families share.
const AUDIT: u8 = 9;
/// The point whose facts take long to run out, while others go on, and whose edits others would notice.
const EXPIRY: u8 = 12;

/// Tells all points; many at the same time, so that they share their waiting. Gives the number of surprises.
pub fn whole(lab: &Lab) -> usize {
    let families = &lab.scenario().families;
    let all = |point, tell: Tell| (point, families.clone(), tell);
    std::thread::scope(|scope| {
        let expiry = scope.spawn(|| tell_together(lab, vec![all(EXPIRY, times::expiry)]));
        let mut surprises = 0;
        for wave in TOGETHER {
            let parts = wave.iter().flat_map(|point| {
                let each = match *point {
                    AUDIT => vec![families.clone()],
                    _ => families.iter().map(|f| vec![*f]).collect(),
                };
                let tells = POINTS[usize::from(*point) - 1].1;
                each.into_iter().flat_map(move |families| tells.iter().map(move |t| (*point, families.clone(), *t)))
            });
            surprises += tell_together(lab, parts.collect());
        }
        surprises += joined(expiry);
        surprises + tell_together(lab, vec![all(EXPIRY, times::edits)])
    })
}

/// Tells parts of points at the same time, of these families. Gives the number of surprises.
fn tell_together(lab: &Lab, parts: Vec<(u8, Vec<Family>, Tell)>) -> usize {
    let told: Vec<Story<'_>> = std::thread::scope(|scope| {
        let tellers: Vec<_> = parts
            .into_iter()
            .map(|(point, families, tell)| {
                scope.spawn(move || {
                    let mut story = Story { lab, families, point, print: false, lines: Vec::new() };
                    story.tell(tell);
                    story
                })
            })
            .collect();
        tellers.into_iter().map(joined).collect()
    });
    for story in &told {
        println!("\n{}. {}", story.point, POINTS[usize::from(story.point) - 1].0);
        story.lines.iter().for_each(|line| println!("{line}"));
    }
    told.iter().flat_map(|s| &s.lines).filter(|l| !l.good).count()
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
}

/// Tells one point without printing what went well, for tests.
///
/// # Errors
/// The surprises.
pub fn hold(lab: &Lab, point: u8) -> Result<()> {
    let surprises = play(lab, &[point], true)?;
    ensure!(surprises == 0, "point {point}: {surprises} surprises");
    Ok(())
}

/// Addresses of the demo's pools.
pub const POOL_A: [&str; 2] = ["203.0.113.10", "2001:db8::10"];
/// As [`POOL_A`].
pub const POOL_B: [&str; 2] = ["203.0.113.20", "2001:db8::20"];
/// Where names of the demo's internet lie: one number in both families.
const NAMED: [&str; 2] = ["198.51.100.", "2001:db8:100::"];
/// Where addresses without names lie.
const BARE: [&str; 2] = ["192.0.2.", "2001:db8:200::"];

/// Parses an address that this file wrote.
#[expect(clippy::expect_used, reason = "constants of the story")]
fn ip(text: &str) -> IpAddr {
    text.parse().expect("the story's addresses are valid")
}

/// The address of a named server of the demo's internet.
pub fn named(family: Family, n: u16, port: u16) -> SocketAddr {
    SocketAddr::new(ip(&format!("{}{n}", family.pick(NAMED[0], NAMED[1]))), port)
}

/// An address of the demo's internet that has no name.
pub fn bare(family: Family, n: u16, port: u16) -> SocketAddr {
    SocketAddr::new(ip(&format!("{}{n}", family.pick(BARE[0], BARE[1]))), port)
}

/// One address of a pair.
pub fn of(pair: [&str; 2], family: Family) -> IpAddr {
    ip(family.pick(pair[0], pair[1]))
}

/// Who wrote the record that explains a step, and what it says.
struct Why {
    at: Vec<String>,
    reasons: &'static [&'static str],
    needle: String,
    verdict: &'static str,
    mark: Mark,
}

impl Why {
    /// The record says what would have been denied.
    fn audited(self) -> Self {
        Self { verdict: "audit", ..self }
    }
}

/// Whether a step saw what it should and the router nothing of it, and what to print.
fn unseen(good: bool, seen: &str, watch: &Watch) -> Result<(bool, String)> {
    let passed = watch.packets()?;
    Ok(if passed == 0 { (good, seen.into()) } else { (false, format!("{seen}, {passed} packets passed the router")) })
}

impl Story<'_> {
    /// Tells; what could not even be tried is a surprise.
    fn tell(&mut self, tell: Tell) {
        if let Err(e) = tell(self) {
            self.check("lab", "go on", "the step can be tried", format!("{e:#}"), false);
        }
    }

    fn line(&mut self, line: Line) {
        if self.print {
            println!("{line}");
        }
        self.lines.push(line);
    }

    fn place(&self, name: &str) -> Result<Place<'_>> {
        self.lab.place(name)
    }

    /// The families that are told of: the cluster's.
    fn families(&self) -> Vec<Family> {
        self.families.clone()
    }

    /// The cluster's first family, for what is the same in both.
    fn any(&self) -> Family {
        self.families().first().copied().unwrap_or(Family::V4)
    }

    /// The node of a pod.
    fn node(&self, pod: &str) -> Result<String> {
        Ok(self.lab.scenario().pod(pod)?.node.clone())
    }

    /// A plain check.
    fn check(&mut self, from: &str, tried: &str, expected: &str, seen: impl Into<String>, good: bool) {
        let line = Line {
            point: self.point,
            from: from.into(),
            tried: tried.into(),
            expected: expected.into(),
            seen: seen.into(),
            reason: None,
            egress: None,
            good,
        };
        self.line(line);
    }

    /// Starts to look for the record that will explain a step of a pod: at its node.
    fn at_node(&self, pod: &str, reasons: &'static [&'static str], needle: impl Into<String>) -> Result<Why> {
        Ok(Why { at: vec![self.node(pod)?], reasons, needle: needle.into(), verdict: "deny", mark: self.lab.mark() })
    }

    /// As [`Story::at_node`], at any gateway.
    fn at_gateways(&self, reasons: &'static [&'static str], needle: impl Into<String>) -> Why {
        let at = self.lab.scenario().gateways.iter().map(|g| g.name.clone()).collect();
        Why { at, reasons, needle: needle.into(), verdict: "deny", mark: self.lab.mark() }
    }

    /// Finds the record of a pod: whether its reason is an expected one, and what to print.
    fn explain(&self, pod: &str, why: &Why) -> (bool, Option<String>) {
        let Ok(pod) = self.lab.scenario().pod(pod) else {
            return (false, None);
        };
        let at: Vec<&str> = why.at.iter().map(String::as_str).collect();
        // A forged source belongs to nobody: such a record names no pod.
        let whose = |r: &Value| r["namespace"].is_null() || r["namespace"] == *pod.namespace && r["pod"] == *pod.name;
        let about = |r: &Value| whose(r) && r.to_string().contains(&why.needle);
        let fits = |r: &Value| {
            about(r) && r["verdict"] == why.verdict && r["reason"].as_str().is_some_and(|x| why.reasons.contains(&x))
        };
        let writer = why.at.join(" or ");
        if let Some(record) = self.lab.wait_audit(&at, &why.mark, fits) {
            return (true, Some(format!("{} at {writer}", record["reason"].as_str().unwrap_or_default())));
        }
        let others: Vec<String> = at
            .iter()
            .flat_map(|n| self.lab.audit(n, &why.mark).unwrap_or_default())
            .filter(about)
            .map(|r| format!("{} {}", r["verdict"], r["reason"]))
            .collect();
        let wanted = format!("{} {}", why.verdict, why.reasons.join(" or "));
        (false, Some(format!("no record {wanted} at {writer} about {}, only {others:?}", why.needle)))
    }

    /// A check that an audit record must explain as well.
    fn check_why(&mut self, from: &str, tried: &str, expected: &str, seen: impl Into<String>, good: bool, why: &Why) {
        let (explained, reason) = if good { self.explain(from, why) } else { (false, None) };
        let line = Line {
            point: self.point,
            from: from.into(),
            tried: tried.into(),
            expected: expected.into(),
            seen: seen.into(),
            reason,
            egress: None,
            good: good && explained,
        };
        self.line(line);
    }

    /// Fetches a URL; the server must see this source.
    fn fetch(&mut self, from: &str, family: Family, url: &str, source: IpAddr) -> Result<Curl> {
        let seen = probe::curl(&self.place(from)?, family, url, &[]);
        let line = Line {
            point: self.point,
            from: from.into(),
            tried: format!("curl {} {url}", family.flag()),
            expected: format!("an answer, the server sees {source}"),
            seen: seen.text(),
            reason: None,
            egress: seen.source(),
            good: seen.exit == 0 && seen.source() == Some(source),
        };
        self.line(line);
        Ok(seen)
    }

    /// Asks a name and gives what came back, without a check: to have it bound.
    fn resolve(&self, from: &str, family: Family, name: &str) -> Result<Dig> {
        Ok(probe::dig(&self.place(from)?, name, family.record(), &[]))
    }

    /// A name must be denied: NXDOMAIN with an Extended DNS Error.
    fn denied(
        &mut self,
        from: &str,
        name: &str,
        kind: &str,
        more: &[&str],
        reasons: &'static [&'static str],
    ) -> Result<()> {
        let why = self.at_gateways(reasons, name);
        let seen = probe::dig(&self.place(from)?, name, kind, more);
        let tried = format!("dig {name} {kind} {}", more.join(" "));
        self.check_why(from, tried.trim(), "NXDOMAIN with EDE", seen.text(), seen.is_denied(), &why);
        Ok(())
    }

    /// A name must be denied by a rule although names below it may resolve: NODATA with an Extended DNS Error, as
    /// NXDOMAIN would speak for all below (RFC 8020).
    fn emptied(&mut self, from: &str, name: &str, kind: &str, reasons: &'static [&'static str]) -> Result<()> {
        let why = self.at_gateways(reasons, name);
        let seen = probe::dig(&self.place(from)?, name, kind, &[]);
        let good = seen.is_no_data() && seen.ede.is_some();
        self.check_why(from, &format!("dig {name} {kind}"), "NODATA with EDE", seen.text(), good, &why);
        Ok(())
    }

    /// A connection that the node's kernel must drop: the client gets no answer, and nothing passes the router.
    fn dropped(&mut self, from: &str, to: SocketAddr, reasons: &'static [&'static str]) -> Result<()> {
        let why = self.at_node(from, reasons, to.ip().to_string())?;
        let watch = self.lab.watch(to.ip(), &format!("tcp dport {} tcp flags & (syn | ack) == syn", to.port()))?;
        let seen = probe::knock(&self.place(from)?, to)?;
        let (good, seen) = unseen(seen == Knock::Silent, seen.text(), &watch)?;
        self.check_why(from, &format!("tcp {to}"), "no answer", seen, good, &why);
        Ok(())
    }

    /// A TCP echo through the gateway: the server must see this source.
    fn echo(&mut self, from: &str, to: SocketAddr, source: IpAddr) -> Result<()> {
        let tried = Echo::connect(&self.place(from)?, to).and_then(|mut echo| {
            echo.say("hello\n")?;
            Ok(echo.seen)
        });
        let saw = tried.as_ref().ok().and_then(probe::source);
        let line = Line {
            point: self.point,
            from: from.into(),
            tried: format!("tcp {to}"),
            expected: format!("echo, the server sees {source}"),
            seen: tried.as_ref().map_or_else(|e| format!("{e:#}"), |_| "echo".into()),
            reason: None,
            egress: saw,
            good: saw == Some(source),
        };
        self.line(line);
        Ok(())
    }

    /// A UDP echo through the gateway: the server must see this source.
    fn udp(&mut self, from: &str, to: SocketAddr, source: IpAddr) -> Result<()> {
        let seen = probe::datagram(&self.place(from)?, to, b"hello", true)?;
        let saw = seen.as_ref().and_then(probe::source);
        let line = Line {
            point: self.point,
            from: from.into(),
            tried: format!("udp {to}"),
            expected: format!("echo, the server sees {source}"),
            seen: if seen.is_some() { "echo".into() } else { "no answer".into() },
            reason: None,
            egress: saw,
            good: saw == Some(source),
        };
        self.line(line);
        Ok(())
    }

    /// A datagram that the node's kernel must drop.
    fn udp_dropped(
        &mut self,
        from: &str,
        to: SocketAddr,
        payload: &[u8],
        reasons: &'static [&'static str],
    ) -> Result<()> {
        let why = self.at_node(from, reasons, to.ip().to_string())?;
        let seen = probe::datagram(&self.place(from)?, to, payload, false)?;
        let tried = format!("udp {to}, {} octets", payload.len());
        let text = if seen.is_some() { "echo" } else { "no answer" };
        self.check_why(from, &tried, "no answer", text, seen.is_none(), &why);
        Ok(())
    }

    /// The address with which the world sees what a pod sends by its CNI's way: its node's, or its own if the CNI
    /// does not masquerade.
    fn outside(&self, pod: &str, family: Family) -> Result<IpAddr> {
        if self.lab.scenario().masquerade { self.node_address(pod, family) } else { self.pod_address(pod, family) }
    }

    /// The address of a pod's node.
    fn node_address(&self, pod: &str, family: Family) -> Result<IpAddr> {
        let node = self.lab.scenario().node(&self.lab.scenario().pod(pod)?.node)?;
        Ok(family.pick(node.ipv4.into(), node.ipv6.into()))
    }

    /// An address of a pod.
    fn pod_address(&self, pod: &str, family: Family) -> Result<IpAddr> {
        let pod = self.lab.scenario().pod(pod)?;
        let found = pod.addresses().into_iter().find(|ip| ip.is_ipv4() == (family == Family::V4));
        found.ok_or_else(|| anyhow::anyhow!("pod {} has no such address", pod.key()))
    }
}
