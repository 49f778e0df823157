//! The rules of failover, one by one and on random faults.

use super::*;

const NODES: [&str; 4] = ["n1", "n2", "n3", "n4"];

fn pair(last: u8) -> Pair {
    Pair { pool: "p".into(), ipv4: Some([203, 0, 113, last].into()), ipv6: None }
}

/// Gateways and agents on one clock, with links that can be cut.
struct Sim {
    gateways: BTreeMap<String, Ownership>,
    pairs: BTreeMap<Pair, Vec<String>>,
    /// Gateways that cannot hear each other.
    cut: BTreeSet<(String, String)>,
    /// Agents that do not hear a gateway.
    deaf: BTreeSet<(String, String)>,
    /// Who finds that nothing listens where whom was: that one's process has ended, or somebody between them says so.
    refusing: BTreeSet<(String, String)>,
    /// What nodes follow: the highest epoch, of equal ones the smaller name.
    follows: BTreeMap<(String, Pair), Known>,
    /// How long it takes until what a gateway claims is in place.
    place: Duration,
    /// Gateways that know less of policy than another one: they are not able, and offer what they hold.
    stale: BTreeSet<String>,
    /// How far the clocks of gateways are ahead.
    skew: BTreeMap<String, Duration>,
    api: Option<Api>,
    now: Duration,
}

/// What stands in the status of a pool.
type Stands = Vec<(Pair, Known)>;

/// An API server that fails, lags and lets only one writer win.
#[derive(Default)]
struct Api {
    stands: BTreeMap<Pair, Known>,
    down: bool,
    /// It answers, and writes nothing.
    refuses: bool,
    /// Gateways that do not reach it.
    cut: BTreeSet<String>,
    /// How long what is said takes each way.
    lag: Duration,
    writes: Vec<(Duration, String, Write)>,
    told: Vec<(Duration, String, Stands)>,
    /// Claims that were written, and those that came too late.
    written: u32,
    late: u32,
}

impl Api {
    fn reaches(&self, gateway: &str) -> bool {
        !self.down && !self.cut.contains(gateway)
    }

    fn tell(&mut self, gateway: &str, now: Duration) {
        let all = self.stands.iter().map(|(p, k)| (p.clone(), k.clone())).collect();
        self.told.push((now + self.lag, gateway.to_owned(), all));
    }

    /// Takes what is there by now, and says which gateways hear of it.
    fn step(&mut self, now: Duration, gateways: &[String]) {
        for (due, from, w) in std::mem::take(&mut self.writes) {
            if due > now {
                self.writes.push((due, from, w));
            } else if self.refuses || !self.reaches(&from) {
                // Nobody is told.
            } else if self.stands.get(&w.pair) == w.over.as_ref() {
                self.written += 1;
                self.stands.insert(w.pair, w.claim);
                gateways.iter().for_each(|g| self.tell(g, now));
            } else {
                self.late += 1;
                self.tell(&from, now);
            }
        }
    }
}

impl Sim {
    fn new(names: &[&str], pairs: &[(Pair, &[&str])]) -> Self {
        let pairs = pairs.iter().map(|(p, c)| (p.clone(), c.iter().map(|g| (*g).to_owned()).collect())).collect();
        let mut sim = Self {
            gateways: BTreeMap::new(),
            pairs,
            cut: BTreeSet::new(),
            deaf: BTreeSet::new(),
            refusing: BTreeSet::new(),
            follows: BTreeMap::new(),
            place: Duration::ZERO,
            stale: BTreeSet::new(),
            skew: BTreeMap::new(),
            api: None,
            now: Duration::from_secs(1000),
        };
        for name in names {
            sim.start(name, names, Vec::new());
        }
        sim
    }

    fn start(&mut self, name: &str, all: &[&str], claims: Vec<Claim>) {
        let now = self.local(name);
        let mut o = Ownership::new(name, all.iter().map(|g| (*g).to_owned()), now);
        if let Some(api) = &mut self.api {
            o = o.recorded(false);
            o.set_peers(all.iter().map(|g| listed(g)), now);
            api.tell(name, self.now);
        }
        o.recall(claims);
        o.set_pairs(self.pairs.clone());
        o.set_able(true);
        self.gateways.insert(name.to_owned(), o);
        self.refusing.retain(|(_, whom)| whom != name);
    }

    /// A process ends, and its machine says so to the others.
    fn kill(&mut self, name: &str) -> Option<Ownership> {
        let dead = self.gateways.remove(name);
        self.refusing.extend(self.gateways.keys().map(|other| (other.clone(), name.to_owned())));
        dead
    }

    fn local(&self, gateway: &str) -> Duration {
        self.now + self.skew.get(gateway).copied().unwrap_or_default()
    }

    fn beat(&self, o: &Ownership) -> Beat {
        let placing = o.held.values().any(|since| self.local(&o.me) < *since + self.place);
        let leaving = o.leaving || self.stale.contains(&o.me);
        Beat { able: o.able, claims: o.claims(), leaving, placing, versions: Vec::new() }
    }

    /// Lets 100 ms pass: beats, agents' words, decisions.
    fn step(&mut self) {
        self.now += Duration::from_millis(100);
        let names: Vec<String> = self.gateways.keys().cloned().collect();
        let beats: Vec<(String, Beat)> = self.gateways.iter().map(|(n, o)| (n.clone(), self.beat(o))).collect();
        for (who, whom) in &self.refusing {
            if let Some(o) = self.gateways.get_mut(who) {
                o.refused(whom);
            }
        }
        for (from, beat) in &beats {
            for to in names.iter().filter(|t| *t != from && !self.cut.contains(&((*t).clone(), from.clone()))) {
                let now = self.local(to);
                if let Some(o) = self.gateways.get_mut(to) {
                    o.synced(from);
                    o.beat(from, beat, now);
                }
            }
        }
        for node in NODES {
            let heard: BTreeSet<String> =
                names.iter().filter(|g| !self.deaf.contains(&(node.to_owned(), (*g).clone()))).cloned().collect();
            for g in &heard {
                let o = &self.gateways[g];
                for c in o.claims() {
                    // What it has not in place it does not tell.
                    if o.held.get(&c.pair).is_some_and(|since| self.local(g) < *since + self.place) {
                        continue;
                    }
                    let claim = Known { owner: c.owner, epoch: c.epoch };
                    let f = self.follows.entry((node.to_owned(), c.pair)).or_insert_with(|| claim.clone());
                    if claim.beats(f) {
                        *f = claim;
                    }
                }
            }
            let epochs: Vec<(Pair, u64)> =
                self.follows.iter().filter(|((n, _), _)| n == node).map(|((_, p), k)| (p.clone(), k.epoch)).collect();
            for g in &names {
                let now = self.local(g);
                let o = self.gateways.get_mut(g).unwrap();
                if heard.contains(g) { o.seen(node, heard.clone(), epochs.clone()) } else { o.agent_gone(node, now) }
            }
        }
        self.ask_api(&names);
        for name in &names {
            let now = self.local(name);
            let Some(o) = self.gateways.get_mut(name) else { continue };
            o.tick(now);
            if let Some(api) = &mut self.api {
                let at = self.now + api.lag;
                api.writes.extend(o.writes().into_iter().map(|w| (at, name.clone(), w)));
            }
        }
    }

    fn ask_api(&mut self, names: &[String]) {
        let Some(mut api) = self.api.take() else { return };
        api.step(self.now, names);
        for (due, to, stands) in std::mem::take(&mut api.told) {
            let now = self.local(&to);
            if due > self.now {
                api.told.push((due, to, stands));
            } else if let Some(o) = self.gateways.get_mut(&to).filter(|_| api.reaches(&to)) {
                o.set_records("p", Some(&stands), now);
            }
        }
        for name in names.iter().filter(|n| api.reaches(n)) {
            let now = self.local(name);
            self.gateways.get_mut(name).unwrap().api_answered(now);
        }
        self.api = Some(api);
    }

    fn api(&mut self) -> &mut Api {
        self.api.as_mut().unwrap()
    }

    /// Everybody who can hears the API server again.
    fn api_back(&mut self) {
        let (now, names) = (self.now, self.gateways.keys().cloned().collect::<Vec<_>>());
        let api = self.api();
        (api.down, api.refuses) = (false, false);
        api.cut.clear();
        names.iter().for_each(|n| api.tell(n, now));
    }

    fn pass(&mut self, seconds: f64) {
        for _ in 0..(seconds * 10.0) as u32 {
            self.step();
        }
    }

    fn holders(&self, p: &Pair) -> Vec<&str> {
        self.gateways.iter().filter(|(_, o)| o.holds(p)).map(|(n, _)| n.as_str()).collect()
    }

    fn epoch(&self, g: &str, p: &Pair) -> u64 {
        self.gateways[g].owner(p).unwrap().epoch
    }
}

fn listed(name: &str) -> Listed {
    Listed { name: name.to_owned(), terminating: false }
}

fn two() -> Sim {
    Sim::new(&["a", "b"], &[(pair(1), &["a", "b"]), (pair(2), &["b", "a"])])
}

#[test]
fn the_first_candidates_begin() {
    let mut s = two();
    s.pass(0.5);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["a"], vec!["b"]));
    assert_eq!(s.epoch("b", &pair(1)), 1);
}

#[test]
fn a_dead_owner_is_followed_after_two_seconds_and_does_not_preempt() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.remove("a");
    s.pass(1.8);
    assert!(s.holders(&pair(1)).is_empty());
    s.pass(0.4);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    assert_eq!(s.epoch("b", &pair(1)), 2);
    s.start("a", &["a", "b"], Vec::new());
    s.pass(10.0);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["b"], vec!["b"]));
    assert_eq!(s.gateways["a"].owner(&pair(1)), Some(Known { owner: "b".into(), epoch: 2 }));
}

#[test]
fn a_quick_restart_takes_its_pairs_back_with_a_higher_epoch() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.remove("a");
    s.pass(0.5);
    s.start("a", &["a", "b"], Vec::new());
    s.pass(1.0);
    assert_eq!(s.holders(&pair(1)), ["a"]);
    assert_eq!(s.epoch("a", &pair(1)), 2, "nodes must follow the new word");
}

#[test]
fn one_whose_process_has_ended_is_followed_after_a_second() {
    let mut s = two();
    s.pass(1.0);
    s.kill("a");
    s.pass(0.8);
    assert!(s.holders(&pair(1)).is_empty());
    s.pass(0.3);
    assert_eq!((s.holders(&pair(1)), s.epoch("b", &pair(1))), (vec!["b"], 2));
    s.start("a", &["a", "b"], Vec::new());
    s.pass(5.0);
    assert_eq!(s.holders(&pair(1)), ["b"]);
}

#[test]
fn one_that_is_started_again_within_the_second_goes_on_and_has_to_be_refused_anew() {
    let mut s = two();
    s.pass(1.0);
    s.kill("a");
    s.pass(0.8);
    s.start("a", &["a", "b"], Vec::new());
    s.pass(0.5);
    assert_eq!((s.holders(&pair(1)), s.epoch("a", &pair(1))), (vec!["a"], 2));
    // Now it hangs.
    s.gateways.remove("a");
    s.pass(1.8);
    assert!(s.holders(&pair(1)).is_empty());
}

#[test]
fn nothing_moves_while_the_agents_see_the_owner() {
    let mut s = two();
    s.pass(1.0);
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    // Whoever cuts may refuse, too.
    s.refusing = s.cut.clone();
    s.pass(10.0);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["a"], vec!["b"]));
}

#[test]
fn an_owner_that_is_cut_off_from_all_lets_go_and_loses() {
    let mut s = two();
    s.pass(1.0);
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    s.deaf = NODES.iter().map(|n| ((*n).to_owned(), "a".to_owned())).collect();
    s.pass(2.5);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    assert_eq!(s.holders(&pair(2)), ["b"]);
    s.cut.clear();
    s.deaf.clear();
    s.pass(3.0);
    assert_eq!(s.holders(&pair(1)), ["b"], "it does not preempt");
    assert_eq!(s.gateways["a"].owner(&pair(1)).unwrap().owner, "b");
}

#[test]
fn one_that_was_cut_off_waits_for_its_peers_before_it_takes_anything() {
    let mut s = two();
    s.pass(1.0);
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    s.deaf = NODES.iter().map(|n| ((*n).to_owned(), "a".to_owned())).collect();
    s.pass(4.0);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    // Agents are back first, and the first of them see too little of the other gateway to say that it lives.
    let now = s.now;
    let a = s.gateways.get_mut("a").unwrap();
    let epochs = || [(pair(1), 2)];
    a.seen("n1", ["a"].map(String::from).into(), epochs());
    a.seen("n2", ["a", "b"].map(String::from).into(), epochs());
    a.tick(now + Duration::from_millis(100));
    assert!(!a.holds(&pair(1)));
    let beat = s.beat(&s.gateways["b"]);
    let a = s.gateways.get_mut("a").unwrap();
    a.beat("b", &beat, now + Duration::from_millis(200));
    a.tick(now + Duration::from_millis(200));
    assert_eq!((a.holds(&pair(1)), a.owner(&pair(1)).unwrap().owner), (false, "b".to_owned()));
    // But not for ever: the other one may have died meanwhile.
    s.gateways.remove("b");
    s.cut.clear();
    s.deaf.clear();
    s.pass(2.5);
    assert_eq!(s.holders(&pair(1)), ["a"]);
}

#[test]
fn one_that_leaves_carries_on_until_another_is_in_place() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.get_mut("a").unwrap().leave();
    let (now, beat) = (s.now, s.beat(&s.gateways["a"]));
    assert!(beat.leaving && !s.gateways["a"].left(now));
    let b = s.gateways.get_mut("b").unwrap();
    b.beat("a", &beat, now);
    b.tick(now);
    assert!(b.holds(&pair(1)));
    let claims = b.claims();
    let a = s.gateways.get_mut("a").unwrap();
    a.beat("b", &Beat { able: true, claims: claims.clone(), placing: true, ..Beat::default() }, now);
    a.tick(now);
    assert!(a.holds(&pair(1)), "the other one is not in place yet");
    a.beat("b", &Beat { able: true, claims, ..Beat::default() }, now);
    a.tick(now);
    assert!(!a.holds(&pair(1)) && !a.left(now), "the nodes still follow this one");
    s.pass(0.3);
    assert!(s.gateways["a"].left(s.now));
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2)), s.epoch("b", &pair(1))), (vec!["b"], vec!["b"], 2));
    // It takes nothing again, whatever happens, and a new process does.
    s.gateways.remove("b");
    s.pass(4.0);
    assert!(s.holders(&pair(1)).is_empty() && s.gateways["a"].left(s.now));
    s.gateways.remove("a");
    s.start("a", &["a", "b"], Vec::new());
    s.pass(3.0);
    assert_eq!(s.holders(&pair(1)), ["a"]);
}

fn three() -> Sim {
    let mut s = Sim::new(&["a", "b", "c"], &[(pair(1), &["a", "b", "c"]), (pair(2), &["c", "a", "b"])]);
    s.pass(1.0);
    s
}

#[test]
fn what_is_not_in_place_no_third_gateway_says() {
    let mut s = three();
    s.place = Duration::from_millis(500);
    s.gateways.get_mut("a").unwrap().leave();
    while !s.gateways["b"].holds(&pair(1)) {
        s.step();
    }
    let claimed = s.now;
    while s.now < claimed + s.place {
        assert_eq!(s.holders(&pair(1)), ["a", "b"], "the one that leaves carries on");
        assert!(NODES.iter().all(|n| s.follows[&((*n).to_owned(), pair(1))].owner == "a"));
        assert_eq!(s.gateways["c"].owner(&pair(1)).unwrap().owner, "a");
        s.step();
    }
    s.pass(0.2);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    assert!(["a", "c"].iter().all(|g| s.gateways[*g].owner(&pair(1)).unwrap().owner == "b"));
    s.pass(0.2);
    assert!(s.gateways["a"].left(s.now));
}

#[test]
fn nobody_waits_longer_than_a_second_for_what_is_not_in_place() {
    let mut s = three();
    s.place = Duration::from_secs(100);
    s.gateways.get_mut("a").unwrap().leave();
    s.pass(1.0);
    assert_eq!(s.holders(&pair(1)), ["a", "b"]);
    s.pass(0.5);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    assert_eq!(s.gateways["c"].owner(&pair(1)).unwrap().owner, "b");
}

#[test]
fn a_claim_that_never_came_into_place_is_beaten() {
    let mut s = three();
    s.place = Duration::from_secs(100);
    s.gateways.get_mut("a").unwrap().leave();
    while !s.gateways["b"].holds(&pair(1)) {
        s.step();
    }
    // The new owner leaves too, and the third one knows its claim only as one to come.
    s.gateways.get_mut("b").unwrap().leave();
    s.pass(0.2);
    assert_eq!(s.epoch("c", &pair(1)), 3);
}

#[test]
fn a_decision_notices_what_beats_have_said() {
    let mut s = three();
    let now = s.now;
    let c = s.gateways.get_mut("c").unwrap();
    assert!(!c.tick(now));
    let claim = Claim { pair: pair(1), owner: "b".into(), epoch: 9, held: true };
    c.beat("b", &Beat { able: true, claims: vec![claim], ..Beat::default() }, now);
    assert!(c.tick(now) && !c.tick(now));
}

#[test]
fn one_that_nobody_has_found_takes_nothing_from_whom_it_cannot_hear() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.remove("a");
    s.pass(3.0);
    // It comes back, and no way leads to it yet: not the other one's, and no agent's.
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    s.deaf = NODES.iter().map(|n| ((*n).to_owned(), "a".to_owned())).collect();
    s.start("a", &["a", "b"], Vec::new());
    for _ in 0..145 {
        s.step();
        assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["b"], vec!["b"]), "{:?}", s.now);
    }
    // One that never was is not waited for any longer.
    s.pass(1.0);
    assert!(s.gateways["a"].holds(&pair(1)));
}

#[test]
fn one_that_nobody_has_found_waits_for_nobody_who_ends_and_for_nobody_whom_it_heard() {
    let s = two();
    let now = s.now;
    let alone = |prepare: &dyn Fn(&mut Ownership)| {
        let mut o = Ownership::new("a", ["b".to_owned()], now);
        o.set_pairs(s.pairs.clone());
        o.set_able(true);
        prepare(&mut o);
        let late = now + Duration::from_millis(2500);
        o.tick(late);
        o.holds(&pair(1))
    };
    assert!(!alone(&|_| ()));
    assert!(alone(&|o| o.set_peers([Listed { terminating: true, ..listed("b") }], now)));
    assert!(alone(&|o| o.beat("b", &Beat { able: true, ..Beat::default() }, now)), "it was heard, and is silent");
    // An agent says that it is not there.
    assert!(alone(&|o| o.seen("n1", ["a".to_owned()].into(), [])));
    assert!(!alone(&|o| o.seen("n1", ["a", "b"].map(String::from).into(), [])));
    // One that has only just started sees nobody yet.
    assert!(!alone(&|o| o.seen("n1", BTreeSet::new(), [])));
    assert!(!alone(&|o| o.seen("n1", ["b".to_owned()].into(), [])));
}

#[test]
fn an_agent_that_has_only_just_started_is_no_witness_of_a_death() {
    let s = two();
    let mut o = Ownership::new("a", ["b".to_owned()], s.now);
    o.set_pairs(s.pairs.clone());
    o.set_able(true);
    let claims = [1, 2].map(|n| Claim { pair: pair(n), owner: "b".into(), epoch: 4, held: true }).into();
    o.beat("b", &Beat { able: true, claims, ..Beat::default() }, s.now);
    o.seen("n1", ["a", "b"].map(String::from).into(), []);
    // Its agent is updated, and looks for gateways; two gateways do not hear each other.
    o.seen("n2", BTreeSet::new(), []);
    let late = s.now + Duration::from_secs(3);
    o.tick(late);
    assert!(!o.holds_any());
    o.seen("n2", ["a".to_owned()].into(), []);
    o.tick(late);
    assert!(o.holds(&pair(1)) && o.holds(&pair(2)), "half of them do not see it");
}

#[test]
fn agents_that_see_the_owner_alone_are_witnesses_of_its_life() {
    let s = two();
    let mut o = Ownership::new("a", ["b".to_owned()], s.now);
    o.set_pairs(s.pairs.clone());
    o.set_able(true);
    let claims = [1, 2].map(|n| Claim { pair: pair(n), owner: "b".into(), epoch: 4, held: true }).into();
    o.beat("b", &Beat { able: true, claims, ..Beat::default() }, s.now);
    // Nothing gets from this gateway to most of the nodes.
    for (node, sees) in [("n1", "b"), ("n2", "b"), ("n3", "a")] {
        o.seen(node, [sees.to_owned()].into(), []);
    }
    o.tick(s.now + Duration::from_secs(3));
    assert!(!o.holds_any());
}

#[test]
fn one_that_is_stale_carries_on_until_another_is_in_place() {
    let mut s = three();
    s.place = Duration::from_millis(500);
    s.stale.insert("a".into());
    s.gateways.get_mut("a").unwrap().set_able(false);
    while !s.gateways["b"].holds(&pair(1)) {
        s.step();
    }
    let claimed = s.now;
    while s.now < claimed + s.place {
        assert_eq!(s.holders(&pair(1)), ["a", "b"]);
        s.step();
    }
    s.pass(0.3);
    assert_eq!(s.holders(&pair(1)), ["b"]);
}

#[test]
fn the_only_one_that_could_serve_has_nobody_to_wait_for() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.get_mut("b").unwrap().set_able(false);
    s.pass(0.3);
    s.gateways.get_mut("a").unwrap().leave();
    assert!(s.gateways["a"].left(s.now));
    s.pass(1.0);
    assert_eq!(s.holders(&pair(1)), ["a"]);
}

#[test]
fn an_owner_that_is_not_able_any_more_yields_to_one_that_is() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.get_mut("a").unwrap().set_able(false);
    s.pass(1.8);
    assert_eq!(s.holders(&pair(1)), ["a"], "its agent may come back");
    s.pass(0.6);
    assert_eq!((s.holders(&pair(1)), s.epoch("b", &pair(1))), (vec!["b"], 2));
    s.gateways.get_mut("a").unwrap().set_able(true);
    s.pass(5.0);
    assert_eq!(s.holders(&pair(1)), ["b"], "it does not preempt");
    // Where nobody else could, it keeps what it has.
    s.gateways.get_mut("a").unwrap().set_able(false);
    s.pass(1.0);
    s.gateways.get_mut("b").unwrap().set_able(false);
    s.pass(5.0);
    assert_eq!(s.holders(&pair(1)), ["b"]);
}

#[test]
fn an_epoch_is_never_used_again() {
    let mut s = two();
    s.pass(1.0);
    s.gateways.remove("a");
    s.pass(3.0);
    assert_eq!(s.epoch("b", &pair(1)), 2);
    // Both are gone and know nothing; the nodes still follow epoch 2.
    s.gateways.remove("b");
    s.pass(1.0);
    s.start("a", &["a", "b"], Vec::new());
    s.pass(3.0);
    assert_eq!((s.holders(&pair(1)), s.epoch("a", &pair(1))), (vec!["a"], 3));
    // With a journal it is known before any agent has spoken.
    let claims = s.gateways["a"].claims();
    let mut o = Ownership::new("a", [], s.now);
    o.recall(claims);
    o.set_pairs(s.pairs.clone());
    o.set_able(true);
    assert!(o.tick(s.now) && o.owner(&pair(1)).unwrap().epoch == 4);
}

#[test]
fn a_candidate_that_is_not_able_is_waited_for_and_then_passed_over() {
    let mut s = two();
    s.gateways.get_mut("a").unwrap().set_able(false);
    let now = s.now;
    let b = s.gateways.get_mut("b").unwrap();
    b.synced("a");
    b.beat("a", &Beat::default(), now);
    // Nodes follow the first of the order until somebody has claimed it.
    b.seen("n1", ["a", "b"].map(String::from).into(), [(pair(1), 0), (pair(2), 0)]);
    b.tick(now);
    assert!(!b.holds(&pair(1)) && b.holds(&pair(2)));
    for i in 0..120 {
        let at = now + Duration::from_millis(100 * i);
        b.beat("a", &Beat::default(), at);
        b.tick(at);
        assert_eq!(b.holds(&pair(1)), at >= now + PATIENCE);
    }
}

#[test]
fn one_that_could_not_serve_itself_has_not_waited_for_another() {
    let mut s = two();
    let begun = s.now;
    let b = s.gateways.get_mut("b").unwrap();
    b.set_able(false);
    b.synced("a");
    let able = begun + PATIENCE + Duration::from_secs(2);
    for i in 0..240 {
        let at = begun + Duration::from_millis(100 * i);
        b.set_able(at >= able);
        b.beat("a", &Beat::default(), at);
        b.tick(at);
        assert_eq!((b.holds(&pair(1)), b.holds(&pair(2))), (at >= able + PATIENCE, at >= able), "{i}");
    }
}

#[test]
fn a_node_that_lies_about_epochs_moves_nothing() {
    let mut s = two();
    s.pass(6.0);
    for g in ["a", "b"] {
        let o = s.gateways.get_mut(g).unwrap();
        for _ in 0..3 {
            o.seen("n1", ["a", "b"].map(String::from).into(), [(pair(1), u64::MAX)]);
            o.tick(s.now);
        }
        assert_eq!(o.owner(&pair(1)), Some(Known { owner: "a".into(), epoch: 1 }));
    }
    assert_eq!(s.holders(&pair(1)), ["a"]);
}

#[test]
fn nodes_that_left_the_cluster_are_not_lost() {
    let mut s = two();
    s.pass(1.0);
    let now = s.now + Duration::from_secs(5);
    let a = s.gateways.get_mut("a").unwrap();
    for node in &NODES[1..] {
        a.agent_gone(node, now);
    }
    a.set_nodes(|n| n == "n1");
    a.tick(now);
    assert!(a.holds(&pair(1)));
    a.agent_gone("n1", now);
    a.tick(now);
    assert!(!a.holds(&pair(1)));
}

/// Links of one that is being cut off end one after the other; its own node's agent stays, and sees nobody else.
#[test]
fn one_that_is_being_cut_off_takes_nothing() {
    for held_up in ["n2", "n3", "n4"] {
        let mut s = two();
        s.pass(1.0);
        let (mut now, end) = (s.now, s.now + Duration::from_secs(6));
        let cut = now;
        let a = s.gateways.get_mut("a").unwrap();
        a.seen("n1", ["a".to_owned()].into(), []);
        while now < end {
            now += Duration::from_millis(20);
            let since = now - cut;
            for node in NODES[1..].iter().filter(|n| **n != held_up) {
                if since > Duration::from_millis(1900) {
                    a.agent_gone(node, now);
                }
            }
            if since > Duration::from_millis(2150) {
                a.agent_gone(held_up, now);
            }
            a.tick(now);
            assert!(!a.holds(&pair(2)), "{since:?}");
        }
        assert_eq!(a.owner(&pair(2)), Some(Known { owner: "b".into(), epoch: 1 }));
        assert!(!a.holds(&pair(1)), "who is with the agents takes over");
    }
}

/// An owner goes with most of the nodes at once: whoever hears a third gateway is not the one that is cut off.
#[test]
fn one_that_dies_with_most_agents_is_followed_in_time() {
    let mut s = three();
    assert!(s.gateways["c"].holds(&pair(2)));
    let (mut now, died) = (s.now, s.now);
    let beat = s.beat(&s.gateways["b"]);
    let a = s.gateways.get_mut("a").unwrap();
    while !a.holds(&pair(2)) {
        now += Duration::from_millis(20);
        a.beat("b", &beat, now);
        a.seen("n1", ["a".to_owned(), "b".to_owned()].into(), []);
        if now - died > Duration::from_millis(1900) {
            NODES[1..].iter().for_each(|node| a.agent_gone(node, now));
        }
        a.tick(now);
        assert!(now - died < Duration::from_millis(2500), "it is not followed");
    }
}

/// Also by who has only just begun, and takes at once what nobody holds.
#[test]
fn who_owned_a_pair_before_is_known_until_it_moves_again() {
    let known = |owner: &str, epoch| Known { owner: owner.into(), epoch };
    let stands = |owner: &str, epoch| vec![(pair(1), known(owner, epoch))];
    let mut now = Duration::from_secs(1000);
    let mut o = Ownership::new("new", [], now).recorded(true);
    // The first word is no move, nor is an older one.
    for (owner, epoch, expected) in [
        ("x", 1, None),
        ("y", 2, Some("x")),
        ("y", 2, Some("x")),
        ("x", 1, Some("x")),
        ("z", 3, Some("y")),
        ("z", 4, Some("y")),
    ] {
        o.set_records("p", Some(&stands(owner, epoch)), now);
        now += PLACE;
        o.tick(now);
        assert_eq!(o.before().get(&pair(1)).map(String::as_str), expected, "{owner} {epoch}");
    }
    // The last one's claim was never in place as far as it knows.
    o.set_pairs([(pair(1), vec!["new".to_owned()])].into());
    o.set_records("p", Some(&stands("w", 5)), now);
    o.set_able(true);
    o.api_answered(now);
    o.tick(now);
    assert!(o.writes().iter().any(|w| w.claim == known("new", 6)));
    o.set_records("p", Some(&stands("new", 6)), now);
    assert!(o.holds(&pair(1)));
    assert_eq!(o.before().get(&pair(1)).map(String::as_str), Some("w"));
}

#[test]
fn pairs_that_policy_lost_are_let_go() {
    let mut s = two();
    s.pass(1.0);
    let a = s.gateways.get_mut("a").unwrap();
    a.set_pairs(BTreeMap::new());
    assert!(!a.holds(&pair(1)) && a.claims().is_empty() && a.owner(&pair(1)).is_none());
}

#[test]
fn a_holder_that_is_no_candidate_any_more_serves_until_one_has_the_pair() {
    let mut s = three();
    s.place = Duration::from_millis(500);
    let change = |s: &mut Sim, candidates: &[&str]| {
        s.pairs.insert(pair(1), candidates.iter().map(|g| (*g).to_owned()).collect());
        let pairs = s.pairs.clone();
        s.gateways.values_mut().for_each(|o| o.set_pairs(pairs.clone()));
    };
    // Nobody may: better it than none.
    change(&mut s, &[]);
    s.pass(5.0);
    assert_eq!(s.holders(&pair(1)), ["a"]);
    assert_eq!(s.gateways["b"].owner(&pair(1)).unwrap().owner, "a");
    change(&mut s, &["c"]);
    while !s.gateways["c"].holds(&pair(1)) {
        s.step();
    }
    s.pass(0.3);
    assert_eq!(s.holders(&pair(1)), ["a", "c"], "what the new one needs is not in place yet");
    s.pass(0.5);
    assert_eq!((s.holders(&pair(1)), s.epoch("c", &pair(1))), (vec!["c"], 2));
    // And nobody claims what nobody may.
    change(&mut s, &[]);
    s.gateways.remove("c");
    s.pass(5.0);
    assert!(s.holders(&pair(1)).is_empty());
}

fn noise(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

/// Random deaths, restarts with and without journal, cuts and deaf agents: epochs never fall, no two gateways ever
/// hold a pair at the same epoch for longer than a beat, and once all is well again each pair has one holder, which
/// the nodes follow.
#[test]
fn random_faults_end_in_one_holder() {
    for seed in 1..=40 {
        random_faults(seed, None);
    }
}

/// The same with an API server that answers all the time, late: no epoch of a pair is ever held or recorded for two
/// processes, not even for one and the one that is started in its place.
#[test]
fn random_faults_with_an_api_server_never_use_an_epoch_twice() {
    let (mut written, mut late) = (0, 0);
    for seed in 1..=40 {
        let (w, l) = random_faults(seed, Some(false));
        (written, late) = (written + w, late + l);
    }
    assert!(written > 400 && late > 10, "they were after the same epochs: {written} records, {late} came too late");
}

/// The same with one that fails, too, and clocks that are minutes apart.
#[test]
fn random_faults_of_the_api_server_as_well_end_in_one_holder() {
    for seed in 1..=15 {
        random_faults(seed, Some(true));
    }
}

/// `api`: whether there is an API server, and whether that fails. Gives how many claims that one recorded, and how many came
/// too late.
fn random_faults(seed: u64, api: Option<bool>) -> (u32, u32) {
    let all = ["a", "b", "c"];
    let mut seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let pairs: [(Pair, &[&str]); 2] = [(pair(1), &["a", "b", "c"]), (pair(2), &["c", "a", "b"])];
    let lag = Duration::from_millis(noise(&mut seed) % 4 * 100);
    let mut s = if api.is_some() { with_api(&all, &pairs, lag) } else { Sim::new(&all, &pairs) };
    s.place = Duration::from_millis(noise(&mut seed) % 4 * 200);
    let mut journals: BTreeMap<String, Vec<Claim>> = BTreeMap::new();
    let mut clash: BTreeMap<(Pair, u64), u32> = BTreeMap::new();
    // Who held or recorded which epoch, with the number of its process.
    let mut ever: BTreeMap<(Pair, u64), (String, u32)> = BTreeMap::new();
    let mut lives: BTreeMap<String, u32> = BTreeMap::new();
    let mut recorded: BTreeMap<Pair, Known> = BTreeMap::new();
    let mut before = s.follows.clone();
    for _ in 0..150 {
        let name = all[noise(&mut seed) as usize % 3];
        let other = all[noise(&mut seed) as usize % 3];
        let node = NODES[noise(&mut seed) as usize % 4];
        match noise(&mut seed) % if api == Some(true) { 12 } else { 8 } {
            0 => {
                let hears = noise(&mut seed).is_multiple_of(2);
                if let Some(o) = if hears { s.kill(name) } else { s.gateways.remove(name) } {
                    journals.insert(name.to_owned(), o.claims());
                }
            }
            1 | 2 if !s.gateways.contains_key(name) => {
                let claims = if noise(&mut seed).is_multiple_of(2) {
                    Vec::new()
                } else {
                    journals.remove(name).unwrap_or_default()
                };
                *lives.entry(name.to_owned()).or_default() += 1;
                s.start(name, &all, claims);
            }
            3 => {
                s.cut.insert((name.to_owned(), other.to_owned()));
                if noise(&mut seed).is_multiple_of(2) {
                    s.refusing.insert((name.to_owned(), other.to_owned()));
                }
            }
            4 => {
                s.cut.clear();
                s.refusing.retain(|(_, whom)| !s.gateways.contains_key(whom));
            }
            5 => drop(s.deaf.insert((node.to_owned(), name.to_owned()))),
            6 => s.deaf.clear(),
            8 => s.api().down = true,
            9 => s.api().refuses = true,
            10 => drop(s.api().cut.insert(name.to_owned())),
            11 => s.api_back(),
            _ => {}
        }
        for _ in 0..noise(&mut seed) % 20 {
            s.step();
            for (key, old) in &before {
                assert!(s.follows[key].epoch >= old.epoch);
            }
            before = s.follows.clone();
            for p in [pair(1), pair(2)] {
                let holders: Vec<&str> = s.holders(&p);
                let mut epochs: Vec<u64> = holders.iter().map(|g| s.epoch(g, &p)).collect();
                if api == Some(false) {
                    for (g, e) in holders.iter().zip(&epochs) {
                        let process = ((*g).to_owned(), lives.get(*g).copied().unwrap_or_default());
                        let first = ever.entry((p.clone(), *e)).or_insert_with(|| process.clone());
                        assert_eq!(*first, process, "two have held {p} at epoch {e}");
                    }
                }
                if let Some(stands) = s.api.as_ref().and_then(|api| api.stands.get(&p)) {
                    let before = recorded.insert(p.clone(), stands.clone());
                    assert!(before.is_none_or(|b| b == *stands || b.epoch < stands.epoch), "an epoch is recorded once");
                }
                let count = epochs.len();
                epochs.sort_unstable();
                epochs.dedup();
                if epochs.len() < count && s.cut.is_empty() {
                    *clash.entry((p.clone(), epochs[0])).or_default() += 1;
                }
            }
        }
    }
    assert!(clash.values().all(|steps| *steps <= 2), "{clash:?}");
    s.cut.clear();
    s.refusing.retain(|(_, whom)| !s.gateways.contains_key(whom));
    s.deaf.clear();
    for name in all {
        if !s.gateways.contains_key(name) {
            s.start(name, &all, Vec::new());
        }
    }
    if api.is_some() {
        s.api_back();
    }
    s.pass(6.0);
    for p in [pair(1), pair(2)] {
        let holders = s.holders(&p);
        assert_eq!(holders.len(), 1, "{holders:?}");
        for node in NODES {
            assert_eq!(s.follows[&(node.to_owned(), p.clone())].owner, holders[0]);
        }
        if let Some(api) = &s.api {
            let (stands, held) = (&api.stands[&p], s.epoch(holders[0], &p));
            assert_eq!((stands.owner.as_str(), stands.epoch), (holders[0], held));
        }
    }
    // And so it stays.
    let owners: Vec<(String, u64)> = [1, 2].map(|i| owner(&s, i)).into();
    s.pass(10.0);
    assert_eq!(owners, [1, 2].map(|i| owner(&s, i)));
    s.api.map_or((0, 0), |api| (api.written, api.late))
}

fn owner(s: &Sim, i: u8) -> (String, u64) {
    let holder = s.holders(&pair(i))[0].to_owned();
    let epoch = s.epoch(&holder, &pair(i));
    (holder, epoch)
}

#[path = "ownership_api_tests.rs"]
mod api;
use api::with_api;
