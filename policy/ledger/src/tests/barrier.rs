//! Replies that wait for a kernel, and those that need not.

use tidegate_policy::Reason;

use super::*;

#[test]
fn a_reply_waits_for_the_nodes_ack() {
    let mut s = Sim::new();
    let (t, out) = s.ask(NODE, "a.example", &[1, 2], 60);
    assert_eq!(released(&out, t), None);
    // Own kernel first, only the asking node, one push.
    assert!(matches!(
        out.as_slice(),
        [Output::Local(_), Output::Local(_), Output::Push { node: NODE, seq: 2, snapshot: false, .. }]
    ));
    assert_eq!(s.input(Input::Ack { node: OTHER, seq: 2 }), []);
    assert_eq!(s.input(Input::Ack { node: NODE, seq: 1 }), []);
    assert_eq!(s.input(Input::Ack { node: NODE, seq: 3 }), [], "never sent");
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now));
    let out = s.input(Input::Ack { node: NODE, seq: 2 });
    assert_eq!(out, [Output::Release { ticket: t, addresses: vec![ip(1), ip(2)] }]);
    assert!(s.bindings().standing(SCOPE, ip(1), NODE, s.now + secs(110)));
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now + secs(110) + ms(1)));
    assert_eq!(s.input(Input::Ack { node: NODE, seq: 2 }), []);
}

#[test]
fn an_answer_without_addresses_never_waits() {
    let mut s = Sim::bare(Config::default());
    let (t, out) = s.ask(NODE, "a.example", &[], 60);
    assert_eq!(out, [Output::Release { ticket: t, addresses: vec![] }]);
    assert_eq!(s.ledger.counts().scopes, 0);
}

#[test]
fn what_stands_is_released_at_once() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 20);
    s.pass(secs(21));
    // A refresh: pushed, but the kernel holds the old fact for longer than the reply's TTL.
    let (t, out) = s.ask(NODE, "a.example", &[1], 20);
    assert_eq!(released(&out, t), Some(vec![ip(1)]));
    let push = pushes(&out, NODE);
    assert_eq!(push[0].1[0].value.map(|v| v.ttl), Some(secs(80)));
    s.ack(NODE, &out);
    // A longer TTL is more than what was confirmed.
    s.pass(secs(21));
    let (t, out) = s.ask(NODE, "a.example", &[1], 600);
    assert_eq!(released(&out, t), None);
}

#[test]
fn another_node_asks_for_itself() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    let (t, out) = s.ask(OTHER, "a.example", &[1], 60);
    assert!(pushes(&out, NODE).is_empty() && locals(&out).is_empty());
    assert_eq!(released(&out, t), None);
    assert!(released(&s.ack(OTHER, &out), t).is_some());
}

#[test]
fn two_replies_wait_for_one_push() {
    let mut s = Sim::new();
    let (t, first) = s.ask(NODE, "a.example", &[1], 60);
    let (u, second) = s.ask(NODE, "a.example", &[1], 60);
    assert!(pushes(&second, NODE).is_empty());
    let out = s.ack(NODE, &first);
    assert!(released(&out, t).is_some() && released(&out, u).is_some());
}

#[test]
fn acks_are_cumulative() {
    let mut s = Sim::new();
    let (t, _) = s.ask(NODE, "a.example", &[1], 60);
    let (u, out) = s.ask(NODE, "b.example", &[2], 60);
    let out = s.ack(NODE, &out);
    assert!(released(&out, t).is_some() && released(&out, u).is_some());
    assert!(s.bindings().standing(SCOPE, ip(1), NODE, s.now + secs(60)));
}

#[test]
fn the_wait_is_bounded_and_a_late_ack_still_counts() {
    let mut s = Sim::new();
    let (t, first) = s.ask(NODE, "a.example", &[1], 60);
    assert_eq!(s.pass(ms(199)), []);
    assert_eq!(s.ledger.next_deadline(), Some(s.now + ms(1)));
    assert_eq!(s.pass(ms(1)), [Output::Fail { ticket: t, reason: Reason::BarrierTimeout }]);
    assert_eq!(s.ledger.counts().waiting, 0);
    assert_eq!(s.ack(NODE, &first), []);
    let (t, out) = s.ask(NODE, "a.example", &[1], 60);
    assert_eq!(out, [Output::Release { ticket: t, addresses: vec![ip(1)] }]);
}

#[test]
fn an_outdated_ack_confirms_nothing() {
    let mut s = Sim::new();
    let (_, first) = s.ask(NODE, "a.example", &[1], 60);
    // A second name: another class. The first push's ack says nothing about it.
    let (u, second) = s.ask(NODE, "b.example", &[1], 60);
    let out = s.ack(NODE, &first);
    assert_eq!(released(&out, u), None);
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now));
    assert!(released(&s.ack(NODE, &second), u).is_some());
}

#[test]
fn too_many_waiting_replies_fail() {
    let mut s = Sim::with(Config { max_waiting: 1, ..Config::default() });
    let (_, first) = s.ask(NODE, "a.example", &[1], 60);
    let (u, out) = s.ask(NODE, "b.example", &[2], 60);
    assert!(out.contains(&Output::Fail { ticket: u, reason: Reason::BarrierTimeout }));
    s.ack(NODE, &first);
    assert_eq!(s.ledger.counts().waiting, 0);
}

#[test]
fn time_does_not_run_backwards() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.pass(secs(100));
    s.now -= secs(50);
    let (_, out) = s.ask(NODE, "b.example", &[2], 60);
    assert_eq!(locals(&out)[0].value.map(|v| v.ttl), Some(secs(120)));
    assert_eq!(s.ledger.next_deadline(), Some(s.now + secs(50) + ms(200)));
}
