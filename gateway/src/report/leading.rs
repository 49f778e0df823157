//! What the leader among the gateways does: statuses and events for the API server.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tidegate_kubernetes::taints::{self, Enforcing};
use tidegate_kubernetes::{Statuses, events, lease, status};
use tidegate_policy::denied::Denied;
use tidegate_policy::model::UnixSeconds;
use tokio::sync::{mpsc, watch};

use super::{Reported, Reports, Survey};
use crate::core::{NodeStatus, PairStatus};
use crate::kube::Kube;

/// The Lease of the leader, in the gateways' namespace.
const LEASE: &str = "tidegate-gateway";
/// Denials that wait for their events.
const EVENTS: usize = 256;
/// How long the end of this gateway waits until the Lease is given up.
const RELEASE: Duration = Duration::from_secs(3);

/// What the report thread tells the API server.
pub struct Outlet {
    statuses: watch::Sender<Option<Arc<Statuses>>>,
    events: mpsc::Sender<events::News>,
    /// Told which nodes enforce, where somebody wants to know.
    enforcing: Option<watch::Sender<Enforcing>>,
    last: Arc<Statuses>,
    said: Reports,
    /// The namespace whose audit was told of last, when there was no room for more.
    told: String,
}

/// The candidacy of this gateway.
pub struct Leading {
    stop: watch::Sender<bool>,
    leads: lease::Leads,
}

/// Stands for election, and writes what the outlet is given while this gateway leads.
/// It does neither while it is `stale`. Takes the startup taint off nodes if `taint`.
pub fn start(kube: &Kube, stale: watch::Receiver<bool>, taint: bool) -> (Outlet, Leading) {
    let connection = kube.connection();
    let (statuses, wanted) = watch::channel(None);
    let (events, denials) = mpsc::channel(EVENTS);
    let (leads_tx, leads) = watch::channel(None);
    let (stop, stopped) = watch::channel(false);
    kube.spawn(lease::stand(connection.clone(), LEASE, lease::Times::default(), leads_tx, stale, stopped));
    kube.spawn(status::write(connection.client.clone(), wanted, leads.clone()));
    kube.spawn(events::write(connection.clone(), denials, leads.clone()));
    let enforcing = taint.then(|| {
        let (enforcing, nodes) = watch::channel(Enforcing::default());
        kube.spawn(taints::clear(connection, nodes, leads.clone()));
        enforcing
    });
    let outlet =
        Outlet { statuses, events, enforcing, last: Arc::default(), said: Reports::default(), told: String::new() };
    (outlet, Leading { stop, leads })
}

impl Leading {
    /// Gives up the Lease, so that another gateway need not wait for its end.
    pub async fn release(mut self) {
        self.stop.send_replace(true);
        // The end of the channel is the news.
        let gone = async { while self.leads.changed().await.is_ok() {} };
        if tokio::time::timeout(RELEASE, gone).await.is_err() {
            tracing::warn!("the API server does not answer: the leader's Lease ends by itself");
        }
    }
}

impl Outlet {
    /// Wishes these statuses.
    pub fn wish(&mut self, reports: &Reports) {
        let wanted = |(object, new): (&_, &Arc<Reported>)| {
            let object: &tidegate_api::ObjectRef = object;
            // What did not change stays the same value.
            let same = self.said.get(object).is_some_and(|old| Arc::ptr_eq(old, new));
            status::wanted(
                &object.kind,
                &object.namespace,
                &object.name,
                &new.uid,
                || serde_json::to_value(&new.report).unwrap_or_default(),
                same.then_some(&self.last),
            )
        };
        let all: Arc<Statuses> = Arc::new(reports.iter().filter_map(wanted).collect());
        self.last = all.clone();
        self.said.clone_from(reports);
        self.statuses.send_replace(Some(all));
    }

    /// Says which nodes enforce: those whose kernels hold policy of this gateway.
    pub fn enforce<'a>(&self, nodes: impl Iterator<Item = (&'a String, &'a NodeStatus)>) {
        let Some(enforcing) = &self.enforcing else { return };
        let now: BTreeSet<String> = nodes.filter(|(_, s)| enforces(s)).map(|(name, _)| name.clone()).collect();
        enforcing.send_if_modified(|old| {
            let other = **old != now;
            if other {
                *old = Arc::new(now);
            }
            other
        });
    }

    /// Tells the people of namespaces whose audit ends. May be repeated: each is said once. Where there is no room for all,
    /// the next call goes on with the others.
    pub fn audits(&mut self, survey: &Survey, now: UnixSeconds) {
        let after = (Bound::Excluded(self.told.as_str()), Bound::Unbounded);
        let until = (Bound::Unbounded, Bound::Included(self.told.as_str()));
        let turn = survey.namespaces.range::<str, _>(after).chain(survey.namespaces.range::<str, _>(until));
        let mut told = None;
        for (name, place) in turn.filter(|(_, p)| p.annotations.audit && !p.exempt) {
            let news = place.annotations.audit_until.and_then(|until| ending(name, until, now));
            if let Some(news) = news {
                if self.events.try_send(news).is_err() {
                    break;
                }
                told = Some(name.clone());
            }
        }
        self.told = told.unwrap_or_else(|| std::mem::take(&mut self.told));
    }

    /// Tells what happened. May be repeated: each is said once, by whoever leads, or by the new owner of addresses that moved.
    pub fn happened(&self, news: &events::News) {
        let _ = self.events.try_send(news.clone());
    }

    /// Tells the pod's people of a denial, if there is room.
    pub fn tell(&self, denied: &Denied, allow_with: Option<&str>) {
        // Where nobody follows, records and statuses still say it.
        if let Some(event) = event(denied, allow_with) {
            let _ = self.events.try_send(event);
        }
    }
}

/// Whether all is well with a node, and its kernel holds policy.
fn enforces(node: &NodeStatus) -> bool {
    node.connected && node.held > 0 && node.error.is_none()
}

/// An audit that ends is told of from so many seconds before its end on, for so many seconds. The API server keeps an Event for an
/// hour by default: it would not know one of longer ago again that the next leader repeats.
const ENDS: [(events::AuditEnd, i64, i64); 3] =
    [(events::AuditEnd::Day, 86_400, 3600), (events::AuditEnd::Hour, 3600, 3600), (events::AuditEnd::Over, 0, 601)];

/// The events of pairs that have moved since, or before anybody looked: who takes over from the last one that ends may just have begun.
pub fn moves(before: &[PairStatus], now: &[PairStatus]) -> Vec<events::News> {
    let told = |p: &PairStatus| before.iter().any(|b| b.pair == p.pair && (b.epoch >= p.epoch || b.owner == p.owner));
    now.iter().filter(|p| !told(p)).filter_map(|p| Some(news(p, p.from.as_deref()?))).collect()
}

/// The event of a pair that has moved.
fn news(now: &PairStatus, from: &str) -> events::News {
    let (pool, addresses) = now.pair.split_once(' ').unwrap_or((&now.pair, ""));
    let note = format!(
        "{} moved from the gateway {from} to {}, epoch {}: new connections leave by that one, those by the other one end.",
        addresses.replace(' ', ", "),
        now.owner,
        now.epoch
    );
    // An address in the names of objects.
    let pair = addresses.split(' ').next().unwrap_or_default().replace(':', "x");
    let about = events::About::Moved { pool: pool.to_owned(), pair, epoch: now.epoch, own: now.held };
    events::News { namespace: events::CLUSTER.to_owned(), about, note }
}

/// The event of an audit that ends soon, or has ended.
fn ending(namespace: &str, until: UnixSeconds, now: UnixSeconds) -> Option<events::News> {
    let time = super::namespace::time(until);
    let left = until.0.saturating_sub(now.0);
    let (end, ..) = ENDS.into_iter().find(|(_, from, within)| (from - within + 1..=*from).contains(&left))?;
    let note = match end {
        events::AuditEnd::Day | events::AuditEnd::Hour => format!(
            "The audit of this namespace ends at {time}: what no rule allows is denied from then on. Its denials with the verdict Audited say what that is."
        ),
        events::AuditEnd::Over => {
            format!("The audit of this namespace ended at {time}: what no rule allows is denied.")
        }
    };
    let about = events::About::Audit { end, until: until.0 };
    Some(events::News { namespace: namespace.to_owned(), about, note })
}

/// The event of a denial.
fn event(d: &Denied, allow_with: Option<&str>) -> Option<events::News> {
    let who = d.who.as_ref()?;
    let to = match (&d.name, d.address) {
        (Some(name), Some(ip)) => format!("{name} ({ip})"),
        (Some(name), None) => name.to_string(),
        (None, Some(ip)) => ip.to_string(),
        (None, None) => return None,
    };
    let what = match (d.protocol, d.port) {
        (None, _) => format!("The DNS query for {to}"),
        (Some(p), Some(port)) => format!("{} port {port} of {to}", super::namespace::protocol(p)),
        (Some(p), None) => match super::namespace::protocol(p) {
            number if number.starts_with(|c: char| c.is_ascii_digit()) => format!("IP protocol {number} to {to}"),
            name => format!("{name} to {to}"),
        },
    };
    let mut note = format!("{what} was denied: {}.", d.reason);
    if let Some(text) = allow_with {
        note.push(' ');
        note += &one_line(text);
    }
    let what = d.name.as_deref().map_or_else(|| d.address.map(|a| a.to_string()).unwrap_or_default(), str::to_owned);
    let about = events::About::Denied { pod: who.pod.to_string(), what, code: d.reason.as_str().to_owned() };
    Some(events::News { namespace: who.namespace.to_string(), about, note })
}

/// A suggestion in one line, as people see it in `kubectl describe`.
fn one_line(text: &str) -> String {
    let mut said: Vec<&str> = Vec::new();
    let mut rule: Vec<&str> = Vec::new();
    for line in text.lines() {
        match line.strip_prefix('#') {
            Some(comment) => said.push(comment.trim()),
            None => rule.push(line.split(" #").next().unwrap_or(line).trim_start_matches("- ").trim()),
        }
    }
    let mut out = String::new();
    if !rule.is_empty() {
        out = format!("This rule of an EgressPolicy would allow it: {{{}}}", rule.join(", "));
    }
    for s in said {
        if !out.is_empty() {
            out += if out.ends_with(':') { " " } else { ". " };
        }
        out += s;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_policy::Reason;
    use tidegate_policy::event::Who;
    use tidegate_policy::model::{Namespace, Objects, Touched};

    #[test]
    fn a_node_enforces_when_it_is_connected_and_holds_all_of_a_compile() {
        let good = NodeStatus { connected: true, sent: 2, applied: 2, error: None, held: 1 };
        assert!(enforces(&good));
        let bad = [
            NodeStatus { connected: false, ..good.clone() },
            NodeStatus { held: 0, ..good.clone() },
            NodeStatus { error: Some("no room".into()), ..good.clone() },
        ];
        assert!(!bad.iter().any(enforces));
    }

    #[test]
    fn an_event_reads_as_one_line() {
        let mut d = Denied {
            source: [10, 0, 0, 1].into(),
            who: Some(Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() })),
            name: Some("a.example".into()),
            address: Some([203, 0, 113, 9].into()),
            protocol: Some(6),
            port: Some(443),
            qtype: None,
            reason: Reason::SniMismatch,
            audit: false,
            rule: None,
            count: 1,
        };
        let rule = "# Ask\n- toFQDNs: [{matchName: a.example}]\n  toPorts: [{protocol: TCP, port: 80}]\n  sni: Unchecked   # plain";
        let e = event(&d, Some(rule)).unwrap();
        assert_eq!(
            e.note,
            "TCP port 443 of a.example (203.0.113.9) was denied: sni-mismatch. This rule of an EgressPolicy would allow it: \
             {toFQDNs: [{matchName: a.example}], toPorts: [{protocol: TCP, port: 80}], sni: Unchecked}. Ask"
        );
        (d.name, d.protocol, d.port) = (None, Some(47), None);
        assert_eq!(event(&d, None).unwrap().note, "IP protocol 47 to 203.0.113.9 was denied: sni-mismatch.");
        assert_eq!(one_line("# Say so:\n#   x: [1]\n# Ask"), "Say so: x: [1]. Ask");
        (d.name, d.address, d.protocol, d.port) = (Some("a.example".into()), None, None, None);
        let e = event(&d, Some("# A rule denies it")).unwrap();
        assert_eq!(e.note, "The DNS query for a.example was denied: sni-mismatch. A rule denies it");
        let about = events::About::Denied { pod: "web".into(), what: "a.example".into(), code: "sni-mismatch".into() };
        assert_eq!(e.about, about);
    }

    #[test]
    fn a_move_is_told_of_pairs_that_had_an_owner() {
        let pair = |pair: &str, owner: &str, epoch, from: Option<&str>| PairStatus {
            pair: pair.into(),
            owner: owner.into(),
            epoch,
            from: from.map(str::to_owned),
            held: false,
        };
        let before = [
            pair("a 192.0.2.1 2001:db8::1", "x", 1, Some("z")),
            pair("b 2001:db8::2", "x", 4, None),
            pair("c 192.0.2.3", "", 0, None),
        ];
        let now = [
            pair("a 192.0.2.1 2001:db8::1", "y", 2, Some("x")),
            pair("b 2001:db8::2", "x", 5, None),
            pair("c 192.0.2.3", "y", 1, None),
        ];
        let told = moves(&before, &now);
        assert_eq!((told.len(), moves(&now, &before), moves(&now, &now)), (1, vec![], vec![]));
        // One that has just begun tells of what it saw itself.
        assert_eq!(moves(&[], &now), told);
        let said = &told[0];
        assert!(
            said.note.starts_with("192.0.2.1, 2001:db8::1 moved from the gateway x to y, epoch 2: "),
            "{}",
            said.note
        );
        let about = |own| events::About::Moved { pool: "a".into(), pair: "192.0.2.1".into(), epoch: 2, own };
        assert_eq!((said.namespace.as_str(), &said.about), ("default", &about(false)));
        let here = now.clone().map(|p| PairStatus { held: p.owner == "y", ..p });
        assert_eq!(moves(&before, &here)[0].about, about(true));
    }

    #[test]
    fn where_many_audits_end_each_has_its_turn() {
        let now = UnixSeconds(1_790_000_000);
        let mut objects = Objects::default();
        for n in 0..1000 {
            let ns = Namespace { audit: true, audit_until: Some(UnixSeconds(now.0 + 60)), ..Namespace::default() };
            objects.namespaces.insert(format!("n{n}"), ns);
        }
        let survey = Survey::new(&objects, &crate::report::records_of(&objects, &[]), Touched::ALL, None);
        let (events, mut told) = mpsc::channel(EVENTS);
        let statuses = watch::Sender::new(None);
        let mut outlet = Outlet {
            statuses,
            events,
            enforcing: None,
            last: Arc::default(),
            said: Reports::default(),
            told: String::new(),
        };
        let mut all = std::collections::BTreeSet::new();
        for round in 1..=4 {
            outlet.audits(&survey, now);
            all.extend(std::iter::from_fn(|| told.try_recv().ok()).map(|n| n.namespace));
            assert_eq!(all.len(), (round * EVENTS).min(1000));
        }
    }

    #[test]
    fn the_end_of_an_audit_is_told_around_it() {
        let end = UnixSeconds(1_790_000_000);
        let said = |before: i64| {
            let news = ending("shop", end, UnixSeconds(end.0 - before))?;
            let events::About::Audit { end: which, until } = news.about else { panic!() };
            assert!(until == end.0 && news.note.contains("2026-09-21T"), "{}", news.note);
            Some(which)
        };
        use events::AuditEnd::{Day, Hour, Over};
        for (before, which) in [
            (i64::MAX, None),
            (86_401, None),
            (86_400, Some(Day)),
            (82_801, Some(Day)),
            (82_800, None),
            (3601, None),
            (3600, Some(Hour)),
            (1, Some(Hour)),
            (0, Some(Over)),
            (-600, Some(Over)),
            (-601, None),
        ] {
            assert_eq!(said(before), which, "{before}");
        }
    }
}
