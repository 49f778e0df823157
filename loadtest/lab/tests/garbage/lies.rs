//! Resolvers that lie, are late, or are gone.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use tidegate_lab::Lab;
use tidegate_lab::lab::wait_for;
use tidegate_lab::liar::{self, Liar};
use tidegate_lab::probe::{Echo, Knock, dig, knock};

use crate::{GATEWAYS, LIAR, MUTE, unaffected, up};

/// What one query may take when its resolver is lost, with some patience for a busy machine.
const FAILURE: Duration = Duration::from_secs(7);

/// A rule for names of the test's own resolvers.
fn allow_lies(lab: &Lab) {
    let text = r#"
apiVersion: tidegate.dev/v1alpha1
kind: EgressPolicy
metadata: {name: lies, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  poolRef: {name: partner-a}
  egress:
  - name: lies
    toFQDNs: [{matchPattern: "*.lies.example.com"}, {matchPattern: "*.mute.example.com"}, {matchPattern: "*.void.example.com"}]
    toPorts: [{protocol: TCP, port: 7000}]
    sni: Unchecked
"#;
    lab.edit_manifest("lies.yaml", text).unwrap();
    let known = wait_for(Duration::from_secs(10), || {
        (dig(&lab.pod("shop/web"), "known.lies.example.com", "A", &[]).status == "NOERROR").then_some(())
    });
    assert!(known.is_some(), "the policy is in force");
}

/// A resolver that lies is caught: a reason, no fact, no packet.
#[test]
fn a_lying_resolver_teaches_nothing() {
    let (_one, lab, before) = up("lies");
    let _liar = Liar::start(lab.place("internet").unwrap().netns(), LIAR).unwrap();
    allow_lies(&lab);
    let web = lab.pod("shop/web");
    let to = |lie: &str| SocketAddr::new(liar::address(lie).into(), 7000);
    let watches: Vec<_> = liar::FATAL.iter().map(|l| (*l, lab.watch(liar::address(l).into(), "").unwrap())).collect();
    let mark = lab.mark();
    std::thread::scope(|scope| {
        for lie in liar::FATAL {
            let (web, lab, mark) = (&web, &lab, &mark);
            scope.spawn(move || {
                let name = format!("{lie}.lies.example.com");
                let started = Instant::now();
                let seen = dig(web, &name, "A", &["+time=9"]);
                assert_eq!(seen.status, "SERVFAIL", "{lie}: {}", seen.text());
                assert!(started.elapsed() < FAILURE, "{lie}: {:?}", started.elapsed());
                let fits = |r: &serde_json::Value| r["kind"] == "dns" && r["name"] == *name;
                let record = lab.wait_audit(&GATEWAYS, mark, fits);
                assert_eq!(record.unwrap()["reason"], "dns-upstream", "{lie}");
                assert_eq!(knock(web, to(lie)).unwrap(), Knock::Silent, "{lie} taught an address");
            });
        }
    });
    for (lie, watch) in &watches {
        assert_eq!(watch.packets().unwrap(), 0, "{lie}: a packet left");
    }
    // The first answer counts, and there is no other to its question.
    let seen = dig(&web, "twice.lies.example.com", "A", &[]);
    assert_eq!(seen.answers, [liar::address("twice").to_string()], "{}", seen.text());
    let second = SocketAddr::new(liar::SECOND.into(), 7000);
    assert_eq!(knock(&web, second).unwrap(), Knock::Silent, "a second answer taught an address");
    // Of many addresses as many are learnt as a name may have; of those that nobody may have, none.
    let many = dig(&web, "many.lies.example.com", "A", &["+tcp"]);
    assert_eq!((many.status.as_str(), many.answers.len()), ("NOERROR", 64), "{}", many.text());
    let kept = |n: u16| many.answers.contains(&format!("198.52.{}.{}", n >> 8, n & 255));
    let left_out = (0..liar::MANY).find(|n| !kept(*n)).unwrap();
    let [hi, lo] = left_out.to_be_bytes();
    let beyond = SocketAddr::from(([198, 52, hi, lo], 7000));
    assert_eq!(knock(&web, beyond).unwrap(), Knock::Silent, "an address beyond the bound was learnt");
    let seen = dig(&web, "rebind.lies.example.com", "A", &[]);
    assert!(seen.is_no_data(), "{}", seen.text());
    let seen = dig(&web, "mixed.lies.example.com", "A", &[]);
    assert_eq!(seen.answers, [liar::address("mixed").to_string()], "{}", seen.text());
    // A time to live with the top bit set is none (RFC 2181, section 8), and none is no permission for good.
    for lie in liar::BRIEF {
        let name = format!("{lie}.lies.example.com");
        let seen = dig(&web, &name, "A", &[]);
        assert_eq!(seen.answers, [liar::address(lie).to_string()], "{lie}: {}", seen.text());
        Echo::connect(&web, to(lie)).unwrap();
    }
    // The shortest life, 1 s, its grace, 1 s, and the sweep.
    std::thread::sleep(Duration::from_secs(4));
    let mark = lab.mark();
    for lie in liar::BRIEF {
        assert_eq!(knock(&web, to(lie)).unwrap(), Knock::Silent, "{lie} lives on");
        let ip = liar::address(lie).to_string();
        let fits = |r: &serde_json::Value| r["kind"] == "packet" && r["destination"]["asked"]["ip"] == *ip;
        let record = lab.wait_audit(&["node-1", "gw-a", "gw-b"], &mark, fits).unwrap();
        let reason = record["reason"].as_str().unwrap();
        assert!(["binding-expired", "no-binding", "not-allowed"].contains(&reason), "{lie}: {record}");
    }
    unaffected(&lab, &before, "lies");
}

/// A resolver that is gone costs those who ask it a SERVFAIL in bounded time, and nobody else anything.
#[test]
fn an_unreachable_resolver_fails_alone() {
    let (_one, lab, before) = up("mute");
    // Held and never read: no answer, no error. Nobody at all is at the other: ICMP errors.
    let _mute = lab.place("internet").unwrap().within(|| UdpSocket::bind((MUTE, 53))).unwrap().unwrap();
    let liar = Liar::start(lab.place("internet").unwrap().netns(), LIAR).unwrap();
    allow_lies(&lab);
    drop(liar);
    let web = lab.pod("shop/web");
    let mark = lab.mark();
    std::thread::scope(|scope| {
        for of in ["mute", "void"] {
            for n in 0..20 {
                let (web, lab, mark) = (&web, &lab, &mark);
                scope.spawn(move || {
                    let name = format!("n{n}.{of}.example.com");
                    let started = Instant::now();
                    let seen = dig(web, &name, "A", &["+time=12"]);
                    assert_eq!(seen.status, "SERVFAIL", "{name}: {}", seen.text());
                    assert!(started.elapsed() < FAILURE, "{name}: {:?}", started.elapsed());
                    let fits = |r: &serde_json::Value| r["kind"] == "dns" && r["name"] == *name;
                    assert_eq!(lab.wait_audit(&GATEWAYS, mark, fits).unwrap()["reason"], "dns-upstream");
                });
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        let started = Instant::now();
        let seen = dig(&web, "fresh.one.example.net", "A", &[]);
        assert_eq!(seen.status, "NOERROR", "others' names resolve meanwhile: {}", seen.text());
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    });
    unaffected(&lab, &before, "lost resolvers");
}
