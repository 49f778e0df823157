//! An edit and a pair that moves at the same moment: the core with a real relay and real kernel maps, on a clock of its own.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tidegate_api::index::Feed;
use tidegate_dns_core::View;
use tidegate_ebpf::{Capacities, Datapath, Options, Role};
use tidegate_kubernetes::members::Member;
use tidegate_ledger::Ledger;
use tidegate_policy::event::{Emit, Event};
use tidegate_policy::model::{Objects, Touched, UnixSeconds};
use tidegate_policy::state::Entry;
use tidegate_policy::world::World;
use tidegate_policy::{Name, Reason, ScopeKey};
use tidegate_proto::wire::StateUpdate;
use tidegate_proto::{Beat, Claim, FactsBatch, Pair, PeerFact, PeerMessage, Seen, StateBatch};
use tidegate_sni::{Destination, Relay, RelayConfig};
use tidegate_sni_core::{Check, Client, Egress, Judgement, Sni};
use tokio::sync::mpsc;

use super::failover::{HAND_OVER, MEET};
use super::soak::cluster::{config, objects};
use super::{Classifier, Core, Run, Shared, ToCore, channel};
use crate::admin::Readiness;
use crate::desired::{Compiled, Desired};
use crate::generations::{LAG, Version};
use crate::ownership::Ownership;

const NODE: &str = "node-2";

/// Takes every connection for one of a pod in this group, and waits for its hello.
struct Anybody(Client);

impl Check for Anybody {
    fn client(&self, _: std::net::IpAddr) -> Option<Client> {
        Some(self.0.clone())
    }

    fn judge(&self, _: &Client, _: SocketAddr, _: &Sni, _: bool) -> Judgement {
        Judgement::Deny { reason: Reason::NoBinding, rule: None }
    }

    fn egress(&self, _: &Client, _: bool) -> Result<Egress, Reason> {
        Err(Reason::NoGateway)
    }

    fn forbidden(&self, _: SocketAddr) -> bool {
        false
    }
}

struct Nobody;

impl Emit for Nobody {
    fn emit(&self, _: Event) {}
}

struct Test {
    run: Run,
    relay: Relay,
    scope: ScopeKey,
    objects: Objects,
    compiles: u64,
    /// The newest policy that the other gateway has seen.
    seen: u64,
    /// What the node was told.
    state: mpsc::Receiver<StateUpdate>,
    _folder: tempfile::TempDir,
    pins: std::path::PathBuf,
}

impl Drop for Test {
    fn drop(&mut self) {
        // Open maps go with the process.
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

fn pair() -> Pair {
    Pair { pool: "static".into(), ipv4: Some([203, 0, 113, 10].into()), ipv6: None }
}

fn compile(objects: &Objects, number: u64) -> Arc<Compiled> {
    let world = Arc::new(World::compile(objects, UnixSeconds(0), None));
    Arc::new(Compiled::new(world, objects, number))
}

impl Test {
    /// This gateway serves the pair, and a node follows it.
    fn new() -> Self {
        static TESTS: AtomicU64 = AtomicU64::new(0);
        let number = TESTS.fetch_add(1, Ordering::Relaxed);
        let pins = std::path::PathBuf::from(format!("/sys/fs/bpf/tidegate-moves-{}-{number}", std::process::id()));
        let folder = tempfile::tempdir().unwrap();
        let config = Arc::new(config(folder.path(), &pins));
        let empty = Arc::new(World::compile(&Objects::default(), UnixSeconds(0), None));
        let shared = Arc::new(Shared::new(empty, Arc::default()));
        shared.clock.set.store(1_000_000, Ordering::Relaxed);
        let ledger =
            Ledger::new(tidegate_ledger::Config::default(), [1, 2, 3, 4], Classifier(shared.clone()), shared.now());
        let (_, rx) = channel();
        let capacities = Capacities { endpoints: 64, facts: 64, grants: 1024, portsets: 256, prefixes: 256, flows: 64 };
        let options = Options { capacities, ..Options::new(Role::Gateway, &pins) };
        let mut objects = objects();
        // From where the test connects.
        objects.pods.get_mut(&("team-a".to_owned(), "web-1".to_owned())).unwrap().addresses.push([127, 0, 0, 1].into());
        let compiled = compile(&objects, 1);
        let web = compiled.world.endpoint([10, 244, 2, 1].into()).unwrap();
        let member = web.member.unwrap();
        let group = compiled.world.group(member.index).unwrap().key();
        let client = Client { who: web.who.clone(), scope: member.scope, group, group_index: member.index };
        let relay = RelayConfig {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            threads: 1,
            transparent: false,
            destination: Destination::Mapped(Arc::new(|_, _| "192.0.2.1:443".parse().unwrap())),
            hello_timeout: Duration::from_secs(60),
            ..RelayConfig::default()
        };
        let relay = Relay::start(relay, Arc::new(Anybody(client)), Arc::new(Nobody)).unwrap();
        let mut run = Run::new(Core {
            rx,
            shared: shared.clone(),
            desired: Arc::new(Desired::new(config)),
            families: (true, true),
            ledger,
            datapath: Datapath::load(&options).unwrap(),
            registry: relay.registry().clone(),
            boot_id: 7,
            gateway: "gw-a".into(),
            flow_idle: Duration::from_secs(60),
            ownership: Ownership::new("gw-a", ["gw-b".to_owned()], shared.now()),
            api: None,
            journal: None,
            recovered: Vec::new(),
            denials: crate::report::thread::post().0,
            starting: None,
            readiness: Readiness::default(),
            watched: None,
            stale: tokio::sync::watch::channel(false).0,
        });
        run.attached = true;
        let (out, state) = mpsc::channel(1 << 10);
        let mut test =
            Self { run, relay, scope: member.scope, objects, compiles: 1, seen: 5, state, _folder: folder, pins };
        test.beat(Vec::new());
        test.run.take(ToCore::World(compiled));
        test.run.take(ToCore::StateUp { node: NODE.into(), id: 1, out });
        test.run.decide();
        test.in_place();
        assert!(test.run.core.ownership.holds(&pair()));
        assert_eq!(test.owner(), Some(("gw-a".into(), 1)));
        test
    }

    /// The other gateway says what is claimed.
    fn beat(&mut self, claims: Vec<Claim>) {
        let versions = vec![("egresspolicies".to_owned(), self.seen)];
        let beat = Some(Beat { able: true, claims, versions, ..Beat::default() });
        let message = PeerMessage { boot_id: 9, snapshot: true, beat, ..PeerMessage::default() };
        self.run.take(ToCore::Peer { gateway: "gw-b".into(), message });
    }

    fn claims_the_pair(&mut self, epoch: u64) {
        self.beat(vec![Claim { pair: pair(), owner: "gw-b".into(), epoch, held: true }]);
    }

    /// Another pod of the scope comes.
    fn edit(&mut self) {
        let mut pod = self.objects.pods[&("team-a".to_owned(), "web-1".to_owned())].clone();
        self.compiles += 1;
        pod.addresses = vec![[10, 244, 2, 100 + self.compiles as u8].into()];
        self.objects.pods.insert(("team-a".into(), format!("new-{}", self.compiles)), pod);
        let world = World::compile(&self.objects, UnixSeconds(0), Some((&self.run.compiled.world, Touched::ALL)));
        let compiled = Compiled::new(Arc::new(world), &self.objects, self.compiles);
        self.run.take(ToCore::World(Arc::new(compiled)));
    }

    /// A third gateway comes.
    fn gateways(&mut self) {
        let member = |(name, node): (&str, &str)| Member {
            name: name.into(),
            node: node.into(),
            addresses: vec!["192.0.2.1:7443".parse().unwrap()],
            terminating: false,
        };
        let members = [("gw-a", "node-1"), ("gw-b", "node-3"), ("gw-c", "node-4")].map(member);
        self.run.take(ToCore::Members(members.to_vec()));
    }

    fn pass(&mut self, by: Duration) {
        let clock = &self.run.core.shared.clock.set;
        clock.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// The thread of the way out has brought the addresses into place.
    fn in_place(&mut self) {
        let shared = &self.run.core.shared;
        shared.applied.store(Arc::new(shared.pairs.borrow().clone()));
        self.run.decide();
    }

    /// The other gateway has seen a policy that this one does not see.
    fn fall_behind(&mut self) {
        let version = Version { newest: 5, reached: 5 };
        self.run.take(ToCore::Versions([(Feed::EgressPolicies, version)].into()));
        self.seen = 6;
        self.beat(Vec::new());
        self.pass(LAG);
        self.beat(Vec::new());
        self.run.decide();
        assert!(*self.run.core.stale.borrow(), "statuses and pools are told");
    }

    fn answers(&self) -> bool {
        View::closed(&**self.run.core.shared.view.load()).is_none()
    }

    /// Whom the node was told to follow since the last time, and the epoch.
    fn owner(&mut self) -> Option<(String, u64)> {
        let mut told = None;
        while let Ok(update) = self.state.try_recv() {
            for entry in StateBatch::try_from(update).unwrap().set {
                if let Entry::Scope(scope, s) = entry
                    && scope == self.scope
                {
                    told = Some((s.owner, s.epoch));
                }
            }
        }
        told
    }
}

#[test]
fn connections_of_a_pair_that_is_lost_are_reset_whatever_comes_first() {
    for comes in [|_: &mut Test| (), Test::edit, |test: &mut Test| test.gateways()] {
        let mut test = Test::new();
        let mut live = TcpStream::connect(test.relay.addresses()[0]).unwrap();
        live.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        while test.run.core.registry.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        comes(&mut test);
        test.run.decide();
        assert!(
            live.read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock),
            "an edit alone cuts nothing"
        );
        test.claims_the_pair(5);
        comes(&mut test);
        test.run.decide();
        assert!(!test.run.core.ownership.holds(&pair()));
        live.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        match live.read(&mut [0]) {
            Ok(0) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn flows_of_addresses_that_another_gateway_has_are_dead() {
    let mut test = Test::new();
    let lost = |test: &Test| std::mem::take(&mut *test.run.core.shared.lost.lock());
    assert!(lost(&test).is_empty(), "what this one has goes on, also where an earlier process had it");
    test.edit();
    test.run.decide();
    assert!(lost(&test).is_empty());
    test.claims_the_pair(5);
    test.run.decide();
    assert!(lost(&test).contains(&pair().ipv4.unwrap().into()));
    test.edit();
    test.run.decide();
    assert!(lost(&test).is_empty(), "once is enough");
}

#[test]
fn nodes_follow_a_new_owner_only_when_its_addresses_are_in_place_although_an_edit_comes_first() {
    let mut test = Test::new();
    test.claims_the_pair(5);
    test.run.decide();
    test.in_place();
    assert_eq!(test.owner(), Some(("gw-b".into(), 5)));
    // The other one dies, and an edit comes before anything is decided.
    test.pass(Duration::from_secs(3));
    test.edit();
    assert!(test.run.core.ownership.holds(&pair()));
    assert_eq!(test.owner(), None, "the addresses are not in place");
    // Nor does a node that begins anew hear of it.
    let (out, state) = mpsc::channel(1 << 10);
    test.state = state;
    test.run.take(ToCore::StateUp { node: NODE.into(), id: 2, out });
    assert_eq!(test.owner(), Some(("gw-b".into(), 5)));
    test.edit();
    test.run.decide();
    assert_eq!(test.owner(), None);
    test.in_place();
    assert_eq!(test.owner(), Some(("gw-a".into(), 6)));
}

#[test]
fn nodes_hear_at_once_of_a_pair_that_is_lost() {
    let mut test = Test::new();
    test.claims_the_pair(5);
    test.gateways();
    assert!(!test.run.core.ownership.holds(&pair()) && test.run.core.shared.pairs.borrow().is_empty());
    assert_eq!(test.owner(), Some(("gw-b".into(), 5)), "nothing has to come into place for that");
}

#[test]
fn one_that_knows_less_answers_until_another_has_its_pairs() {
    let mut test = Test::new();
    test.fall_behind();
    assert!(test.answers() && test.run.core.ownership.holds(&pair()), "nobody else has it yet");
    let take = |c: Claim| Claim { owner: "gw-b".into(), epoch: c.epoch + 5, held: true, ..c };
    let all = test.run.core.ownership.claims().into_iter().map(take).collect();
    test.beat(all);
    test.run.decide();
    assert!(!test.answers() && !test.run.core.ownership.holds(&pair()));
    // An edit that comes late is no reason to answer.
    test.edit();
    assert!(!test.answers());
    let version = Version { newest: 6, reached: 6 };
    test.run.take(ToCore::Versions([(Feed::EgressPolicies, version)].into()));
    test.run.decide();
    assert!(test.answers() && !*test.run.core.stale.borrow());
}

#[test]
fn nodes_ask_others_before_one_that_knows_less_ceases_to_answer() {
    let mut test = Test::new();
    let (out, mut facts) = mpsc::channel(1 << 10);
    let mut steps_back = || {
        let mut last = None;
        while let Ok(update) = facts.try_recv() {
            last = Some(FactsBatch::try_from(update).unwrap().steps_back);
        }
        last
    };
    test.run.take(ToCore::FactsUp { node: NODE.into(), id: 2, boot_id: 3, out });
    assert_eq!(steps_back(), Some(false));
    test.fall_behind();
    assert!(test.answers());
    assert_eq!(steps_back(), Some(true), "at once");
    let version = Version { newest: 6, reached: 6 };
    test.run.take(ToCore::Versions([(Feed::EgressPolicies, version)].into()));
    test.run.decide();
    assert_eq!((test.answers(), steps_back()), (true, Some(false)));
}

#[test]
fn one_that_knows_less_answers_not_much_longer_although_nobody_takes_its_pairs() {
    let mut test = Test::new();
    test.fall_behind();
    test.pass(HAND_OVER - Duration::from_millis(1));
    test.run.decide();
    assert!(test.answers());
    test.pass(Duration::from_millis(1));
    test.run.decide();
    assert!(!test.answers());
}

#[test]
fn a_node_hears_what_becomes_of_an_address_that_only_a_gateway_which_died_knew_to_be_there() {
    let mut test = Test::new();
    let (out, mut facts) = mpsc::channel(1 << 10);
    let mut told = || {
        let mut all = Vec::new();
        while let Ok(update) = facts.try_recv() {
            all.extend(FactsBatch::try_from(update).unwrap().facts);
        }
        all.into_iter().map(|f| (f.scope, f.ip, f.value.map(|v| v.class))).collect::<Vec<_>>()
    };
    let (scope, node) = (test.scope, || NODE.to_owned());
    let ip: IpAddr = [192, 0, 2, 7].into();
    let learns = |test: &mut Test, ip| {
        let fact = PeerFact {
            scope,
            namespace: "team-a".into(),
            name: Name::parse("n.a.fixed.example").unwrap(),
            ip,
            remaining: Duration::from_secs(60),
            ttl: Duration::from_secs(60),
            nodes: Vec::new(),
        };
        let message = PeerMessage { boot_id: 9, facts: vec![fact], ..PeerMessage::default() };
        test.run.take(ToCore::Peer { gateway: "gw-b".into(), message });
    };
    let sees = |test: &mut Test, orphans: Vec<(ScopeKey, IpAddr)>| {
        let seen = Seen { gateways: vec!["gw-a".into()], claims: Vec::new(), orphans };
        test.run.take(ToCore::Seen { node: node(), id: 2, seen });
    };
    test.run.take(ToCore::FactsUp { node: node(), id: 2, boot_id: 3, out });
    learns(&mut test, ip);
    assert!(told().is_empty(), "the other gateway did not say that the node has it");
    let (late, foreign) = (IpAddr::from([192, 0, 2, 8]), ScopeKey(99));
    sees(&mut test, vec![(scope, ip), (scope, late), (foreign, ip)]);
    let class = test.run.core.ledger.bindings().class_of(scope, ip);
    assert!(class.is_some());
    assert_eq!(told(), [(scope, ip, class)]);
    // What is learnt later it hears as well.
    learns(&mut test, late);
    assert_eq!(told(), [(scope, late, class)]);
    // And so it hears of edits, also when it has said that all is well.
    sees(&mut test, Vec::new());
    let base = test.objects.policies.get_mut(&("team-a".to_owned(), "base".to_owned())).unwrap();
    base.deny = vec![base.egress[0].clone()];
    test.edit();
    let other = test.run.core.ledger.bindings().class_of(scope, ip);
    let mut all = told();
    all.sort_unstable();
    assert!(other.is_some() && other != class);
    assert_eq!(all, [(scope, ip, other), (scope, late, other)]);
}

#[test]
fn a_node_hears_of_what_it_holds_of_a_scope_once_it_has_pods_of_it() {
    let mut test = Test::new();
    let (out, mut facts) = mpsc::channel(1 << 10);
    let scope = test.scope;
    let ip: IpAddr = [192, 0, 2, 7].into();
    let node = || "new-node".to_owned();
    test.run.take(ToCore::FactsUp { node: node(), id: 2, boot_id: 3, out });
    let fact = PeerFact {
        scope,
        namespace: "team-a".into(),
        name: Name::parse("n.a.fixed.example").unwrap(),
        ip,
        remaining: Duration::from_secs(60),
        ttl: Duration::from_secs(60),
        nodes: Vec::new(),
    };
    let message = PeerMessage { boot_id: 9, facts: vec![fact], ..PeerMessage::default() };
    test.run.take(ToCore::Peer { gateway: "gw-b".into(), message });
    let seen = Seen { gateways: vec!["gw-a".into()], claims: Vec::new(), orphans: vec![(scope, ip)] };
    test.run.take(ToCore::Seen { node: node(), id: 2, seen });
    let mut told = || {
        let mut n = 0;
        while let Ok(update) = facts.try_recv() {
            n += FactsBatch::try_from(update).unwrap().facts.len();
        }
        n
    };
    assert_eq!(told(), 0, "a node speaks for its own pods");
    let key = ("team-a".to_owned(), "moved".to_owned());
    let mut pod = test.objects.pods[&("team-a".to_owned(), "web-1".to_owned())].clone();
    (pod.node, pod.addresses) = (node(), vec![[10, 244, 9, 9].into()]);
    test.objects.pods.insert(key, pod);
    test.edit();
    assert_eq!(told(), 1);
}

#[test]
fn a_gateway_is_ready_when_every_agent_knows_it_where_another_one_serves() {
    let other = |epoch| Claim {
        pair: Pair { ipv4: Some([203, 0, 113, 99].into()), ..pair() },
        owner: "gw-b".into(),
        epoch,
        held: true,
    };
    // With an API server, and `held` by the other one, this one begins anew.
    let begin = |held: Vec<Claim>| {
        let mut test = Test::new();
        test.run.core.api = Some(mpsc::channel(64).0);
        test.run.begun = test.run.core.shared.now();
        test.beat(held);
        let readiness = test.run.core.readiness.clone();
        test.run.core.starting = Some(readiness.guard("peers"));
        test.run.decide();
        (test, readiness)
    };
    let (_test, alone) = begin(Vec::new());
    assert!(alone.waiting_for().is_empty(), "nobody ends where nobody serves");

    let (mut test, ready) = begin(vec![other(1)]);
    assert_eq!(ready.waiting_for(), ["peers"], "one node has asked for policy, none for facts");
    let nodes: Vec<String> = test.run.compiled.nodes.keys().cloned().collect();
    assert!(nodes.len() > 1);
    let mut streams = Vec::new();
    for (n, node) in nodes.iter().enumerate() {
        let id = 10 + n as u64;
        let (out, state) = mpsc::channel(1 << 10);
        test.run.take(ToCore::StateUp { node: node.clone(), id, out });
        let (out, facts) = mpsc::channel(1 << 10);
        test.run.decide();
        assert_eq!(ready.waiting_for(), ["peers"], "{node} gets no facts yet");
        test.run.take(ToCore::FactsUp { node: node.clone(), id, boot_id: 3, out });
        streams.push((state, facts));
    }
    test.run.decide();
    assert!(ready.waiting_for().is_empty(), "all know it");

    // An agent that is away does not hold it up for long.
    let (mut test, ready) = begin(vec![other(1)]);
    test.pass(MEET / 2);
    test.beat(vec![other(1)]);
    test.run.decide();
    assert_eq!(ready.waiting_for(), ["peers"]);
    test.pass(MEET / 2);
    test.beat(vec![other(1)]);
    test.run.decide();
    assert!(ready.waiting_for().is_empty());
}

#[test]
fn a_gateway_is_ready_when_every_pair_is_somebodys() {
    let another = Pair { ipv4: Some([203, 0, 113, 99].into()), ..pair() };
    let begin = || {
        let mut test = Test::new();
        test.run.begun = test.run.core.shared.now();
        let candidates = |p: &Pair| (p.clone(), vec!["gw-b".to_owned()]);
        test.run.core.ownership.set_pairs([&pair(), &another].map(candidates).into());
        let readiness = test.run.core.readiness.clone();
        test.run.core.starting = Some(readiness.guard("peers"));
        test.run.decide();
        (test, readiness)
    };
    let (mut test, ready) = begin();
    assert_eq!(ready.waiting_for(), ["peers"], "nobody has claimed the other one");
    let claim = Claim { pair: another.clone(), owner: "gw-b".into(), epoch: 1, held: true };
    test.beat(vec![claim]);
    test.run.decide();
    assert!(ready.waiting_for().is_empty());

    // One that nobody takes does not hold it up for long.
    let (mut test, ready) = begin();
    test.pass(MEET);
    test.run.decide();
    assert!(ready.waiting_for().is_empty());
}
