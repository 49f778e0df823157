//! Statuses by example: manifests in, what people read out.

use tidegate_api::index::{Feed, Index};
use tidegate_api::resource::{Condition, ConditionStatus, Isolation, NamespaceMode};
use tidegate_api::{Reader, Severity};
use tidegate_policy::event::{RuleRef, Who};
use tidegate_policy::model::{Settings, Touched};
use tidegate_policy::{Proto, Reason};

use super::rollout::Count;
use super::survey::NAMESPACE;
use super::*;
use crate::core::NodeStatus;

const NOW: UnixSeconds = UnixSeconds(1_790_000_000);

/// A cluster that is edited.
struct Cluster {
    folder: tempfile::TempDir,
    reader: Reader,
    reporter: Reporter,
    status: Status,
    table: Table,
    number: u64,
    last: Option<Snapshot>,
}

impl Cluster {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let reader = Reader::new(folder.path());
        let mut c = Self {
            reader,
            folder,
            reporter: Reporter::default(),
            status: Status::default(),
            table: Table::default(),
            number: 0,
            last: None,
        };
        c.edit(text);
        c
    }

    /// Writes everything anew, and compiles.
    fn edit(&mut self, text: &str) {
        std::fs::write(self.folder.path().join("all.yaml"), text).unwrap();
        let loaded = self.reader.reload();
        let records = records_of(&loaded.objects, &loaded.problems);
        self.compile(&loaded.objects, &records);
    }

    fn compile(&mut self, objects: &Objects, records: &super::survey::Records) {
        self.number += 1;
        let survey = Arc::new(Survey::new(objects, records, Touched::ALL, None));
        let last = self.last.as_ref().map(|l| l.world.clone());
        let world = Arc::new(World::compile(objects, NOW, last.as_deref().map(|w| (w, Touched::ALL))));
        self.last = Some(Snapshot { number: self.number, world, survey });
    }

    /// A connected node has acked up to this compile.
    fn acked(&mut self, node: &str, held: u64) {
        let status = NodeStatus { connected: true, held, ..NodeStatus::default() };
        self.status.nodes.insert(node.into(), status);
    }

    fn reports(&mut self) -> Reports {
        let snapshot = self.last.clone().unwrap();
        let beside = Beside { status: &self.status, denials: &self.table, names: &|_, _| Vec::new(), now: NOW };
        self.reporter.reports(&snapshot, &beside)
    }

    fn policy(&mut self, kind: &str, namespace: &str, name: &str) -> PolicyStatus {
        let object = ObjectRef { kind: kind.into(), namespace: namespace.into(), name: name.into() };
        match Arc::unwrap_or_clone(self.reports().remove(&object).expect("a report")).report {
            Report::Policy(p) => p,
            other => panic!("{other:?}"),
        }
    }

    fn namespace(&mut self, name: &str) -> Option<NamespaceEgressStatus> {
        let object = ObjectRef { kind: NAMESPACE_EGRESS.into(), namespace: name.into(), name: NAME.into() };
        match Arc::unwrap_or_clone(self.reports().remove(&object)?).report {
            Report::Namespace(n) => Some(*n),
            other => panic!("{other:?}"),
        }
    }

    fn pool(&mut self, name: &str) -> EgressPoolStatus {
        let object = ObjectRef { kind: POOL.into(), namespace: String::new(), name: name.into() };
        match Arc::unwrap_or_clone(self.reports().remove(&object).expect("a report")).report {
            Report::Pool(p) => p,
            other => panic!("{other:?}"),
        }
    }
}

fn pod(namespace: &str, name: &str, node: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: {node}}}\nstatus: {{phase: Running, podIP: {ip}, podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn namespace(name: &str, annotations: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, annotations: {{{annotations}}}}}\n")
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
    )
}

fn cluster_policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: tidegate.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

const CEILING: &str = "tier: Admin, priority: 1, subject: {namespaceSelector: {}}, \
    ceiling: {toFQDNs: [{matchPattern: '**.example.com'}], toPorts: [{protocol: TCP, port: 443}]}";
const STRIPE: &str = "podSelector: {}, egress: [{name: stripe, toFQDNs: [{matchName: api.stripe.com}], toPorts: [{protocol: TCP, port: 443}]}]";

fn shop() -> String {
    namespace("shop", "") + &pod("shop", "web", "n1", "10.1.0.1") + &pod("shop", "db", "n2", "10.1.0.2")
}

fn find<'a>(conditions: &'a [Condition], kind: &str) -> &'a Condition {
    conditions.iter().find(|c| c.kind == kind).expect("a condition")
}

/// Type, status, reason and message of a condition in one text.
fn text(conditions: &[Condition], kind: &str) -> String {
    let c = find(conditions, kind);
    format!("{:?} {}: {}", c.status, c.reason, c.message)
}

#[test]
fn programmed_counts_the_nodes_that_hold_the_edit() {
    let mut c = Cluster::new(&(shop() + &policy("pay", STRIPE)));
    let programmed = |c: &mut Cluster| {
        let s = c.policy(POLICY, "shop", "pay");
        let n = s.nodes.unwrap();
        (text(&s.conditions, "Programmed"), n.desired, n.programmed)
    };
    let no_agent = "; the agent of n1 is not connected; the agent of n2 is not connected";
    assert_eq!(programmed(&mut c), (format!("False NodesMissing: 0 of 2 nodes{no_agent}"), 2, 0));
    c.acked("n1", 1);
    c.acked("n2", 0);
    assert_eq!(programmed(&mut c).0, "False NodesMissing: 1 of 2 nodes; n2 has not confirmed it yet");
    c.acked("n2", 1);
    assert_eq!(programmed(&mut c), ("True Programmed: 2 of 2 nodes".into(), 2, 2));

    // An edit of something else asks nothing of the nodes that hold this policy.
    c.edit(&(shop() + &policy("pay", STRIPE) + &namespace("other", "")));
    assert_eq!(programmed(&mut c).0, "True Programmed: 2 of 2 nodes");
    // An edit of it does.
    c.edit(&(shop() + &policy("pay", &STRIPE.replace("443", "8443")) + &namespace("other", "")));
    assert_eq!(programmed(&mut c).2, 0);
    c.acked("n1", 3);
    c.acked("n2", 2);
    assert_eq!(programmed(&mut c).2, 1);
    c.acked("n2", 3);
    // A pod that comes to a node must be known there.
    let more = pod("shop", "web2", "n2", "10.1.0.3");
    c.edit(&(shop() + &more + &policy("pay", &STRIPE.replace("443", "8443"))));
    assert_eq!(programmed(&mut c).0, "False NodesMissing: 1 of 2 nodes; n2 has not confirmed it yet");
    c.acked("n2", 4);
    assert_eq!(programmed(&mut c).2, 2);
    // A node that says that it could not.
    let error = Some("map is full".to_owned());
    c.status.nodes.insert("n2".into(), NodeStatus { connected: true, held: 4, error, ..NodeStatus::default() });
    assert_eq!(programmed(&mut c).0, "False NodesMissing: 1 of 2 nodes; n2: map is full");
    // Of an agent that is away the kernel still holds it.
    c.status.nodes.insert("n2".into(), NodeStatus { held: 4, ..NodeStatus::default() });
    assert_eq!(programmed(&mut c).2, 2);
}

#[test]
fn what_is_written_badly_says_what_holds_instead() {
    let mut c = Cluster::new(&(shop() + &policy("pay", "podSelector: {}, egress: [{name: x}]")));
    let s = c.policy(POLICY, "shop", "pay");
    let accepted = text(&s.conditions, "Accepted");
    assert!(accepted.starts_with("False Missing: spec.egress[x]"), "{accepted}");
    assert!(accepted.ends_with("; nothing of it is in force"), "{accepted}");
    assert!(text(&s.conditions, "Programmed").starts_with("False NotAccepted: no node holds what is written now"));

    c.edit(&(shop() + &policy("pay", STRIPE)));
    c.acked("n1", 2);
    c.acked("n2", 2);
    let s = c.policy(POLICY, "shop", "pay");
    assert_eq!(text(&s.conditions, "Accepted"), "True Accepted: valid and in force");
    assert_eq!(text(&s.conditions, "Conflicted"), "False NoConflict: contradicts no other policy");

    c.edit(&(shop() + &policy("pay", "podSelector: {}, egress: [{name: x}]")));
    let s = c.policy(POLICY, "shop", "pay");
    assert!(text(&s.conditions, "Accepted").ends_with("; the last good version stays in force"));
    assert_eq!(
        text(&s.conditions, "Programmed"),
        "False NotAccepted: no node holds what is written now; the last good version is held by 2 of 2 nodes"
    );
    assert_eq!(s.nodes.unwrap().programmed, 0);
}

#[test]
fn a_bad_cluster_policy_of_which_no_good_version_is_known_says_what_is_strict_in_it() {
    let mut index = Index::new(Settings::default());
    let say = |index: &mut Index, subject: &str| {
        let object = format!(
            r#"{{"metadata": {{"name": "guard", "uid": "u", "generation": 1}}, "spec": {{"tier": "Admin", "priority": 1,
            "subject": {subject}, "ceiling": {{"permits": ["All"]}}}}}}"#
        );
        index.apply(Feed::ClusterEgressPolicies, &serde_json::from_str(&object).unwrap());
        let survey = Survey::new(index.objects(), index, Touched::ALL, None);
        let status = super::policy::status(&survey.cluster["guard"], false, &[], &Count::default());
        ["Accepted", "Programmed"].map(|kind| text(&status.conditions, kind))
    };
    let [accepted, programmed] = say(&mut index, r#"{"namespaceSelector": {}}"#);
    assert!(accepted.starts_with("False Invalid: spec.ceiling.permits[0]: "), "{accepted}");
    assert!(accepted.ends_with(
        "; no good version is known: what it denies is denied as far as it can be read, and its ceiling permits nothing"
    ));
    assert!(programmed.ends_with("; what holds instead is held by 0 of 0 nodes"), "{programmed}");
    let [accepted, _] = say(&mut index, "{}");
    assert!(
        accepted.contains("; no good version is known: whom it is for cannot be read: for every pod that"),
        "{accepted}"
    );
}

#[test]
fn generations_are_those_of_what_is_written() {
    let mut c = Cluster::new("");
    let loaded = Reader::new(c.folder.path()).reload();
    let mut records = records_of(&loaded.objects, &[]);
    let object = ObjectRef { kind: POLICY.into(), namespace: "shop".into(), name: "pay".into() };
    let note = super::survey::Note {
        severity: Severity::Error,
        code: tidegate_api::Code::UnsupportedField,
        path: "spec.egress[0].http".into(),
        message: "is not carried out".into(),
    };
    records.insert(
        object,
        super::survey::Record { uid: "u".into(), generation: Some(3), notes: vec![note], closed: false },
    );
    c.compile(&loaded.objects, &records);
    let s = c.policy(POLICY, "shop", "pay");
    assert!(s.conditions.iter().all(|c| c.observed_generation == Some(3)));
    assert_eq!(find(&s.conditions, "Accepted").reason, "UnsupportedField");
    assert!(s.conditions.iter().all(|c| c.last_transition_time.is_empty()));
}

#[test]
fn refused_and_clipped_items_name_who_refuses() {
    let spec = "podSelector: {}, egress: [\
        {name: in, toFQDNs: [{matchName: a.example.com}], toPorts: [{protocol: TCP, port: 443}]}, \
        {name: out, toFQDNs: [{matchName: api.stripe.com}], toPorts: [{protocol: TCP, port: 443}]}, \
        {name: part, toFQDNs: [{matchPattern: '**.com'}], toPorts: [{protocol: TCP, port: 443}]}]";
    let mut c = Cluster::new(&(shop() + &policy("pay", spec) + &cluster_policy("saas", CEILING)));
    let s = c.policy(POLICY, "shop", "pay");
    let got: Vec<_> = s.refused.iter().map(|r| (r.path.as_str(), r.reason.as_str(), r.by.as_deref())).collect();
    assert_eq!(
        got,
        [
            ("egress[out].toFQDNs[0]", "AboveCeiling", Some("saas")),
            ("egress[part].toFQDNs[0]", "Clipped", Some("saas")),
        ]
    );
    let accepted = text(&s.conditions, "Accepted");
    assert_eq!(find(&s.conditions, "Accepted").status, ConditionStatus::True);
    assert!(
        accepted.contains(
            "egress[out].toFQDNs[0]: it is above the ceiling of ClusterEgressPolicy saas (and 1 more, see refused)"
        ),
        "{accepted}"
    );
}

#[test]
fn conflicts_say_with_whom() {
    let deny = "tier: Admin, priority: 5, subject: {namespaceSelector: {}}, egress: [{name: r, action: Deny, toFQDNs: [{matchName: a.example}], toPorts: [{protocol: Any}]}]";
    let accept = deny.replace("Deny", "Accept").replace("{protocol: Any}", "{protocol: TCP, port: 443}");
    let mut c = Cluster::new(&(shop() + &cluster_policy("one", deny) + &cluster_policy("two", &accept)));
    let one = c.policy(CLUSTER_POLICY, "", "one");
    let said = text(&one.conditions, "Conflicted");
    assert!(said.starts_with("True EqualPriority: ClusterEgressPolicy two has the same tier and priority"), "{said}");

    let pool = |name: &str| {
        format!(
            "---\napiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {{name: {name}}}\nspec: {{allowedNamespaces: {{}}, addressSource: Static, static: {{addresses: [{{ipv4: 203.0.113.1{}}}]}}}}\n",
            name.len()
        )
    };
    let asks = |p: &str| format!("podSelector: {{}}, poolRef: {{name: {p}}}");
    c.edit(
        &(shop()
            + &pool("aa")
            + &pool("bbb")
            + &policy("first", &asks("aa"))
            + &policy("second", &asks("bbb"))
            + &policy("third", &asks("nowhere"))),
    );
    let y = c.policy(POLICY, "shop", "second");
    let said = text(&y.conditions, "Conflicted");
    assert!(said.starts_with("True PoolConflict: ") && said.contains("EgressPool aa, which holds"), "{said}");
    let z = c.policy(POLICY, "shop", "third");
    assert_eq!(
        (z.refused[0].reason.as_str(), z.refused[0].message.as_deref()),
        ("PoolUnknown", Some("there is no EgressPool nowhere"))
    );

    // Who holds the pair.
    let pair = |owner: &str| PairStatus {
        pair: "aa 203.0.113.12".into(),
        owner: owner.into(),
        epoch: 1,
        from: None,
        held: false,
    };
    assert_eq!(text(&c.pool("aa").conditions, "Programmed"), "False NoGateway: no gateway holds 203.0.113.12");
    c.status.pairs = vec![pair("gw-a")];
    assert_eq!(text(&c.pool("aa").conditions, "Programmed"), "True Programmed: held: 203.0.113.12 by gw-a");
    assert_eq!(text(&c.pool("bbb").conditions, "Programmed"), "True Unused: no namespace uses it now");
    let egress = c.namespace("shop").unwrap().egress;
    assert_eq!((egress[0].pool.as_str(), egress[0].ipv4.as_deref()), ("aa", Some("203.0.113.12")));
}

#[test]
fn a_policy_that_no_node_needs_says_why() {
    for (text_of, kind, namespace_of, name, programmed, accepted) in [
        (
            namespace("shop", "") + &policy("pay", STRIPE),
            POLICY,
            "shop",
            "pay",
            "True NoPods: it selects no pod now: no node needs it",
            "True Accepted: valid and in force",
        ),
        (
            shop() + &policy("pay", &format!("{STRIPE}, mode: Staged")),
            POLICY,
            "shop",
            "pay",
            "False Staged: no node is told of it",
            "True Staged: valid; mode Staged: it has no effect",
        ),
        (
            shop() + &cluster_policy("c", &format!("{CEILING}, mode: Staged")),
            CLUSTER_POLICY,
            "",
            "c",
            "False Staged: no node is told of it",
            "True Staged: valid; mode Staged: it has no effect",
        ),
    ] {
        let s = Cluster::new(&text_of).policy(kind, namespace_of, name);
        assert_eq!(text(&s.conditions, "Programmed"), programmed);
        assert_eq!(text(&s.conditions, "Accepted"), accepted);
        assert_eq!(s.nodes.unwrap().desired, 0);
    }
}

#[test]
fn isolation_and_its_causes() {
    let selects =
        |app: &str| STRIPE.replace("podSelector: {}", &format!("podSelector: {{matchLabels: {{app: {app}}}}}"));
    let both = pod("shop", "web", "n1", "10.1.0.1") + &pod("shop", "db", "n2", "10.1.0.2");
    for (text_of, isolation, causes) in [
        (shop(), None, vec![]),
        (namespace("shop", ""), None, vec![]),
        (shop() + &policy("pay", STRIPE), Some(Isolation::Isolated), vec!["EgressPolicy pay"]),
        (shop() + &policy("pay", &selects("web")), Some(Isolation::Partial), vec!["EgressPolicy pay"]),
        (namespace("shop", "") + &policy("pay", &selects("web")), Some(Isolation::Partial), vec!["EgressPolicy pay"]),
        (shop() + &policy("pay", &format!("{STRIPE}, mode: Staged")), None, vec![]),
        (shop() + &cluster_policy("saas", CEILING), Some(Isolation::Guarded), vec!["ClusterEgressPolicy saas"]),
        (
            namespace("shop", "") + &cluster_policy("saas", CEILING),
            Some(Isolation::Guarded),
            vec!["ClusterEgressPolicy saas"],
        ),
        (
            namespace("shop", "tidegate.dev/managed: 'true', tidegate.dev/allow: a.example.com"),
            Some(Isolation::Isolated),
            vec!["Annotation tidegate.dev/allow", "Annotation tidegate.dev/managed"],
        ),
        (
            namespace("shop", "tidegate.dev/allow: a.example.com") + &both,
            Some(Isolation::Isolated),
            vec!["Annotation tidegate.dev/allow"],
        ),
    ] {
        let got = Cluster::new(&text_of).namespace("shop");
        assert_eq!(got.as_ref().map(|n| n.isolation.unwrap()), isolation, "{text_of}");
        let got: Vec<String> = got.iter().flat_map(|n| &n.because).map(|c| format!("{} {}", c.kind, c.name)).collect();
        assert_eq!(got, causes, "{text_of}");
    }
}

#[test]
fn a_namespace_says_its_mode_its_bad_items_and_what_is_not_managed() {
    let annotations = "tidegate.dev/allow: 'a.example.com, b c, x.example.com:0', tidegate.dev/mode: audit, tidegate.dev/audit-until: '2099-01-31T00:00:00Z'";
    let host = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: proxy, namespace: shop}\nspec: {nodeName: n1, hostNetwork: true}\nstatus: {podIP: 192.168.0.1}\n";
    let mut c = Cluster::new(&(namespace("shop", annotations) + &pod("shop", "web", "n1", "10.1.0.1") + host));
    let n = c.namespace("shop").unwrap();
    assert_eq!((n.mode, n.audit_until_time.as_deref()), (Some(NamespaceMode::Audit), Some("2099-01-31T00:00:00Z")));
    let paths: Vec<_> = n.refused.iter().map(|r| (r.path.as_str(), r.reason.as_str())).collect();
    assert_eq!(paths, [("tidegate.dev/allow[1]", "BadItem"), ("tidegate.dev/allow[2]", "BadItem")]);
    let said = text(&n.conditions, "Accepted");
    assert!(said.starts_with("False PartlyRefused: tidegate.dev/allow[1]: `b c`: "), "{said}");
    let host = n.host_network_pods.unwrap();
    assert_eq!((host.count, host.names), (1, vec!["proxy".to_owned()]));
    assert_eq!(n.egress[0].pool, "default");

    // The end of audit is over: it enforces, and says so.
    c.edit(&(namespace("shop", &annotations.replace("2099", "2001")) + &pod("shop", "web", "n1", "10.1.0.1")));
    let n = c.namespace("shop").unwrap();
    assert_eq!((n.mode, n.audit_until_time, n.host_network_pods), (Some(NamespaceMode::Enforce), None, None));
}

#[test]
fn a_pair_that_was_given_stays_recorded_while_no_pod_uses_it() {
    let pool = "---\napiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {name: p}\nspec: {allowedNamespaces: {}, addressSource: Static, static: {addresses: [{ipv4: 203.0.113.1}, {ipv4: 203.0.113.2}]}}\n";
    let mut c = Cluster::new("");
    let mut read = |text: &str, assigned: &str| {
        std::fs::write(c.folder.path().join("all.yaml"), text).unwrap();
        let mut objects = Reader::new(c.folder.path()).reload().objects;
        let pair = tidegate_policy::model::Pair { ipv4: Some(assigned.parse().unwrap()), ipv6: None, draining: false };
        objects.assigned.insert(("shop".into(), "p".into()), pair);
        let records = records_of(&objects, &[]);
        c.compile(&objects, &records);
        c.namespace("shop").unwrap().egress.into_iter().map(|e| (e.pool, e.ipv4.unwrap())).collect::<Vec<_>>()
    };
    let asks = policy("pay", "podSelector: {}, poolRef: {name: p}");
    let text = namespace("shop", "") + pool + &asks;
    for assigned in ["203.0.113.1", "203.0.113.2"] {
        assert_eq!(read(&text, assigned), [("p".to_owned(), assigned.to_owned())]);
        let running = text.clone() + &pod("shop", "web", "n1", "10.1.0.1");
        assert_eq!(read(&running, assigned), [("p".to_owned(), assigned.to_owned())]);
    }
    // The pool has it no more; or nothing asks for the pool.
    assert_eq!(read(&text, "203.0.113.9"), []);
    assert_eq!(read(&(namespace("shop", "tidegate.dev/managed: 'true'") + pool), "203.0.113.1"), []);
}

/// Scopes leave a pair that drains for one that the same gateway holds, and that lacks no family; where there is none they stay,
/// and the pool says so.
#[test]
fn scopes_leave_a_pair_that_drains_for_one_of_the_same_gateway() {
    let mut c = Cluster::new("");
    let mut read = |pairs: &str, owners: &[(&str, &str)]| {
        let pool = format!(
            "---\napiVersion: tidegate.dev/v1alpha1\nkind: EgressPool\nmetadata: {{name: p}}\nspec: {{allowedNamespaces: {{}}, addressSource: Static, static: {{addresses: [{pairs}]}}}}\n"
        );
        let asks = policy("pay", "podSelector: {}, poolRef: {name: p}");
        let text = namespace("shop", "") + &pool + &asks + &pod("shop", "web", "n1", "10.1.0.1");
        std::fs::write(c.folder.path().join("all.yaml"), text).unwrap();
        let mut objects = Reader::new(c.folder.path()).reload().objects;
        let pair = tidegate_policy::model::Pair { ipv4: Some([203, 0, 113, 1].into()), ipv6: None, draining: false };
        objects.assigned.insert(("shop".into(), "p".into()), pair);
        let claim = |(last, owner): &(&str, &str)| crate::core::PairStatus {
            pair: format!("p 203.0.113.{last}"),
            owner: (*owner).into(),
            epoch: 1,
            from: None,
            held: true,
        };
        c.status.pairs = owners.iter().map(claim).collect();
        let records = records_of(&objects, &[]);
        c.compile(&objects, &records);
        let egress = c.namespace("shop").unwrap().egress[0].ipv4.clone().unwrap();
        let programmed = c.pool("p").conditions.into_iter().find(|c| c.kind == "Programmed").unwrap();
        (egress.rsplit_once('.').unwrap().1.to_owned(), programmed.reason, programmed.message)
    };
    let (one, two, three) = ("{ipv4: 203.0.113.1, state: Draining}", "{ipv4: 203.0.113.2}", "{ipv4: 203.0.113.3}");
    let all = format!("{one}, {two}, {three}");
    let (egress, reason, _) = read(&all, &[("1", "a"), ("2", "b"), ("3", "a")]);
    assert_eq!((&*egress, &*reason), ("3", "Programmed"));
    let (egress, ..) = read(&all, &[("1", "b"), ("2", "b"), ("3", "a")]);
    assert_eq!(egress, "2");
    // Nobody holds the others, or somebody else does; or they drain, too.
    let drains = format!("{one}, {}", "{ipv4: 203.0.113.2, state: Draining}");
    let held = [("1", "a"), ("2", "b"), ("3", "b")];
    for (pairs, owners) in
        [(&all, &held[..1]), (&all, &held[..]), (&drains, &[("1", "a"), ("2", "a")]), (&one.into(), &held)]
    {
        let (egress, reason, message) = read(pairs, owners);
        assert_eq!((&*egress, &*reason), ("1", "Draining"), "{pairs}");
        assert!(message.starts_with("1 namespace goes on leaving with 203.0.113.1, which drains: "), "{message}");
    }
    // One that does not drain is left by nobody.
    assert_eq!(read("{ipv4: 203.0.113.1}, {ipv4: 203.0.113.3}", &held).0, "1");
    // One that has IPv6 is not left for one without.
    let both = "{ipv4: 203.0.113.1, ipv6: \"2001:db8::1\", state: Draining}, {ipv4: 203.0.113.3}";
    assert_eq!(read(both, &[("1 2001:db8::1", "a"), ("3", "a")]).0, "1");
}

fn denied(name: Option<&str>, address: Option<&str>, port: Option<u16>, reason: Reason) -> Denied {
    let who = Arc::new(Who { namespace: "shop".into(), pod: "web".into(), node: "n1".into() });
    Denied {
        source: [10, 1, 0, 1].into(),
        who: Some(who),
        name: name.map(Into::into),
        address: address.map(|a| a.parse().unwrap()),
        protocol: address.map(|_| 6),
        port,
        qtype: name.filter(|_| address.is_none()).map(|_| 1),
        reason,
        audit: false,
        rule: None,
        count: 1,
    }
}

#[test]
fn each_denial_says_what_would_allow_it() {
    let mut c = Cluster::new(&(shop() + &policy("pay", STRIPE)));
    let rule = RuleRef { kind: "EgressPolicy", namespace: "shop".into(), policy: "pay".into(), rule: "old".into() };
    let cluster =
        RuleRef { kind: "ClusterEgressPolicy", namespace: "".into(), policy: "base".into(), rule: "paste".into() };
    let ip = Some("203.0.113.9");
    let name = Some("api.other.example");
    let https = "- toFQDNs: [{matchName: api.other.example}]\n  toPorts: [{protocol: TCP, port: 443}]";
    let address = "# If the pod can use a name, allow that with toFQDNs instead: it must look it up with the cluster's DNS\n\
        - toCIDRs: [{cidr: \"203.0.113.9/32\"}]\n  toPorts: [{protocol: TCP, port: 5432}]";
    for (d, want) in [
        (denied(name, None, None, Reason::NameNotAllowed), Some(https)),
        (denied(name, ip, Some(443), Reason::SniMismatch), Some(https)),
        (
            denied(Some("db.other.example"), ip, Some(5432), Reason::NotAllowed),
            Some(
                "- toFQDNs: [{matchName: db.other.example}]\n  toPorts: [{protocol: TCP, port: 5432}]\n  sni: Unchecked   # PostgreSQL: there is no SNI to check",
            ),
        ),
        (denied(None, ip, Some(5432), Reason::NoBinding), Some(address)),
        (
            denied(Some("api.stripe.com"), ip, Some(443), Reason::SniMismatch),
            Some(
                "# The policy allows api.stripe.com, but the pod sent to an address that the cluster's DNS did not give it for this name, or not lately: let it look the name up before it connects",
            ),
        ),
        (denied(Some("api.stripe.com"), None, None, Reason::NameNotAllowed), Some("# The policy allows this name now")),
        (
            denied(name, ip, Some(443), Reason::Ech),
            Some("- toFQDNs: [{matchName: api.other.example}]\n  toPorts: [{protocol: TCP, port: 443}]\n  ech: Allow"),
        ),
        (
            Denied { qtype: Some(16), ..denied(name, None, None, Reason::DnsType) },
            Some(
                "- toFQDNs: [{matchName: api.other.example}]\n  toPorts: [{protocol: TCP, port: 443}]\n  dnsTypes: [TXT]",
            ),
        ),
        (
            Denied { rule: Some(rule), ..denied(name, ip, Some(443), Reason::DeniedByPolicy) },
            Some("# Rule old of EgressPolicy pay denies it, over everything that allows: change that rule"),
        ),
        (
            Denied { rule: Some(cluster), ..denied(name, ip, Some(443), Reason::DeniedByPolicy) },
            Some(
                "# Rule paste of ClusterEgressPolicy base denies it, and no rule of the namespace can allow it: ask the platform",
            ),
        ),
        (
            Denied { protocol: Some(132), ..denied(None, ip, None, Reason::NotAllowed) },
            Some("# Only TCP and UDP can be allowed"),
        ),
        (denied(None, ip, Some(443), Reason::Quota), None),
        // A name that no rule can have.
        (denied(Some("a\\010b"), None, None, Reason::NameNotAllowed), None),
    ] {
        c.table = Table::default();
        c.table.add(d.clone(), NOW);
        let n = c.namespace("shop").unwrap();
        assert_eq!(n.denials[0].allow_with.as_deref(), want, "{d:?}");
    }
    // A packet names nothing: what the pod was told for the address does.
    let world = &c.last.as_ref().unwrap().world;
    let group = world.group_of("10.1.0.1".parse().unwrap()).unwrap();
    let told = [Name::parse("api.stripe.com").unwrap()];
    let expired =
        |port| super::suggest::allow_with(&denied(None, ip, Some(port), Reason::BindingExpired), Some(group), &told);
    assert!(expired(443).unwrap().starts_with("# The policy allows api.stripe.com, but"));
    assert!(expired(8443).unwrap().starts_with("- toFQDNs: [{matchName: api.stripe.com}]"));
    let d = &c.namespace("shop").unwrap().denials[0];
    assert_eq!((d.pod.as_str(), d.last_time.as_str(), d.count), ("web", "2026-09-21T14:13:20Z", 1));
}

/// What is suggested is what a policy takes, and then allows it.
#[test]
fn a_suggested_rule_works() {
    for (d, name) in [
        (denied(Some("api.other.example"), None, None, Reason::NameNotAllowed), Some("api.other.example")),
        (
            denied(Some("1.other.example"), Some("203.0.113.9"), Some(8080), Reason::SniMismatch),
            Some("1.other.example"),
        ),
        (denied(None, Some("203.0.113.9"), Some(5432), Reason::NoBinding), None),
        (denied(None, Some("2001:db8::9"), Some(22), Reason::NotAllowed), None),
    ] {
        let mut c = Cluster::new(&(shop() + &policy("pay", STRIPE)));
        c.table.add(d.clone(), NOW);
        let item = c.namespace("shop").unwrap().denials[0].allow_with.clone().unwrap();
        let pasted = format!(
            "---\napiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: new, namespace: shop}}\nspec:\n  podSelector: {{}}\n  egress:\n  {}\n",
            item.replace('\n', "\n  ")
        );
        c.edit(&(shop() + &policy("pay", STRIPE) + &pasted));
        let s = c.policy(POLICY, "shop", "new");
        assert_eq!(text(&s.conditions, "Accepted"), "True Accepted: valid and in force", "{pasted}");
        let world = &c.last.as_ref().unwrap().world;
        let group = world.group_of("10.1.0.1".parse().unwrap()).unwrap();
        let name = name.map(|n| Name::parse(n).unwrap());
        let to = d.address.unwrap_or("203.0.113.1".parse().unwrap());
        let decision = group.connection(name.as_ref(), to, Proto::Tcp, d.port.unwrap_or(443));
        assert!(decision.allowed(), "{pasted}");
    }
}

#[test]
fn a_ceiling_that_stands_against_a_suggestion_is_named() {
    let mut c = Cluster::new(&(shop() + &policy("pay", STRIPE) + &cluster_policy("saas", CEILING)));
    let by = "# The ceiling of ClusterEgressPolicy saas stands against this rule: ask the platform\n";
    for (d, above) in [
        (denied(Some("b.example.com"), None, None, Reason::NameNotAllowed), false),
        (denied(Some("b.example.com"), Some("203.0.113.9"), Some(8443), Reason::NotAllowed), true),
        (denied(Some("b.other.example"), None, None, Reason::NameNotAllowed), true),
        (denied(None, Some("203.0.113.9"), Some(443), Reason::NoBinding), true),
    ] {
        c.table = Table::default();
        c.table.add(d.clone(), NOW);
        let said = c.namespace("shop").unwrap().denials[0].allow_with.clone().unwrap();
        assert_eq!(said.contains(by), above, "{said}");
    }
    let rule = RuleRef { kind: "EgressPolicy", namespace: "shop".into(), policy: "pay".into(), rule: "stripe".into() };
    c.table = Table::default();
    c.table.add(Denied { rule: Some(rule), ..denied(Some("api.stripe.com"), None, None, Reason::AboveCeiling) }, NOW);
    assert_eq!(
        c.namespace("shop").unwrap().denials[0].allow_with.as_deref(),
        Some(
            "# Rule stripe of EgressPolicy pay allows it, but the ceiling of ClusterEgressPolicy saas does not: ask the platform"
        )
    );
}

#[test]
fn only_what_was_touched_is_surveyed_again() {
    let c = Cluster::new(&(shop() + &namespace("other", "tidegate.dev/managed: 'true'")));
    let mut objects = Reader::new(c.folder.path()).reload().objects;
    let records = records_of(&objects, &[]);
    let first = Survey::new(&objects, &records, Touched::ALL, None);
    objects.namespaces.get_mut("shop").unwrap().managed = true;
    objects.namespaces.get_mut("other").unwrap().managed = false;
    objects.pods.remove(&("shop".to_owned(), "db".to_owned()));
    let touched = Touched { namespaces: ["shop".to_owned(), "new".to_owned()].into(), ..Touched::default() };
    let second = Survey::new(&objects, &records, &touched, Some(&first));
    assert!(second.namespaces["shop"].annotations.managed && !first.namespaces["shop"].annotations.managed);
    assert!(Arc::ptr_eq(&first.namespaces["other"], &second.namespaces["other"]));
    objects.namespaces.remove("shop");
    objects.pods.clear();
    let gone = Survey::new(&objects, &records, &touched, Some(&second));
    assert!(!gone.namespaces.contains_key("shop"));
    assert_eq!(records.keys().filter(|r| r.kind == NAMESPACE).count(), 2);
}

#[test]
fn a_tenant_does_not_read_the_names_of_other_peoples_pods() {
    let bank = namespace("bank", "tidegate.dev/managed: 'true'") + &pod("bank", "vault", "n2", "10.1.0.9");
    let managed = namespace("shop", "tidegate.dev/managed: 'true'");
    let mut c = Cluster::new(&(bank + &managed + &pod("shop", "web", "n1", "10.1.0.9")));
    for (own, other) in [("shop", "vault"), ("bank", "web")] {
        let status = c.namespace(own).unwrap();
        let said = serde_json::to_string(&status).unwrap();
        assert!(!said.contains(other), "{said}");
        let told = status
            .refused
            .iter()
            .filter_map(|r| r.message.as_deref())
            .chain(status.conditions.iter().map(|c| c.message.as_str()));
        let told = told.filter(|m| m.contains("a pod of another namespace has the same address")).count();
        assert!(told > 0 || own == "bank", "{said}");
    }
    // One's own are named.
    let both = namespace("shop", "tidegate.dev/managed: 'true'")
        + &pod("shop", "web", "n1", "10.1.0.9")
        + &pod("shop", "db", "n2", "10.1.0.9");
    let said = serde_json::to_string(&Cluster::new(&both).namespace("shop").unwrap()).unwrap();
    assert!(said.contains("has the same address") && said.contains("the pod shop/"), "{said}");
}

#[test]
fn a_denial_says_where_to_in_one_word() {
    let mut c = Cluster::new(&(shop() + &policy("pay", STRIPE)));
    let ip = Some("203.0.113.9");
    for (d, to) in [
        (denied(Some("a.example"), None, None, Reason::NameNotAllowed), "a.example"),
        (denied(Some("a.example"), ip, Some(443), Reason::SniMismatch), "a.example:443"),
        (denied(None, ip, Some(5432), Reason::NoBinding), "203.0.113.9:5432"),
        (denied(None, Some("2001:db8::1"), Some(22), Reason::NoBinding), "[2001:db8::1]:22"),
        (denied(None, ip, None, Reason::Protocol), "203.0.113.9"),
    ] {
        c.table.add(d, NOW);
        assert_eq!(c.namespace("shop").unwrap().denials[0].to, to);
    }
}
