use super::*;

fn object(name: &str) -> Object {
    Object { kind: Kind::EgressPolicy, namespace: "shop".into(), name: name.into() }
}

fn egress(namespace: &str) -> Object {
    Object { kind: Kind::NamespaceEgress, namespace: namespace.into(), name: "tidegate".into() }
}

fn condition(kind: &str, status: &str, generation: i64, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": "R", "observedGeneration": generation, "message": message})
}

fn programmed(status: &str, generation: i64, message: &str, nodes: u32) -> Value {
    json!({"conditions": [condition("Programmed", status, generation, message)], "nodes": {"desired": 9, "programmed": nodes}})
}

fn wanted(list: &[(Object, Value)]) -> Arc<Statuses> {
    let one = |(o, s): &(Object, Value)| (o.clone(), Wanted { uid: "u".into(), status: Arc::new(s.clone()) });
    Arc::new(list.iter().map(one).collect())
}

fn s(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

const TIME: &str = "2026-01-01T00:00:00Z";

/// Plays the API server: takes every write that is due until nothing is, and gives them with their times.
fn play(p: &mut Pace, mut now: Duration, until: Duration) -> Vec<(Duration, Write)> {
    let mut out = Vec::new();
    while now < until {
        match p.next(now, TIME) {
            Next::Write(w) => {
                match &w {
                    Write::Create(_) => p.done(&w, Some(("u", &Value::Null)), now),
                    Write::Status(_, body) => p.done(&w, Some(("u", &body["status"])), now),
                    Write::Delete(..) => p.done(&w, None, now),
                }
                out.push((now, w));
            }
            Next::Wait(d) => now += d,
            Next::Idle => break,
        }
    }
    out
}

#[test]
fn nothing_is_written_that_is_said_already() {
    let mut p = Pace::default();
    let mut said = programmed("True", 1, "9 of 9", 9);
    said["conditions"][0]["lastTransitionTime"] = "2020-01-01T00:00:00Z".into();
    said["somebody"] = "else".into();
    p.learn(object("a"), "u", &said);
    p.want(wanted(&[(object("a"), programmed("True", 1, "9 of 9", 9))]), s(0.0));
    assert_eq!(p.next(s(0.0), TIME), Next::Idle);
    // Of another object of the same name nothing is known.
    p.learn(object("a"), "other", &said);
    p.want(wanted(&[(object("a"), programmed("True", 1, "9 of 9", 9))]), s(0.0));
    assert!(matches!(p.next(s(0.0), TIME), Next::Write(Write::Status(..))));
}

#[test]
fn an_object_that_was_made_anew_is_not_written_to_in_a_loop() {
    let mut p = Pace::default();
    let wish = |uid: &str| {
        let wanted = Wanted { uid: uid.into(), status: Arc::new(programmed("True", 1, "9 of 9", 9)) };
        Arc::new([(object("a"), wanted)].into_iter().collect::<Statuses>())
    };
    p.learn(object("a"), "u", &Value::Null);
    p.want(wish("u"), s(0.0));
    let Next::Write(w) = p.next(s(0.0), TIME) else { panic!("news wait") };
    let Write::Status(_, body) = &w else { panic!("{w:?}") };
    p.done(&w, Some(("new", &body["status"])), s(0.0));
    assert_eq!(p.next(s(1.0), TIME), Next::Wait(s(59.0)));
    // Its own wish finds that all is said.
    p.want(wish("new"), s(2.0));
    assert_eq!(p.next(s(2.0), TIME), Next::Idle);
}

#[test]
fn news_come_at_once_and_the_rest_within_a_minute() {
    for (from, to, after) in [
        (programmed("False", 1, "1 of 9", 1), programmed("True", 1, "9 of 9", 9), 1.0),
        (programmed("True", 1, "9 of 9", 9), programmed("False", 2, "0 of 9", 0), 1.0),
        (programmed("False", 1, "1 of 9", 1), programmed("False", 1, "8 of 9", 8), 60.0),
        // It may be true again in a moment.
        (programmed("True", 1, "9 of 9", 9), programmed("False", 1, "8 of 9", 8), 6.0),
    ] {
        let mut p = Pace::default();
        p.want(wanted(&[(object("a"), from)]), s(0.0));
        assert_eq!(play(&mut p, s(0.0), s(0.9)).len(), 1);
        p.want(wanted(&[(object("a"), to.clone())]), s(1.0));
        // It is asked for again and again, and waits no longer for that.
        p.want(wanted(&[(object("a"), to.clone())]), s(3.0));
        let got = play(&mut p, s(1.0), s(100.0));
        assert_eq!(got.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [s(after)], "{to}");
    }
}

#[test]
fn a_doubt_that_passes_is_never_said() {
    let mut p = Pace::default();
    let good = programmed("True", 1, "9 of 9", 9);
    p.want(wanted(&[(object("a"), good.clone())]), s(0.0));
    play(&mut p, s(0.0), s(0.5));
    p.want(wanted(&[(object("a"), programmed("False", 1, "8 of 9", 8))]), s(1.0));
    p.want(wanted(&[(object("a"), good)]), s(2.0));
    assert_eq!(p.next(s(100.0), TIME), Next::Idle);
}

#[test]
fn ten_writes_a_second_and_the_newest_content_wins() {
    let mut p = Pace::default();
    let all = |generation: i64| {
        let list: Vec<_> =
            (0..200).map(|i| (object(&format!("p{i}")), programmed("False", generation, "x", 0))).collect();
        wanted(&list)
    };
    p.want(all(1), s(0.0));
    let first = play(&mut p, s(0.0), s(5.0));
    assert!((49..=51).contains(&first.len()), "{}", first.len());
    p.want(all(2), s(5.0));
    let rest = play(&mut p, s(5.0), s(60.0));
    // Those that waited are written once, with what is wanted now.
    assert_eq!(rest.len(), 200);
    for pair in rest.windows(2) {
        assert!(pair[1].0 - pair[0].0 >= SPACING);
    }
    let Write::Status(_, body) = &rest[0].1 else { panic!() };
    assert_eq!(body["status"]["conditions"][0]["observedGeneration"], 2);
}

#[test]
fn the_time_of_a_condition_moves_with_its_status_alone() {
    let mut p = Pace::default();
    let said = json!({"conditions": [
        {"type": "Accepted", "status": "True", "reason": "R", "observedGeneration": 1, "message": "m", "lastTransitionTime": "2020-01-01T00:00:00Z"},
        {"type": "Programmed", "status": "False", "reason": "R", "observedGeneration": 1, "message": "m", "lastTransitionTime": "2020-01-01T00:00:00Z"},
    ], "refused": [{"path": "x"}]});
    p.learn(object("a"), "u", &said);
    let now = json!({"conditions": [condition("Accepted", "True", 2, "n"), condition("Programmed", "True", 2, "n")]});
    p.want(wanted(&[(object("a"), now)]), s(0.0));
    let Next::Write(Write::Status(_, body)) = p.next(s(0.0), TIME) else { panic!() };
    let times: Vec<_> = (0..2).map(|i| body["status"]["conditions"][i]["lastTransitionTime"].clone()).collect();
    assert_eq!(times, ["2020-01-01T00:00:00Z", TIME]);
    // What is no more is taken away.
    assert_eq!(body["status"].get("refused"), Some(&Value::Null));
}

#[test]
fn what_tidegate_says_of_a_namespace_comes_and_goes() {
    let mut p = Pace::default();
    p.learn(egress("old"), "u9", &Value::Null);
    p.want(wanted(&[(egress("new"), json!({"isolation": "Isolated"}))]), s(0.0));
    let got: Vec<Write> = play(&mut p, s(0.0), s(9.0)).into_iter().map(|(_, w)| w).collect();
    assert_eq!(
        got,
        [
            Write::Create(egress("new")),
            // Namespaces take turns.
            Write::Delete(egress("old"), "u9".into()),
            Write::Status(egress("new"), json!({"status": {"isolation": "Isolated"}})),
        ]
    );
    // Somebody deleted it: it comes back.
    let write = Write::Status(egress("new"), Value::Null);
    p.want(wanted(&[(egress("new"), json!({"isolation": "Partial"}))]), s(10.0));
    assert!(matches!(p.next(s(10.0), TIME), Next::Write(Write::Status(..))));
    p.missing(&write, s(10.0), 0.5);
    let got: Vec<Write> = play(&mut p, s(10.0), s(20.0)).into_iter().map(|(_, w)| w).collect();
    assert!(matches!(&got[..], [Write::Create(_), Write::Status(..)]), "{got:?}");
}

#[test]
fn one_object_that_is_refused_holds_up_no_other() {
    let mut p = Pace::default();
    p.want(wanted(&[(object("a"), json!({"nodes": 1})), (object("b"), json!({"nodes": 1}))]), s(0.0));
    let Next::Write(a) = p.next(s(0.0), TIME) else { panic!() };
    p.refused(&a, s(0.0), 0.5);
    let Next::Write(b) = p.next(s(0.1), TIME) else { panic!() };
    assert_eq!(b.object(), &object("b"));
    p.done(&b, Some(("u", &json!({"nodes": 1}))), s(0.1));
    // The same wish does not make it come sooner; each failure makes it later.
    p.want(wanted(&[(object("a"), json!({"nodes": 2})), (object("b"), json!({"nodes": 1}))]), s(0.2));
    assert_eq!(p.next(s(0.2), TIME), Next::Wait(s(0.8)));
    let Next::Write(a) = p.next(s(1.0), TIME) else { panic!() };
    assert_eq!(a, Write::Status(object("a"), json!({"status": {"nodes": 2}})));
    p.refused(&a, s(1.0), 0.5);
    assert_eq!(p.next(s(1.5), TIME), Next::Wait(s(1.5)));
}

#[test]
fn an_outage_is_waited_out() {
    let mut p = Pace::default();
    p.want(wanted(&[(object("a"), json!({"nodes": 1}))]), s(0.0));
    let mut now = s(0.0);
    let mut waits = Vec::new();
    for _ in 0..9 {
        let Next::Write(w) = p.next(now, TIME) else { panic!() };
        p.unanswered(&w, now, 0.5);
        let Next::Wait(wait) = p.next(now, TIME) else { panic!() };
        waits.push(wait.as_secs());
        now += wait;
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    p.want(wanted(&[(object("a"), json!({"nodes": 7}))]), now);
    let Next::Write(w) = p.next(now, TIME) else { panic!() };
    assert_eq!(w, Write::Status(object("a"), json!({"status": {"nodes": 7}})));
}

#[test]
fn a_loud_namespace_delays_no_other() {
    let mut p = Pace::default();
    let policy = |namespace: &str, n: usize| Object { namespace: namespace.into(), ..object(&format!("p{n}")) };
    let mut all: Vec<_> = (0..500).map(|n| (policy("loud", n), programmed("True", 1, "9 of 9", 9))).collect();
    p.want(wanted(&all), s(0.0));
    assert_eq!(play(&mut p, s(0.0), s(5.0)).len(), 50);
    // A second one, and an object of the cluster, come while hundreds wait.
    let cluster = Object { kind: Kind::ClusterEgressPolicy, namespace: String::new(), name: "base".into() };
    all.extend(
        [policy("quiet", 0), policy("quiet", 1), cluster.clone()].map(|o| (o, programmed("True", 1, "9 of 9", 9))),
    );
    p.want(wanted(&all), s(5.0));
    let next: Vec<Object> = play(&mut p, s(5.0), s(5.55)).into_iter().map(|(_, w)| w.object().clone()).collect();
    let of = |o: &Object| next.iter().position(|n| n == o);
    assert!(of(&policy("quiet", 0)).is_some_and(|at| at < 2) && of(&cluster).is_some_and(|at| at < 2), "{next:?}");
    assert!(of(&policy("quiet", 1)).is_some() && next.iter().any(|o| o.namespace == "loud"), "{next:?}");
}

#[test]
fn memory_of_turns_has_an_end() {
    let mut p = Pace::default();
    for n in 0..3 * REMEMBERED {
        p.serve(n.to_string());
    }
    assert!(p.served.len() <= REMEMBERED);
}

/// What stays the same value costs nothing: with 10,000 namespaces it is wished anew every second.
#[test]
fn a_wish_costs_what_is_new() {
    let one = |n: usize| {
        (
            egress(&format!("ns{n}")),
            json!({"mode": "Enforce", "denials": [{"pod": "p", "count": n}], "conditions": [condition("Programmed", "True", 1, "m")]}),
        )
    };
    let all = wanted(&(0..10_000).map(one).collect::<Vec<_>>());
    let mut p = Pace::default();
    let started = std::time::Instant::now();
    p.want(all.clone(), s(0.0));
    let first = started.elapsed();
    assert_eq!(p.queue.len(), 10_000);
    p.wanted.keys().for_each(|o| {
        p.due.remove(o);
    });
    p.queue.clear();
    let mut next = Statuses::clone(&all);
    let changed = Wanted { uid: "u".into(), status: Arc::new(one(7).1) };
    next.insert(egress("ns7"), changed);
    let started = std::time::Instant::now();
    p.want(Arc::new(next), s(1.0));
    println!("10,000 new ones: {first:?}, one of them changed: {:?}", started.elapsed());
    // The one that changed, by itself: nothing else was looked at.
    assert_eq!(p.queue.len(), 1);
}
