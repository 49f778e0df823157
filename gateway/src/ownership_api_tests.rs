//! The rules of failover with an API server, and with peers that come and go.

use super::*;

fn known(owner: &str, epoch: u64) -> Known {
    Known { owner: owner.into(), epoch }
}

/// Clocks are minutes apart, as they may be.
pub(super) fn with_api(names: &[&str], pairs: &[(Pair, &[&str])], lag: Duration) -> Sim {
    let mut s = Sim::new(&[], pairs);
    s.api = Some(Api { lag, ..Api::default() });
    s.skew = names.iter().zip(0..).map(|(n, i)| ((*n).to_owned(), Duration::from_secs(i * 300))).collect();
    for name in names {
        s.start(name, names, Vec::new());
    }
    s
}

/// `a` and `b` have one pair each, recorded.
fn two() -> Sim {
    let mut s = with_api(&["a", "b"], &[(pair(1), &["a", "b"]), (pair(2), &["b", "a"])], Duration::from_millis(100));
    s.pass(1.0);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["a"], vec!["b"]));
    s
}

fn stands(s: &Sim, i: u8) -> Known {
    s.api.as_ref().unwrap().stands[&pair(i)].clone()
}

/// Both gateways live, and neither they nor half of the agents can say so to the other one.
fn split(s: &mut Sim) {
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    s.deaf = [("n1", "b"), ("n2", "b"), ("n3", "a"), ("n4", "a")].map(|(n, g)| (n.to_owned(), g.to_owned())).into();
}

#[test]
fn a_claim_is_made_when_it_is_recorded() {
    let lag = Duration::from_millis(200);
    let mut s = with_api(&["a", "b"], &[(pair(1), &["a", "b"])], lag);
    while s.holders(&pair(1)).is_empty() {
        s.step();
        assert!(s.now < Duration::from_secs(1002));
        assert!(s.holders(&pair(1)).is_empty() || stands(&s, 1) == known("a", 1));
    }
    s.pass(3.0);
    assert_eq!(s.holders(&pair(1)), ["a"]);
    assert_eq!((s.api().written, s.api().late), (1, 0), "one write, and no more");
}

#[test]
fn the_dead_owner_is_followed_in_time_and_a_returning_one_reads_who_it_is() {
    let mut s = two();
    s.gateways.remove("a");
    s.pass(1.8);
    assert!(s.holders(&pair(1)).is_empty());
    s.pass(0.7);
    assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["b"], known("b", 2)));
    s.start("a", &["a", "b"], Vec::new());
    s.pass(10.0);
    assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["b"], known("b", 2)));
}

#[test]
fn an_owner_that_lost_only_the_api_server_keeps_serving() {
    let mut s = two();
    s.api().cut.insert("a".into());
    s.pass(20.0);
    assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["a"], known("a", 1)));
    assert!(s.gateways["a"].api_silent(s.local("a")) && !s.gateways["b"].api_silent(s.local("b")));
    s.api_back();
    s.pass(5.0);
    assert_eq!((owner(&s, 1), owner(&s, 2)), (("a".into(), 1), ("b".into(), 1)), "nothing moved");
}

#[test]
fn an_owner_that_lost_everything_withdraws() {
    let mut s = two();
    s.api().cut.insert("a".into());
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    s.deaf = NODES.iter().map(|n| ((*n).to_owned(), "a".to_owned())).collect();
    s.pass(2.8);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["b"], vec!["b"]));
    s.cut.clear();
    s.deaf.clear();
    s.api_back();
    s.pass(5.0);
    assert_eq!((owner(&s, 1), owner(&s, 2)), (("b".into(), 2), ("b".into(), 1)));
}

#[test]
fn one_that_lost_its_peers_and_agents_serves_until_another_is_recorded() {
    let mut s = two();
    s.cut = [("a", "b"), ("b", "a")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
    s.deaf = NODES.iter().map(|n| ((*n).to_owned(), "a".to_owned())).collect();
    // Nobody can take over: its words to the API server are lost.
    s.api().cut.insert("b".into());
    s.api().refuses = true;
    s.gateways.remove("b");
    s.pass(10.0);
    assert_eq!(s.holders(&pair(1)), ["a"]);
    // And it takes nothing itself: it may be the one that is away.
    assert!(s.holders(&pair(2)).is_empty());
    s.api_back();
    let (now, stands) = (s.local("a"), [(pair(1), known("b", 2))]);
    let a = s.gateways.get_mut("a").unwrap();
    a.set_records("p", Some(&stands), now);
    a.tick(now);
    assert!(!a.holds(&pair(1)));
}

#[test]
fn without_an_api_server_claims_go_by_the_peers_and_are_written_later() {
    let mut s = two();
    s.api().down = true;
    s.pass(5.0);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["a"], vec!["b"]), "that alone moves nothing");
    s.gateways.remove("a");
    s.pass(2.3);
    assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["b"], known("a", 1)));
    s.api_back();
    s.pass(2.0);
    assert_eq!((owner(&s, 1), stands(&s, 1)), (("b".into(), 2), known("b", 2)));
}

#[test]
fn an_api_server_that_dies_with_the_owner_or_does_not_write_costs_less_than_a_second() {
    let take_over = |fault: fn(&mut Api)| {
        let mut s = two();
        s.gateways.remove("a");
        fault(s.api());
        let died = s.now;
        while s.holders(&pair(1)).is_empty() {
            s.step();
        }
        assert_eq!(s.holders(&pair(1)), ["b"]);
        s.now - died
    };
    assert!(take_over(|api| api.down = true) <= Duration::from_millis(2200));
    assert!(take_over(|api| api.refuses = true) <= Duration::from_millis(2900));
}

#[test]
fn of_two_that_take_each_other_for_dead_one_holds_and_they_do_not_fight() {
    let mut s = two();
    split(&mut s);
    let both = |s: &Sim| s.holders(&pair(1)).len() > 1 || s.holders(&pair(2)).len() > 1;
    let mut steps = 0;
    for _ in 0..600 {
        s.step();
        steps += u32::from(both(&s));
    }
    // Each claim is known to the other one only when the API server has said so.
    assert!(steps <= 20, "{steps} steps with two holders");
    // A minute of that: each pair changed hands seven times at most, and not every two seconds.
    assert!((2..=8).contains(&stands(&s, 1).epoch) && (2..=8).contains(&stands(&s, 2).epoch));
    s.cut.clear();
    s.deaf.clear();
    s.pass(2.0);
    let holder = owner(&s, 1);
    assert_eq!(stands(&s, 1), known(&holder.0, holder.1));
    // Once they hear each other nobody waits for longer than silence asks for.
    s.gateways.remove(&holder.0);
    s.pass(2.6);
    assert_eq!(s.holders(&pair(1)).len(), 1);
}

#[test]
fn of_two_heirs_that_do_not_hear_each_other_one_takes_the_epoch() {
    let names = ["a", "b", "c"];
    for lag in [0, 100, 200] {
        let mut s = with_api(&names, &[(pair(1), &["a", "b", "c"])], Duration::from_millis(lag));
        s.pass(1.0);
        s.gateways.remove("a");
        s.cut = [("b", "c"), ("c", "b")].map(|(x, y)| (x.to_owned(), y.to_owned())).into();
        s.deaf = [("n1", "b"), ("n2", "b"), ("n3", "c"), ("n4", "c")].map(|(n, g)| (n.to_owned(), g.to_owned())).into();
        for _ in 0..100 {
            s.step();
            let mut epochs: Vec<u64> = s.holders(&pair(1)).iter().map(|g| s.epoch(g, &pair(1))).collect();
            epochs.sort_unstable();
            assert!(epochs.windows(2).all(|w| w[0] < w[1]), "two hold it at epoch {epochs:?}");
        }
        assert!(!s.holders(&pair(1)).is_empty() && s.api().late > 0, "both wanted it");
    }
}

#[test]
fn of_two_claims_from_an_outage_the_higher_one_is_recorded_and_the_loser_withdraws() {
    let mut s = two();
    s.api().down = true;
    split(&mut s);
    s.pass(5.0);
    assert_eq!((s.holders(&pair(1)), s.holders(&pair(2))), (vec!["a", "b"], vec!["a", "b"]));
    assert_eq!((s.epoch("a", &pair(1)), s.epoch("b", &pair(1))), (1, 2));
    // They still cannot hear each other: only the API server tells them.
    s.api_back();
    s.pass(1.0);
    assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["b"], known("b", 2)));
    assert_eq!((s.holders(&pair(2)), stands(&s, 2)), (vec!["a"], known("a", 2)));
}

#[test]
fn of_equal_epochs_the_smaller_name_is_recorded_as_nodes_follow_it() {
    for first in ["a", "b"] {
        let mut s = two();
        s.api().down = true;
        split(&mut s);
        s.pass(1.0);
        for g in ["a", "b"] {
            let now = s.local(g);
            s.gateways.get_mut(g).unwrap().claim(pair(1), 7, now);
        }
        s.api().stands.insert(pair(1), known(first, 7));
        s.api_back();
        s.pass(1.5);
        assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["a"], known("a", 7)), "{first} was first");
    }
}

#[test]
fn an_epoch_that_somebody_made_up_is_overwritten() {
    let mut s = two();
    s.api().stands.insert(pair(1), known("b", u64::MAX));
    s.api().stands.insert(pair(2), known("nobody", 5));
    s.api_back();
    s.pass(3.0);
    assert_eq!((owner(&s, 1), stands(&s, 1)), (("a".into(), 1), known("a", 1)));
    // A credible one is believed; whoever it names is not there, and the pair goes to the first that is.
    assert_eq!((owner(&s, 2), stands(&s, 2)), (("b".into(), 6), known("b", 6)));
}

#[test]
fn an_epoch_that_only_the_api_server_remembers_is_a_floor() {
    let mut s = two();
    s.gateways.clear();
    s.follows.clear();
    s.api().stands.insert(pair(1), known("old", 41));
    s.start("a", &["a", "b"], Vec::new());
    s.start("b", &["a", "b"], Vec::new());
    s.pass(4.0);
    assert_eq!((owner(&s, 1), stands(&s, 1)), (("a".into(), 42), known("a", 42)));
}

#[test]
fn a_pool_that_is_no_object_has_no_record_to_wait_for() {
    let (s, now) = (two(), Duration::from_secs(7));
    let mut o = Ownership::new("a", [], now).recorded(false);
    o.set_peers([listed("a")], now);
    o.set_pairs(s.pairs.clone());
    o.set_able(true);
    o.tick(now);
    assert!(!o.holds(&pair(1)) && o.writes().len() == 2);
    o.set_records("p", None, now);
    o.tick(now);
    assert!(o.holds(&pair(1)) && o.writes().is_empty());
    // It is made: then the owner is written.
    o.set_records("p", Some(&[]), now);
    o.tick(now);
    let writes: Vec<(u64, Option<Known>)> = o.writes().into_iter().map(|w| (w.claim.epoch, w.over)).collect();
    assert_eq!(writes, [(1, None), (1, None)]);
}

#[test]
fn one_that_leaves_serves_on_although_the_record_names_its_successor() {
    let mut s = two();
    s.place = Duration::from_millis(500);
    s.gateways.get_mut("a").unwrap().leave();
    while stands(&s, 1).owner == "a" {
        s.step();
    }
    let recorded = s.now;
    while s.now < recorded + Duration::from_millis(400) {
        assert!(s.holders(&pair(1)).contains(&"a"));
        s.step();
    }
    s.pass(1.0);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    assert!(s.gateways["a"].left(s.local("a")));
}

#[test]
fn a_pod_that_terminates_is_taken_over_from_while_it_serves() {
    let mut s = two();
    let now = s.local("b");
    let leaving = Listed { terminating: true, ..listed("a") };
    s.gateways.get_mut("b").unwrap().set_peers([leaving, listed("b")], now);
    s.pass(0.6);
    assert_eq!((s.holders(&pair(1)), stands(&s, 1)), (vec!["b"], known("b", 2)));
    s.pass(10.0);
    assert_eq!(s.holders(&pair(1)), ["b"]);
}

#[test]
fn who_is_not_listed_any_more_counts_until_it_is_silent() {
    let mut s = two();
    // The Service was deleted by mistake: everybody is alone in the list.
    for g in ["a", "b"] {
        let now = s.local(g);
        s.gateways.get_mut(g).unwrap().set_peers([listed(g)], now);
    }
    s.pass(10.0);
    assert_eq!((owner(&s, 1), owner(&s, 2)), (("a".into(), 1), ("b".into(), 1)));
    assert!(s.gateways["b"].is_peer("a"));
    // Its pod is gone for good.
    s.gateways.remove("a");
    s.pass(2.6);
    assert_eq!(s.holders(&pair(1)), ["b"]);
    assert!(!s.gateways["b"].is_peer("a"));
}

#[test]
fn a_new_peer_has_its_time_to_speak() {
    let mut s = with_api(&["a"], &[(pair(1), &["a"])], Duration::ZERO);
    s.pass(5.0);
    assert_eq!(owner(&s, 1), ("a".into(), 1));
    // It is first of the order from now on, and takes nothing from who serves.
    s.pairs = BTreeMap::from([(pair(1), vec!["b".into(), "a".into()]), (pair(2), vec!["b".into(), "a".into()])]);
    let now = s.local("a");
    let (a, pairs) = (s.gateways.get_mut("a").unwrap(), s.pairs.clone());
    a.set_peers([listed("a"), listed("b")], now);
    a.set_pairs(pairs);
    s.pass(1.5);
    assert!(s.holders(&pair(2)).is_empty());
    s.start("b", &["a", "b"], Vec::new());
    s.pass(1.0);
    assert_eq!((owner(&s, 1), s.holders(&pair(2))), (("a".into(), 1), vec!["b"]));
}

#[test]
fn nobody_serves_before_it_is_known_who_the_others_are() {
    let now = Duration::from_secs(7);
    let o = Ownership::new("a", [], now).recorded(false);
    assert!(!o.settled(now) && o.settled(now + SILENCE));
    assert!(Ownership::new("a", [], now).settled(now));
}
