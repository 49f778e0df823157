//! Streams that come and go.

use tidegate_policy::Reason;

use super::*;

fn snapshot(out: &[Output], to: NodeId) -> Option<(u64, usize)> {
    out.iter().find_map(|o| match o {
        Output::Push { node, seq, snapshot: true, facts } if *node == to => Some((*seq, facts.len())),
        _ => None,
    })
}

#[test]
fn a_node_without_stream_is_steered_after_a_while() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.input(Input::NodeDown { node: NODE });
    // What its kernel confirmed goes on standing.
    let (t, out) = s.ask(NODE, "a.example", &[1], 60);
    assert!(released(&out, t).is_some());
    // New names have to wait, in vain, and nothing is pushed.
    let (t, out) = s.ask(NODE, "b.example", &[2], 60);
    assert!(released(&out, t).is_none() && pushes(&out, NODE).is_empty());
    assert_eq!(s.pass(ms(200)), [Output::Fail { ticket: t, reason: Reason::BarrierTimeout }]);
    s.pass(ms(2200));
    let (t, out) = s.ask(NODE, "c.example", &[3], 60);
    assert!(released(&out, t).is_none());
    assert!(!s.bindings().is_steered(NODE));
    // Those that wait go out with the change.
    assert_eq!(s.pass(ms(100)), [Output::Release { ticket: t, addresses: vec![ip(3)] }]);
    assert!(s.bindings().is_steered(NODE) && !s.bindings().is_steered(OTHER));
    let (t, out) = s.ask(NODE, "d.example", &[4], 60);
    assert!(released(&out, t).is_some() && pushes(&out, NODE).is_empty());
    assert!(s.bindings().answer_stands(SCOPE, "d.example", &[ip(4)], NODE, s.now + secs(60), false));
    assert!(!s.bindings().standing(SCOPE, ip(4), NODE, s.now));
    // It comes back: everything that its pods were told, at once.
    let out = s.input(Input::NodeUp { node: NODE });
    assert_eq!(snapshot(&out, NODE).map(|(_, n)| n), Some(4));
    assert!(!s.bindings().answer_stands(SCOPE, "d.example", &[ip(4)], NODE, s.now + secs(60), false));
    s.ack(NODE, &out);
    assert!(s.bindings().answer_stands(SCOPE, "d.example", &[ip(4)], NODE, s.now + secs(60), false));
}

#[test]
fn what_a_node_would_pass_waits_for_its_ack_however_long_it_is_away() {
    let mut s = Sim::new();
    let ask = |s: &mut Sim, n: &str, i: u8| {
        s.tickets += 1;
        let (ticket, addresses) = (s.tickets, vec![ip(i)]);
        let (ttl, name) = (secs(60), name(n));
        let answer = Answer {
            ticket,
            scope: SCOPE,
            owner: OWNER,
            node: NODE,
            name,
            addresses,
            ttl,
            min_binding: None,
            acked: true,
        };
        (ticket, s.input(Input::Answer(answer)))
    };
    let failed = |t| Output::Fail { ticket: t, reason: Reason::BarrierTimeout };
    let (t, out) = ask(&mut s, "a.example", 1);
    assert_eq!(released(&s.ack(NODE, &out), t), Some(vec![ip(1)]));
    s.input(Input::NodeDown { node: NODE });
    s.pass(ms(2400));
    let (t, out) = ask(&mut s, "b.example", 2);
    assert!(released(&out, t).is_none());
    assert_eq!(s.pass(ms(150)), [failed(t)], "steered");
    let (t, out) = ask(&mut s, "c.example", 3);
    assert!(out.contains(&failed(t)), "at once");
    let stands =
        |s: &Sim, n: &str, i: u8, acked| s.bindings().answer_stands(SCOPE, n, &[ip(i)], NODE, s.now + secs(9), acked);
    assert!(stands(&s, "c.example", 3, false) && !stands(&s, "c.example", 3, true));
    // What it confirmed it holds.
    assert!(stands(&s, "a.example", 1, true));
    let (t, out) = ask(&mut s, "a.example", 1);
    assert!(released(&out, t).is_some());
    let out = s.input(Input::NodeUp { node: NODE });
    s.ack(NODE, &out);
    assert!(stands(&s, "c.example", 3, true));
}

#[test]
fn a_node_that_was_never_seen_counts_as_down_since_the_start() {
    let mut s = Sim::bare(Config::default());
    let (t, out) = s.ask(NODE, "a.example", &[1], 60);
    assert_eq!(released(&out, t), None);
    assert!(s.pass(ms(2500)).contains(&Output::Fail { ticket: t, reason: Reason::BarrierTimeout }));
    for (node, i) in [(NODE, 1), (OTHER, 2)] {
        let (t, out) = s.ask(node, "a.example", &[i], 60);
        assert_eq!(released(&out, t), Some(vec![ip(i)]));
    }
}

#[test]
fn a_reply_that_waits_goes_out_with_the_snapshots_ack() {
    for reset in [false, true] {
        let mut s = Sim::new();
        let (t, lost) = s.ask(NODE, "a.example", &[1], 60);
        s.input(Input::NodeDown { node: NODE });
        let (u, _) = s.ask(NODE, "b.example", &[2], 60);
        s.pass(ms(50));
        let out = s.input(if reset { Input::NodeReset { node: NODE } } else { Input::NodeUp { node: NODE } });
        assert_eq!(snapshot(&out, NODE).map(|(_, n)| n), Some(2));
        // A late ack of the old stream does not speak for the new one.
        assert_eq!(s.ack(NODE, &lost), []);
        let out = s.ack(NODE, &out);
        assert!(released(&out, t).is_some() && released(&out, u).is_some());
    }
}

#[test]
fn a_reset_voids_what_was_confirmed_and_a_return_does_not() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.input(Input::NodeDown { node: NODE });
    s.input(Input::NodeUp { node: NODE });
    assert!(s.bindings().standing(SCOPE, ip(1), NODE, s.now + secs(60)));
    let out = s.input(Input::NodeReset { node: NODE });
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now));
    let (t, waits) = s.ask(NODE, "a.example", &[1], 60);
    assert!(pushes(&waits, NODE).is_empty(), "the snapshot has it");
    assert!(released(&s.ack(NODE, &out), t).is_some());
}

#[test]
fn what_ended_while_a_node_was_away_is_not_in_its_snapshot() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.learn(NODE, "b.example", &[2], 600);
    s.input(Input::NodeDown { node: NODE });
    s.pass(secs(120));
    s.input(Input::Idle { scope: SCOPE, ip: ip(1) });
    let out = s.input(Input::NodeUp { node: NODE });
    assert_eq!(snapshot(&out, NODE).map(|(_, n)| n), Some(1));
}

#[test]
fn an_edit_while_a_node_was_away_arrives_with_its_snapshot() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    s.input(Input::NodeDown { node: NODE });
    s.rules.0.set(1);
    s.input(Input::Reclassify { scope: Some(SCOPE) });
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now));
    let out = s.input(Input::NodeUp { node: NODE });
    let class = s.rules.of(&["a.example"]);
    assert_eq!(pushes(&out, NODE)[0].1[0].value.map(|v| v.class), Some(class));
}

#[test]
fn sequences_rise_by_one_over_all_streams() {
    let mut s = Sim::new();
    let mut seen = vec![1];
    for i in 0..5u8 {
        let (_, out) = s.ask(NODE, &format!("n{i}.example"), &[i], 60);
        seen.extend(pushes(&out, NODE).iter().map(|(s, _)| *s));
        s.input(Input::NodeDown { node: NODE });
        let out = s.input(Input::NodeReset { node: NODE });
        seen.extend(pushes(&out, NODE).iter().map(|(s, _)| *s));
    }
    assert_eq!(seen, (1..=11).collect::<Vec<u64>>());
}

#[test]
fn a_node_that_does_not_ack_gets_one_snapshot_instead_of_more() {
    let mut s = Sim::with(Config { max_unacked: 10, ..Config::default() });
    let mut sent = 0;
    let mut last = 0;
    for i in 0..100u8 {
        let (_, out) = s.ask(NODE, &format!("n{i}.example"), &[i], 600);
        for (seq, facts) in pushes(&out, NODE) {
            sent += facts.len();
            last = seq;
        }
        s.pass(secs(1));
    }
    assert_eq!(sent, 11);
    let (t, _) = s.ask(NODE, "last.example", &[200], 600);
    let out = s.input(Input::Ack { node: NODE, seq: last });
    assert_eq!(released(&out, t), None);
    assert_eq!(snapshot(&out, NODE), Some((last + 1, 101)));
    assert!(released(&s.ack(NODE, &out), t).is_some());
    // And deltas from then on.
    let (_, out) = s.ask(NODE, "next.example", &[201], 600);
    assert_eq!(pushes(&out, NODE)[0].1.len(), 1);
}

#[test]
fn a_scope_that_left_a_node_is_not_kept_up_there() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1, 2], 60);
    s.learn(OTHER, "a.example", &[1], 60);
    let out = s.input(Input::ScopeLeft { scope: SCOPE, node: NODE });
    assert!(pushes(&out, NODE)[0].1.iter().all(|f| f.value.is_none()) && pushes(&out, NODE)[0].1.len() == 2);
    assert!(pushes(&out, OTHER).is_empty() && locals(&out).is_empty());
    assert!(!s.bindings().standing(SCOPE, ip(1), NODE, s.now));
    s.rules.0.set(1);
    let out = s.input(Input::Reclassify { scope: Some(SCOPE) });
    assert!(pushes(&out, NODE).is_empty() && !pushes(&out, OTHER).is_empty());
    assert_eq!(s.input(Input::ScopeLeft { scope: SCOPE, node: NODE }), []);
    // A pod comes back to the node.
    let (_, out) = s.ask(NODE, "a.example", &[1], 60);
    assert_eq!(pushes(&out, NODE)[0].1.len(), 1);
}

#[test]
fn a_node_that_is_gone_is_forgotten_and_may_return() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    let (t, _) = s.ask(NODE, "b.example", &[2], 60);
    let out = s.input(Input::NodeGone { node: NODE });
    assert_eq!(out, [Output::Fail { ticket: t, reason: Reason::BarrierTimeout }]);
    assert_eq!(s.ledger.counts().nodes, 1);
    let out = s.input(Input::NodeReset { node: NODE });
    assert_eq!(snapshot(&out, NODE), Some((1, 0)));
    s.ack(NODE, &out);
    let (t, out) = s.ask(NODE, "a.example", &[1], 60);
    assert!(released(&s.ack(NODE, &out), t).is_some());
    let out = s.input(Input::NodeReset { node: NODE });
    assert_eq!(snapshot(&out, NODE).map(|(_, n)| n), Some(1));
}

#[test]
fn a_node_that_holds_what_nobody_told_this_ledger_of_hears_what_becomes_of_it() {
    let mut s = Sim::new();
    s.learn(NODE, "a.example", &[1], 60);
    let orphans = |facts: &[u8]| Input::Orphans { node: OTHER, facts: facts.iter().map(|n| (SCOPE, ip(*n))).collect() };
    let classes = |out: &[Output]| {
        let said = pushes(out, OTHER).into_iter().flat_map(|(_, f)| f);
        said.map(|f| (f.ip, f.value.map(|v| v.class))).collect::<Vec<_>>()
    };
    // What is known it is told at once, and once.
    let out = s.input(orphans(&[1, 2]));
    assert_eq!(classes(&out), [(ip(1), Some(s.rules.of(&["a.example"])))]);
    assert!(pushes(&out, NODE).is_empty() && locals(&out).is_empty());
    assert!(!s.bindings().standing(SCOPE, ip(1), OTHER, s.now));
    s.ack(OTHER, &out);
    assert!(s.bindings().standing(SCOPE, ip(1), OTHER, s.now));
    assert!(pushes(&s.input(orphans(&[1, 2])), OTHER).is_empty());
    // An edit reaches it.
    s.rules.0.set(1);
    let out = s.input(Input::Reclassify { scope: Some(SCOPE) });
    assert_eq!(classes(&out), [(ip(1), Some(s.rules.of(&["a.example"])))]);
    // What is learnt for another node it hears, too.
    let (_, out) = s.ask(NODE, "b.example", &[2, 3], 60);
    assert_eq!(classes(&out), [(ip(2), Some(s.rules.of(&["b.example"])))]);
    // What it does not name any more counts as before: it holds it, and what is new does not concern it.
    assert!(s.input(orphans(&[9])).is_empty() && s.input(orphans(&[])).is_empty());
    let (_, out) = s.ask(NODE, "c.example", &[2, 9], 60);
    assert_eq!(classes(&out), [(ip(2), Some(s.rules.of(&["b.example", "c.example"])))]);
    // With its stream what it said is gone.
    s.input(orphans(&[8]));
    s.input(Input::NodeDown { node: OTHER });
    s.input(Input::NodeUp { node: OTHER });
    let (_, out) = s.ask(NODE, "d.example", &[8], 60);
    assert!(classes(&out).is_empty() && s.ledger.orphans.is_empty());
}

#[test]
fn gateways_tell_each_other_of_nodes_that_hold_what_nobody_knew_of() {
    let mut s = Sim::with(Config { track: true, ..Config::default() });
    s.learn(NODE, "a.example", &[1], 60);
    s.ledger.changes(s.now, |_, _| {});
    s.input(Input::Orphans { node: OTHER, facts: vec![(SCOPE, ip(1)), (ScopeKey(9), ip(1))] });
    let mut told = Vec::new();
    s.ledger.changes(s.now, |r, own| told.push((r.ip, r.nodes, own)));
    assert_eq!(told, [(ip(1), vec![NODE, OTHER], true)]);
}
