//! Life of facts: expiry, idleness, classes, quotas, readers.

use tidegate_policy::Reason;
use tidegate_policy::state::FactValue;

use super::*;
use crate::{Bound, Counts, FactRecord, Quotas};

fn is_empty(s: &Sim) -> bool {
    let c = s.ledger.counts();
    (c.scopes, c.names, c.addresses, c.facts, c.waiting) == (0, 0, 0, 0, 0)
        && s.ledger.usage(OWNER) == crate::Usage::default()
}

#[test]
fn a_fact_holds_for_its_ttl_and_the_grace() {
    for (ttl, life) in [(0, 90), (29, 90), (300, 360), (7200, 3660)] {
        let mut s = Sim::new();
        let start = s.now;
        let (_, out) = s.ask(NODE, "a.example", &[1], ttl);
        let class = s.rules.of(&["a.example"]);
        assert_eq!(locals(&out)[0].value, Some(FactValue { class, ttl: secs(life) }));
        // Ten seconds earlier on the node.
        assert_eq!(pushes(&out, NODE)[0].1[0].value, Some(FactValue { class, ttl: secs(life - 10) }));
        let b = s.bindings();
        assert_eq!(b.is_bound(SCOPE, "a.example", ip(1), start + secs(life) - ms(1)), Bound::Bound);
        assert_eq!(b.is_bound(SCOPE, "a.example", ip(1), start + secs(life)), Bound::Expired);
    }
}

#[test]
fn the_least_binding_of_a_rule_holds() {
    let mut s = Sim::new();
    let (_, out) = s.ask_for(SCOPE, NODE, "a.example", &[1], secs(60), Some(secs(600)));
    assert_eq!(locals(&out)[0].value.map(|v| v.ttl), Some(secs(600)));
    let (_, out) = s.ask_for(SCOPE, NODE, "b.example", &[2], secs(600), Some(secs(60)));
    assert_eq!(locals(&out)[0].value.map(|v| v.ttl), Some(secs(660)));
    let (_, out) = s.ask_for(SCOPE, NODE, "c.example", &[3], secs(600), Some(Duration::MAX));
    assert_eq!(locals(&out)[0].value.map(|v| v.ttl), Some(crate::MAX_BINDING));
}

#[test]
fn a_reply_never_extends_a_fact_but_a_refresh_does() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    // The same RRset from the cache, with less and less left; also below the least TTL.
    for left in [40, 20, 1] {
        s.pass(secs(20) - if left == 1 { secs(1) } else { secs(0) });
        let (t, out) = s.ask(NODE, "a.example", &[1], left);
        assert!(released(&out, t).is_some() && locals(&out).is_empty(), "{out:?}");
    }
    let (_, out) = s.ask(NODE, "a.example", &[1], 60);
    assert_eq!(locals(&out)[0].value.map(|v| v.ttl), Some(secs(120)));
    assert_eq!(pushes(&out, NODE).len(), 1);
}

#[test]
fn an_expired_fact_stays_until_it_is_idle() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    let out = s.pass(secs(120));
    assert_eq!(out, [Output::CheckIdle { scope: SCOPE, ip: ip(1) }]);
    assert_eq!(s.bindings().is_bound(SCOPE, "a.example", ip(1), s.now), Bound::Expired);
    assert_eq!(s.bindings().addresses_of(SCOPE, "a.example", s.now).len(), 0);
    assert_eq!(s.bindings().names_of(SCOPE, ip(1)).len(), 1);
    // Asked again, and nothing else happens to it.
    assert_eq!(s.pass(secs(60)), [Output::CheckIdle { scope: SCOPE, ip: ip(1) }]);
    let out = s.input(Input::Idle { scope: SCOPE, ip: ip(1) });
    assert_eq!(locals(&out).iter().map(|f| f.value).collect::<Vec<_>>(), [None]);
    assert_eq!(pushes(&out, NODE)[0].1[0].value, None);
    assert!(out.contains(&Output::Unbound { scope: SCOPE, ip: ip(1) }));
    assert!(is_empty(&s));
    assert_eq!(s.bindings().is_bound(SCOPE, "a.example", ip(1), s.now), Bound::No);
}

#[test]
fn idle_deletes_nothing_that_holds() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    assert_eq!(s.input(Input::Idle { scope: SCOPE, ip: ip(1) }), []);
    assert_eq!(s.input(Input::Idle { scope: ScopeKey(99), ip: ip(1) }), []);
    assert_eq!(s.ledger.counts().facts, 1);
}

#[test]
fn an_expired_fact_is_swept_after_a_day() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    let out = s.pass(secs(120 + 24 * 3600) - ms(100));
    assert_eq!(locals(&out), []);
    let out = s.pass(ms(100));
    assert!(out.contains(&Output::Unbound { scope: SCOPE, ip: ip(1) }), "{out:?}");
    assert!(!out.iter().any(|o| matches!(o, Output::CheckIdle { .. })));
    assert!(is_empty(&s));
    s.pass(secs(3600));
    assert_eq!(s.ledger.next_deadline(), None);
}

#[test]
fn an_expired_fact_comes_back_with_the_next_answer() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.pass(secs(130));
    let (t, out) = s.ask(NODE, "a.example", &[1], 60);
    assert_eq!(released(&out, t), None);
    let out = s.ack(NODE, &out);
    assert_eq!(released(&out, t), Some(vec![ip(1)]));
    assert_eq!(s.bindings().is_bound(SCOPE, "a.example", ip(1), s.now), Bound::Bound);
    // Idle was on its way meanwhile.
    assert_eq!(s.input(Input::Idle { scope: SCOPE, ip: ip(1) }), []);
}

#[test]
fn an_address_has_the_class_of_all_its_names() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.learn(OTHER, "a.example", &[1], 60);
    s.pass(secs(10));
    let (_, out) = s.ask(NODE, "b.example", &[1], 600);
    let both = s.rules.of(&["a.example", "b.example"]);
    // Every node that has the address learns the class.
    for node in [NODE, OTHER] {
        assert_eq!(pushes(&out, node)[0].1[0].value.map(|v| v.class), Some(both));
    }
    assert_eq!(s.bindings().class_of(SCOPE, ip(1)), Some(both));
    s.ack(NODE, &out);
    // The first name expires but may carry flows: the class stays until the address is idle.
    let out = s.pass(secs(110));
    assert_eq!(out, [Output::CheckIdle { scope: SCOPE, ip: ip(1) }]);
    let out = s.input(Input::Idle { scope: SCOPE, ip: ip(1) });
    let second = s.rules.of(&["b.example"]);
    assert_eq!(locals(&out)[0].value.map(|v| v.class), Some(second));
    assert_eq!(pushes(&out, OTHER)[0].1[0].value.map(|v| v.class), Some(second));
    assert_eq!(s.ledger.counts(), Counts { names: 1, facts: 1, addresses: 1, ..s.ledger.counts() });
}

#[test]
fn an_edit_changes_classes_and_discards_nothing() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1, 2], 60);
    s.learn(OTHER, "a.example", &[2], 60);
    s.rules.0.set(1);
    let out = s.input(Input::Reclassify { scope: Some(SCOPE) });
    let class = s.rules.of(&["a.example"]);
    assert!(locals(&out).iter().all(|f| f.value.is_some_and(|v| v.class == class)));
    assert_eq!((locals(&out).len(), pushes(&out, NODE)[0].1.len(), pushes(&out, OTHER)[0].1.len()), (2, 2, 1));
    assert_eq!(s.ledger.counts().facts, 2);
    // What was confirmed was another class.
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now));
    s.ack(NODE, &out);
    assert!(s.bindings().standing(SCOPE, ip(1), NODE, s.now + secs(60)));
    assert_eq!(s.input(Input::Reclassify { scope: Some(SCOPE) }), []);
}

#[test]
fn an_edit_of_everything_goes_in_slices() {
    let mut s = Sim::new();
    for i in 0..10u128 {
        for n in 0..200 {
            s.ask_for(ScopeKey(i), NODE, &format!("n{n}.example"), &[n as u8], secs(60), None);
        }
    }
    s.rules.0.set(1);
    let first = locals(&s.input(Input::Reclassify { scope: None })).len();
    assert!((1024..1600).contains(&first), "{first}");
    assert_eq!(s.ledger.next_deadline(), Some(s.now));
    // A scope that is still to come is brought up to date before it learns more.
    let (_, out) = s.ask_for(ScopeKey(9), NODE, "n0.example", &[0], secs(60), None);
    let class = s.rules.of(&["n0.example"]);
    assert!(
        locals(&out)
            .iter()
            .any(|f| f.scope == ScopeKey(9) && f.ip == ip(0) && f.value.is_some_and(|v| v.class == class))
    );
    let rest = locals(&out).len() + locals(&s.pass(ms(0))).len();
    assert_eq!(first + rest, 2000);
    assert_ne!(s.ledger.next_deadline(), Some(s.now));
}

#[test]
fn quotas_refuse_and_evict_nobody() {
    let quotas = Quotas { facts: 5, names: 3, addresses_per_name: 2 };
    let mut s = Sim::with(Config { quotas, ..Config::default() });
    let quota = |out: &[Output], t| out.contains(&Output::Fail { ticket: t, reason: Reason::Quota });
    // Addresses per name: what fits is bound and sent.
    let (t, out) = s.ask(NODE, "a.example", &[1, 2, 3], 60);
    let out = s.ack(NODE, &out);
    assert_eq!(released(&out, t), Some(vec![ip(1), ip(2)]));
    let (t, out) = s.ask(NODE, "a.example", &[3], 60);
    assert!(quota(&out, t));
    // Facts.
    s.learn(NODE, "b.example", &[1, 2], 60);
    let (t, out) = s.ask(NODE, "c.example", &[4, 5], 60);
    assert_eq!(released(&s.ack(NODE, &out), t), Some(vec![ip(4)]));
    // Names; what is known goes on.
    let (t, out) = s.ask(NODE, "d.example", &[6], 60);
    assert!(quota(&out, t));
    let (t, out) = s.ask(NODE, "a.example", &[1], 60);
    assert!(released(&out, t).is_some());
    // Another scope of the namespace shares the quota and leaves nothing behind when refused.
    let (t, out) = s.ask_for(ScopeKey(8), NODE, "d.example", &[6], secs(60), None);
    assert!(quota(&out, t));
    assert_eq!(s.ledger.counts().scopes, 1);
    // Room comes back.
    s.pass(secs(120));
    for i in [1, 2, 4] {
        s.input(Input::Idle { scope: SCOPE, ip: ip(i) });
    }
    assert!(is_empty(&s));
    let (t, out) = s.ask(NODE, "d.example", &[6], 60);
    assert!(!quota(&out, t));
}

#[test]
fn scopes_learn_apart() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    let b = s.bindings();
    assert_eq!(b.is_bound(ScopeKey(8), "a.example", ip(1), s.now), Bound::No);
    assert!(!b.standing(ScopeKey(8), ip(1), NODE, s.now));
    assert!(!b.answer_stands(ScopeKey(8), "a.example", &[ip(1)], NODE, s.now, false));
}

#[test]
fn a_scope_that_is_gone_leaves_nothing() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1, 2], 60);
    let (t, _) = s.ask(OTHER, "b.example", &[2, 3], 60);
    let out = s.input(Input::ScopeGone { scope: SCOPE });
    assert!(out.contains(&Output::Fail { ticket: t, reason: Reason::BarrierTimeout }));
    assert_eq!((pushes(&out, NODE)[0].1.len(), pushes(&out, OTHER)[0].1.len()), (2, 2));
    assert!(locals(&out).iter().all(|f| f.value.is_none()));
    assert!(is_empty(&s));
    s.pass(secs(7200));
    assert_eq!(s.ledger.next_deadline(), None);
}

#[test]
fn mapped_addresses_and_duplicates_are_one_address() {
    let mut s = Sim::new();
    let (mut t, _) = s.ask(NODE, "x.example", &[9], 60);
    t += 1000;
    let mapped: IpAddr = "::ffff:203.0.113.1".parse().expect("an address");
    let out = s.input(Input::Answer(Answer {
        ticket: t,
        scope: SCOPE,
        owner: OWNER,
        node: NODE,
        name: name("a.example"),
        addresses: vec![mapped, ip(1), ip(1)],
        ttl: secs(60),
        min_binding: None,
        acked: false,
    }));
    assert_eq!(pushes(&out, NODE)[0].1.len(), 1);
    assert_eq!(released(&s.ack(NODE, &out), t), Some(vec![ip(1)]));
    assert_eq!(s.bindings().is_bound(SCOPE, "a.example", mapped, s.now), Bound::Bound);
}

#[test]
fn readers_see_names_and_addresses() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1, 2], 60);
    s.learn(NODE, "b.example", &[2], 600);
    let b = s.bindings();
    let names: Vec<_> = b.names_of(SCOPE, ip(2)).into_iter().map(|(n, e)| (n.to_string(), e - s.now)).collect();
    assert_eq!(names, [("a.example".to_string(), secs(120)), ("b.example".to_string(), secs(660))]);
    assert_eq!(b.addresses_of(SCOPE, "a.example", s.now).as_slice(), [ip(1), ip(2)]);
    assert_eq!(b.addresses_of(SCOPE, "a.example", s.now + secs(120)).len(), 0);
    assert_eq!(b.is_bound(SCOPE, "b.example", ip(1), s.now), Bound::No);
    // The kernel has both addresses, but the second name has only one.
    assert!(b.standing(SCOPE, ip(1), NODE, s.now + secs(60)));
    assert!(b.answer_stands(SCOPE, "a.example", &[ip(1), ip(2)], NODE, s.now + secs(60), false));
    assert!(!b.answer_stands(SCOPE, "b.example", &[ip(1), ip(2)], NODE, s.now + secs(60), false));
    assert!(!b.answer_stands(SCOPE, "a.example", &[ip(1)], OTHER, s.now, false));
}

#[test]
fn an_export_imported_is_the_same() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1, 2], 60);
    s.pass(secs(100));
    s.learn(OTHER, "b.example", &[2], 600);
    s.pass(secs(30));
    let export = |s: &Sim| {
        let mut v: Vec<FactRecord> = Vec::new();
        s.ledger.export(s.now, |r| v.push(r));
        v
    };
    let facts = export(&s);
    assert_eq!(facts.len(), 3);
    assert_eq!(facts[0].remaining, secs(0));
    let mut t = Sim::bare(Config::default());
    let out = t.input(Input::Import(facts.clone()));
    // The own kernel gets them at once, nodes when they come.
    assert!(locals(&out).len() >= 2 && !out.iter().any(|o| matches!(o, Output::Push { .. })));
    assert_eq!(export(&t), facts);
    assert_eq!(t.bindings().is_bound(SCOPE, "a.example", ip(1), t.now), Bound::Expired);
    let out = t.input(Input::NodeReset { node: NODE });
    assert!(out.contains(&Output::CheckIdle { scope: SCOPE, ip: ip(1) }));
    // The expired fact too: its flows go on.
    let (_, held) = &pushes(&out, NODE)[0];
    assert_eq!(held.len(), 2);
    assert_eq!(held[0].value.map(|v| v.ttl), Some(secs(0)));
    // Once more changes nothing.
    assert_eq!(locals(&t.input(Input::Import(facts.clone()))), []);
    assert_eq!(export(&t), facts);
}

#[test]
fn timers_do_not_pile_up() {
    let mut s = Sim::new();
    for _ in 0..20_000u32 {
        s.learn(NODE, "a.example", &[1], 60);
        s.input(Input::ScopeGone { scope: SCOPE });
    }
    assert!(s.ledger.counts().timers < 2000, "{:?}", s.ledger.counts());
}

#[test]
fn changes_are_told_once_and_say_who_learnt_them() {
    let changes = |s: &mut Sim| {
        let mut v = Vec::new();
        s.ledger.changes(s.now, |r, own| v.push((r.name.as_str().to_owned(), r.nodes, own)));
        v
    };
    let mut s = Sim::with(Config { track: true, ..Config::default() });
    s.learn(NODE, "a.example", &[1], 60);
    assert!(s.ledger.has_changes());
    assert_eq!(changes(&mut s), [("a.example".into(), vec![NODE], true)]);
    // The same RRset again prolongs nothing; another node that has it is news.
    s.learn(NODE, "a.example", &[1], 60);
    assert_eq!(changes(&mut s), []);
    s.learn(OTHER, "a.example", &[1], 60);
    assert_eq!(changes(&mut s), [("a.example".into(), vec![NODE, OTHER], true)]);
    // A peer need not hear back what it said, but the journal must.
    let mut records = Vec::new();
    s.ledger.export(s.now, |r| records.push(r));
    let mut t = Sim::with(Config { track: true, ..Config::default() });
    t.input(Input::Import(records.clone()));
    assert_eq!(changes(&mut t), [("a.example".into(), vec![NODE, OTHER], false)]);
    t.input(Input::Import(records));
    assert!(!t.ledger.has_changes());
    // A fact that is gone before it is asked for is not told, and nothing piles up where nobody asks.
    s.learn(NODE, "b.example", &[2], 60);
    s.input(Input::ScopeGone { scope: SCOPE });
    assert_eq!(changes(&mut s), []);
    let mut u = Sim::new();
    u.learn(NODE, "a.example", &[1], 60);
    assert!(!u.ledger.has_changes());
}
