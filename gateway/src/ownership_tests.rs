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
    /// What nodes follow: the highest epoch, of equal ones the smaller name.
    follows: BTreeMap<(String, Pair), Known>,
    /// How long it takes until what a gateway claims is in place.
    place: Duration,
    now: Duration,
}

impl Sim {
    fn new(names: &[&str], pairs: &[(Pair, &[&str])]) -> Self {
        let pairs = pairs.iter().map(|(p, c)| (p.clone(), c.iter().map(|g| (*g).to_owned()).collect())).collect();
        let mut sim = Self {
            gateways: BTreeMap::new(),
            pairs,
            cut: BTreeSet::new(),
            deaf: BTreeSet::new(),
            follows: BTreeMap::new(),
            place: Duration::ZERO,
            now: Duration::from_secs(1000),
        };
        for name in names {
            sim.start(name, names, Vec::new());
        }
        sim
    }

    fn start(&mut self, name: &str, all: &[&str], claims: Vec<Claim>) {
        let mut o = Ownership::new(name, all.iter().map(|g| (*g).to_owned()), self.now);
        o.recall(claims);
        o.set_pairs(self.pairs.clone());
        o.set_able(true);
        self.gateways.insert(name.to_owned(), o);
    }

    fn beat(&self, o: &Ownership) -> Beat {
        let placing = o.held.values().any(|since| self.now < *since + self.place);
        Beat { able: o.able, claims: o.claims(), leaving: o.leaving, placing }
    }

    /// Lets 100 ms pass: beats, agents' words, decisions.
    fn step(&mut self) {
        self.now += Duration::from_millis(100);
        let names: Vec<String> = self.gateways.keys().cloned().collect();
        let beats: Vec<(String, Beat)> = self.gateways.iter().map(|(n, o)| (n.clone(), self.beat(o))).collect();
        for (from, beat) in &beats {
            for to in names.iter().filter(|t| *t != from && !self.cut.contains(&((*t).clone(), from.clone()))) {
                if let Some(o) = self.gateways.get_mut(to) {
                    o.synced(from);
                    o.beat(from, beat, self.now);
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
                    if o.held.get(&c.pair).is_some_and(|since| self.now < *since + self.place) {
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
                let o = self.gateways.get_mut(g).unwrap();
                if heard.contains(g) { o.seen(node, heard.clone(), epochs.clone()) } else { o.agent_gone(node) }
            }
        }
        for o in self.gateways.values_mut() {
            o.tick(self.now);
        }
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
fn nothing_moves_while_the_agents_see_the_owner() {
    let mut s = two();
    s.pass(1.0);
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
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
    b.tick(now + Duration::from_secs(1));
    assert!(!b.holds(&pair(1)) && b.holds(&pair(2)));
    for i in 0..120 {
        let at = now + Duration::from_millis(100 * i);
        b.beat("a", &Beat::default(), at);
        b.tick(at);
        assert_eq!(b.holds(&pair(1)), at >= now + PATIENCE);
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
        a.agent_gone(node);
    }
    a.set_nodes(|n| n == "n1");
    a.tick(now);
    assert!(a.holds(&pair(1)));
    a.agent_gone("n1");
    a.tick(now);
    assert!(!a.holds(&pair(1)));
}

#[test]
fn pairs_that_policy_lost_are_let_go() {
    let mut s = two();
    s.pass(1.0);
    let a = s.gateways.get_mut("a").unwrap();
    a.set_pairs(BTreeMap::new());
    assert!(!a.holds(&pair(1)) && a.claims().is_empty() && a.owner(&pair(1)).is_none());
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
    let all = ["a", "b", "c"];
    for seed in 1..=40u64 {
        let mut seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut s = Sim::new(&all, &[(pair(1), &["a", "b", "c"]), (pair(2), &["c", "a", "b"])]);
        s.place = Duration::from_millis(noise(&mut seed) % 4 * 200);
        let mut journals: BTreeMap<String, Vec<Claim>> = BTreeMap::new();
        let mut clash: BTreeMap<(Pair, u64), u32> = BTreeMap::new();
        let mut before = s.follows.clone();
        for _ in 0..150 {
            let name = all[noise(&mut seed) as usize % 3];
            let other = all[noise(&mut seed) as usize % 3];
            let node = NODES[noise(&mut seed) as usize % 4];
            match noise(&mut seed) % 8 {
                0 => {
                    if let Some(o) = s.gateways.remove(name) {
                        journals.insert(name.to_owned(), o.claims());
                    }
                }
                1 | 2 if !s.gateways.contains_key(name) => {
                    let claims = if noise(&mut seed).is_multiple_of(2) {
                        Vec::new()
                    } else {
                        journals.remove(name).unwrap_or_default()
                    };
                    s.start(name, &all, claims);
                }
                3 => drop(s.cut.insert((name.to_owned(), other.to_owned()))),
                4 => s.cut.clear(),
                5 => drop(s.deaf.insert((node.to_owned(), name.to_owned()))),
                6 => s.deaf.clear(),
                _ => {}
            }
            for _ in 0..noise(&mut seed) % 20 {
                s.step();
                for (key, old) in &before {
                    assert!(s.follows[key].epoch >= old.epoch);
                }
                before = s.follows.clone();
                for p in [pair(1), pair(2)] {
                    let mut epochs: Vec<u64> = s.holders(&p).iter().map(|g| s.epoch(g, &p)).collect();
                    let count = epochs.len();
                    epochs.dedup();
                    if epochs.len() < count && s.cut.is_empty() {
                        *clash.entry((p.clone(), epochs[0])).or_default() += 1;
                    }
                }
            }
        }
        assert!(clash.values().all(|steps| *steps <= 2), "{clash:?}");
        s.cut.clear();
        s.deaf.clear();
        for name in all {
            if !s.gateways.contains_key(name) {
                s.start(name, &all, Vec::new());
            }
        }
        s.pass(6.0);
        for p in [pair(1), pair(2)] {
            let holders = s.holders(&p);
            assert_eq!(holders.len(), 1, "{holders:?}");
            for node in NODES {
                assert_eq!(s.follows[&(node.to_owned(), p.clone())].owner, holders[0]);
            }
        }
    }
}
