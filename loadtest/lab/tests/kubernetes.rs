//! The story with an API server as the source, and what happens when that server, or the way to it, is gone.
//!
//! One lab, one test: each step begins where the last one ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "failover/common.rs"]
mod common;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use common::owner_of;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::kube::Guest;
use tidegate_lab::lab::wait_for;
use tidegate_lab::netns::nft;
use tidegate_lab::probe::{Echo, curl, dig};
use tidegate_lab::steady::gaps::{Asked, Recorder};
use tidegate_lab::story::{self, POOL_A, POOL_B, named, of};
use tidegate_lab::{Lab, Options, Scenario};

/// How soon a change holds everywhere, on a busy machine.
const SOON: Duration = Duration::from_secs(15);
/// So long after an edit a gateway that did not hear of it helps at most.
const HELPED: Duration = Duration::from_secs(5);
/// How long the API server is away.
const OUTAGE: Duration = Duration::from_secs(60);
const GATEWAYS: [&str; 2] = ["gw-a", "gw-b"];

#[test]
fn kubernetes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/variants/kubernetes.yaml");
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("kubernetes") };
    let mut lab = Lab::up(Scenario::load(path.as_ref()).unwrap(), &options).unwrap();
    assert_eq!(story::whole(&lab), 0, "surprises");
    people_are_told(&lab);
    names_need_no_gateway(&mut lab);
    the_api_server_is_away(&mut lab);
    the_order_of_objects_decides_nothing(&mut lab);
    a_watch_that_hangs_helps_nobody(&lab);
    let processes = lab.processes().to_vec();
    assert!(["etcd", "kube-apiserver"].iter().all(|name| processes.iter().any(|p| p.name == *name && p.is_alive())));
    lab.down().unwrap();
    assert!(!processes.iter().any(|p| p.is_alive()), "the control plane goes with the lab");
}

/// Whom a server saw; `None` when the pod did not get there.
fn seen(lab: &Lab, pod: &str, family: Family, name: &str) -> Option<IpAddr> {
    curl(&lab.pod(pod), family, &format!("https://{name}/"), &[]).source()
}

fn denied(lab: &Lab, pod: &str, name: &str) -> bool {
    dig(&lab.pod(pod), name, "A", &[]).is_denied()
}

#[track_caller]
fn soon(what: &str, holds: impl Fn() -> bool) {
    assert!(wait_for(SOON, || holds().then_some(())).is_some(), "{what} does not come");
}

/// What the story denied and granted stands where people look.
fn people_are_told(lab: &Lab) {
    let group = "/apis/tidegate.dev/v1alpha1";
    let is = |object: &Value, kind: &str| {
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == kind && c["status"] == "True")
    };
    for path in [
        "namespaces/shop/egresspolicies/web",
        "namespaces/billing/egresspolicies/pay",
        "clusteregresspolicies/platform",
        "egresspools/partner-a",
    ] {
        let good = |o: &Value| is(o, "Accepted") && is(o, "Programmed");
        lab.wait_object(&format!("{group}/{path}"), SOON, good).unwrap();
    }
    let tie = |o: &Value| is(o, "Conflicted");
    lab.wait_object(&format!("{group}/clusteregresspolicies/tie-denies"), SOON, tie).unwrap();
    // The latest denials are kept, and the story has many.
    let (pod, name) = ("shop/web", "other.example.org");
    assert!(denied(lab, pod, name));
    let rule_for = |o: &Value| {
        let denials = o["status"]["denials"].as_array()?;
        let found = denials.iter().find(|d| d["name"] == name && d["pod"] == "web")?;
        found["allowWith"].as_str().map(str::to_owned)
    };
    // What is no condition is written once a minute.
    let minute = Duration::from_secs(75);
    let path = format!("{group}/namespaces/shop/namespaceegresses/tidegate");
    let why = lab.wait_object(&path, minute, |o| rule_for(o).is_some()).unwrap();
    let pair = json!({"pool": "partner-a", "ipv4": POOL_A[0], "ipv6": POOL_A[1]});
    assert!(why["status"]["egress"].as_array().unwrap().contains(&pair), "{why:#}");
    // Pasted as it stands, it allows what was denied.
    let rule = rule_for(&why).unwrap().replace('\n', "\n  ");
    let policy = format!(
        "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: pasted, namespace: shop}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: web}}}}\n  poolRef: {{name: partner-a}}\n  egress:\n  {rule}\n"
    );
    lab.kubectl_with(&["apply", "-f", "-"], &policy).unwrap().success().unwrap();
    soon("what the pasted rule allows", || seen(lab, pod, Family::V4, name) == Some(of(POOL_A, Family::V4)));
    lab.kubectl(&["delete", "egresspolicy", "pasted", "-n", "shop"]).unwrap();
    soon("the pasted rule's end", || denied(lab, pod, name));
    let events =
        lab.kubectl(&["get", "events.v1.events.k8s.io", "-n", "shop", "--field-selector", "reason=EgressDenied"]);
    let events = events.unwrap();
    assert!(events.contains("pod/web"), "{events}");
}

/// With every gateway gone pods reach Services by name, and find out nothing else.
fn names_need_no_gateway(lab: &mut Lab) {
    let service = "backend.untouched.svc.cluster.local";
    let pods = ["shop/web", "guarded/app", "audited/app"];
    // The cluster's DNS sees who asks: a gateway never is the pod.
    let sees = |lab: &Lab, pod: &str, name: &str| {
        let own: Vec<String> = lab.scenario().pod(pod).unwrap().addresses().iter().map(ToString::to_string).collect();
        let asked = lab.queries("cluster").unwrap();
        asked.iter().any(|q| q["name"] == name && own.iter().any(|ip| q["client"] == *ip))
    };
    let added =
        |name: &str| json!({"metadata": {"name": name}, "spec": {"clusterIP": "None", "ports": [{"port": 8080}]}});
    lab.request("POST", "/api/v1/namespaces/untouched/services", &added("late")).unwrap();
    soon("the new Service's name at the nodes", || {
        pods.iter().all(|pod| {
            dig(&lab.pod(pod), "late.untouched.svc.cluster.local", "A", &[]);
            sees(lab, pod, "late.untouched.svc.cluster.local")
        })
    });
    let (absent, outside) = ("www.example.com.shop.svc.cluster.local", "www.example.com");
    assert_eq!(dig(&lab.pod("shop/web"), absent, "A", &[]).status, "NXDOMAIN");
    for gateway in GATEWAYS {
        lab.signal(gateway, Signal::SIGKILL, Some(Duration::from_secs(5))).unwrap();
    }
    let (before, gone) = (lab.queries("internet").unwrap().len(), Instant::now());
    let there = |pod: &str, family: Family| {
        let asked = dig(&lab.pod(pod), service, family.record(), &[]);
        assert_eq!(asked.answers.len(), 1, "{pod}, {family:?}, {:?}: {}", gone.elapsed(), asked.text());
    };
    for pod in pods {
        FAMILIES.iter().for_each(|f| there(pod, *f));
    }
    soon("an answer for what is not there", || {
        pods.iter().all(|pod| dig(&lab.pod(pod), absent, "A", &["+time=1"]).status == "NXDOMAIN")
    });
    let server = |family: Family| {
        let dns = lab.scenario().cluster_dns_servers();
        format!("@{}", dns.iter().find(|a| a.is_ipv4() == (family == Family::V4)).unwrap().ip())
    };
    for pod in pods {
        for family in FAMILIES {
            let at = server(family);
            let asks = |name: &str, more: &[&str]| dig(&lab.pod(pod), name, "A", &[&[at.as_str()], more].concat());
            there(pod, family);
            assert_eq!(asks("BACKEND.Untouched.svc.cluster.LOCAL", &["+bufsize=1232"]).answers.len(), 1);
            let no = asks(absent, &["+dnssec"]);
            assert_eq!((no.status.as_str(), no.soa), ("NXDOMAIN", false));
            for (name, more) in [(outside, &[][..]), (service, &["+tcp"]), ("53.1.244.10.in-addr.arpa", &[])] {
                assert_eq!(asks(name, &[more, &["+time=1"]].concat()).status, "", "{pod} {name} {more:?}");
            }
            // As programs do it, by the search list of resolv.conf.
            for name in ["backend.untouched", service] {
                let begun = Instant::now();
                let seen = curl(&lab.pod(pod), family, &format!("http://{name}:8080/"), &[]).source();
                assert!(
                    seen.is_some() && begun.elapsed() < Duration::from_secs(2),
                    "{pod} {name}: {:?}",
                    begun.elapsed()
                );
            }
        }
        assert_eq!(seen(lab, pod, Family::V4, outside), None);
    }
    let strangers =
        ["shop/web", "guarded/app", "audited/app"].map(|pod| sees(lab, pod, absent) || sees(lab, pod, outside));
    assert_eq!(strangers, [false; 3], "the cluster's DNS might ask others");
    assert_eq!(lab.queries("internet").unwrap().len(), before);
    for gateway in GATEWAYS {
        lab.start(gateway).unwrap();
    }
    GATEWAYS.iter().for_each(|g| lab.wait_ready(g, Duration::from_secs(60)).unwrap());
    soon("what is allowed", || seen(lab, "shop/web", Family::V4, outside) == Some(of(POOL_A, Family::V4)));
    lab.request("DELETE", "/api/v1/namespaces/untouched/services/late", &Value::Null).unwrap();
    soon("the end of the name at the nodes", || {
        let count = |lab: &Lab| {
            lab.queries("cluster").unwrap().iter().filter(|q| q["name"] == "late.untouched.svc.cluster.local").count()
        };
        let own = lab.scenario().pod("shop/web").unwrap().ipv4.unwrap().to_string();
        let before = count(lab);
        dig(&lab.pod("shop/web"), "late.untouched.svc.cluster.local", "A", &[]);
        let asked = lab.queries("cluster").unwrap();
        let last = asked.iter().rfind(|q| q["name"] == "late.untouched.svc.cluster.local").unwrap();
        // The gateway keeps the answer of before for a while.
        count(lab) == before || last["client"] != own
    });
}

/// Drops every packet between gateways' nodes and the API server, and says nothing to either side.
fn cut(lab: &Lab, gateways: &[&str]) {
    let scenario = lab.scenario();
    let nodes = scenario.gateways.iter().filter(|g| gateways.contains(&g.name.as_str()));
    let nodes: Vec<String> = nodes.map(|g| scenario.node(&g.node).unwrap().ipv4.to_string()).collect();
    let nodes = nodes.join(", ");
    let rules = format!(
        "table inet lab-cut {{ chain in {{ type filter hook input priority -300; ip saddr {{ {nodes} }} tcp dport 6443 drop; }};
         chain out {{ type filter hook output priority -300; ip daddr {{ {nodes} }} tcp sport 6443 drop; }}; }}"
    );
    nft(lab.place("control").unwrap().netns(), &rules).unwrap();
}

fn mend(lab: &Lab) {
    nft(lab.place("control").unwrap().netns(), "delete table inet lab-cut").unwrap();
}

/// Last known good while it is away, also for names that nobody asked for before; what changed before they hear of it again
/// holds soon after.
fn the_api_server_is_away(lab: &mut Lab) {
    let pod = "shop/web";
    let mut live: Vec<Echo> = Vec::new();
    for family in FAMILIES {
        assert!(!dig(&lab.pod(pod), "tcp.example.com", family.record(), &[]).answers.is_empty());
        live.push(Echo::connect(&lab.pod(pod), named(family, 12, 7000)).unwrap());
    }
    lab.stop_api_server().unwrap();
    let end = Instant::now() + OUTAGE;
    let mut names = 0;
    while Instant::now() < end {
        for family in FAMILIES {
            names += 1;
            let fresh = format!("outage{names}.one.example.net");
            assert_eq!(seen(lab, pod, family, &fresh), Some(of(POOL_A, family)), "{fresh}");
        }
        assert!(denied(lab, pod, "other.example.org"));
        for echo in &mut live {
            echo.say("still here\n").unwrap();
        }
        for gateway in GATEWAYS {
            assert_eq!(lab.admin(gateway, "/readyz").unwrap().0, 200, "{gateway} serves what it knows");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    // A policy goes, another comes, a namespace's annotation changes: all before any gateway hears of it.
    cut(lab, &GATEWAYS);
    lab.start_api_server().unwrap();
    lab.kubectl(&["delete", "egresspolicy", "revocable", "-n", "shop"]).unwrap();
    let new = json!({
        "apiVersion": "tidegate.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "new"},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "poolRef": {"name": "partner-a"}, "egress": [
            {"name": "neighbour", "toFQDNs": [{"matchName": "neighbour.example.com"}], "toPorts": [{"protocol": "TCP", "port": 443}]},
        ]},
    });
    let policies = "/apis/tidegate.dev/v1alpha1/namespaces/shop/egresspolicies";
    lab.request("POST", policies, &new).unwrap();
    lab.annotate("annotated", &[("tidegate.dev/allow", "www.example.com")]).unwrap();
    assert!(denied(lab, pod, "neighbour.example.com"));
    mend(lab);
    // A connection attempt whose first packets were dropped is tried again after seconds.
    let late = Duration::from_secs(30);
    let told = wait_for(late, || seen(lab, pod, Family::V4, "neighbour.example.com"));
    assert_eq!(told, Some(of(POOL_A, Family::V4)));
    soon("the deletion", || denied(lab, pod, "revoked.example.com"));
    soon("the annotation", || denied(lab, "annotated/app", "api.example.com"));
    for echo in &mut live {
        echo.say("what nobody changed goes on\n").unwrap();
    }
    lab.request("DELETE", &format!("{policies}/new"), &Value::Null).unwrap();
    let file = "shop-revocable.yaml";
    lab.edit_manifest(file, &lab.manifest(file).unwrap()).unwrap();
    soon("the policy", || seen(lab, pod, Family::V4, "revoked.example.com").is_some());
}

/// Two pods claim one address, as when one ends while the next begins. A gateway that saw the old one first and one that was
/// started anew, and got a list in another order, must think the same of it.
fn the_order_of_objects_decides_nothing(lab: &mut Lab) {
    let pod = "shop/worker";
    let ips = lab.scenario().pod(pod).unwrap().addresses();
    // In lists billing comes before shop, and gw-b has only lists. The address is of the other node's range.
    lab.make_pod(&Guest::new("billing/heir", "node-1", "pay", &ips)).unwrap();
    lab.restart("gw-b").unwrap();
    let opinions = || -> Vec<[(bool, String); 4]> {
        let alone = |quiet: &str| {
            lab.signal(quiet, Signal::SIGSTOP, None).unwrap();
            // Its nodes take it for dead, and somebody has its pairs.
            std::thread::sleep(Duration::from_secs(4));
            let names = ["www.example.com", "api.example.com", "bank.example.com", "other.example.org"];
            let said = names.map(|name| {
                let answer = dig(&lab.pod(pod), name, "A", &[]);
                (answer.is_denied(), answer.text())
            });
            lab.signal(quiet, Signal::SIGCONT, None).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            said
        };
        GATEWAYS.iter().map(|quiet| alone(quiet)).collect()
    };
    let both = opinions();
    println!("two pods with one address: {both:?}");
    assert_eq!(both[0], both[1]);
    // The shop's names, and none of billing's: both have answered.
    for said in &both {
        assert_eq!(said.each_ref().map(|(denied, _)| *denied), [false, false, true, true], "{said:?}");
        assert!(said[..2].iter().all(|(_, text)| text.contains("198.51.100.")), "{said:?}");
    }
    lab.delete_pod("billing/heir").unwrap();
    soon("the shop's name", || seen(lab, pod, Family::V4, "www.example.com") == Some(of(POOL_A, Family::V4)));
}

/// Nothing comes by a gateway's watch any more, and nothing says so: its peer knows more, and within 5 s it stands back.
fn a_watch_that_hangs_helps_nobody(lab: &Lab) {
    let pod = "billing/pay";
    let dns = |family: Family| SocketAddr::new(family.pick("10.244.1.53", "fd00:10:244:1::53").parse().unwrap(), 53);
    let asked = Asked { name: "tcp.example.com", dns, to: |family| named(family, 12, 7000) };
    let less = json!({"spec": {"egress": [
        {"name": "rest", "toFQDNs": [{"matchName": "api.example.com"}], "toPorts": [{"protocol": "TCP", "port": 443}]},
    ]}});
    let mut longest = Duration::ZERO;
    for (quiet, other) in [(GATEWAYS[0], GATEWAYS[1]), (GATEWAYS[1], GATEWAYS[0])] {
        soon("billing's pool", || seen(lab, pod, Family::V4, "bank.example.com") == Some(of(POOL_B, Family::V4)));
        cut(lab, &[quiet]);
        let apart = (&lab.pod("untouched/app"), named(Family::V4, 22, 7000));
        let recorder = Recorder::start(&[(lab.pod(pod), asked)], apart);
        // Long enough that a beat or two of the watch are missed.
        std::thread::sleep(Duration::from_secs(2));
        let billing = lab.manifest("billing.yaml").unwrap();
        let begun = Instant::now();
        // Not by kubectl, which takes its time before and after the edit.
        lab.request("PATCH", "/apis/tidegate.dev/v1alpha1/namespaces/billing/egresspolicies/pay", &less).unwrap();
        let stale = wait_for(SOON, || (lab.admin(quiet, "/readyz").unwrap().0 != 200).then_some(()));
        assert!(stale.is_some(), "{quiet} does not notice that it hears nothing");
        soon("the rule's end", || denied(lab, pod, "bank.example.com"));
        // Names are asked of the other one before it has the pairs, and nodes follow it when all is in place there: what begins
        // in between ends when they do.
        soon("the pairs at the other one", || {
            let (owner, _, held) = owner_of(lab, other, POOL_A[0]);
            owner == other && held
        });
        let mark = lab.mark();
        let opened = |r: &Value| r["kind"] == "open" && r["pod"] == "web" && r["sni"] == "api.example.com";
        soon("the other one's egress", || {
            seen(lab, "shop/web", Family::V4, "api.example.com").is_some()
                && lab.audit(other, &mark).unwrap().iter().any(opened)
        });
        for _ in 0..10 {
            assert!(denied(lab, pod, "bank.example.com"), "{quiet} still helps");
            assert!(seen(lab, "shop/web", Family::V4, "api.example.com").is_some(), "the other one serves all");
        }
        // What would come late has come.
        std::thread::sleep((2 * HELPED).saturating_sub(begun.elapsed()));
        for t in recorder.finish() {
            let (names, flows, limit) = (t.names.last(begun), t.flows.last(begun), t.limit(HELPED, begun));
            println!("{quiet} hears nothing: {:?} names for {names:?}, connections for {flows:?}", t.family);
            assert_eq!(t.flows.sources(None), [of(POOL_B, t.family)]);
            assert!(names < limit && flows < limit, "{quiet} helps for longer than {limit:?}");
            longest = longest.max(names);
        }
        mend(lab);
        lab.edit_manifest("billing.yaml", &billing).unwrap();
        lab.wait_ready(quiet, Duration::from_secs(60)).unwrap();
    }
    soon("the rule", || seen(lab, pod, Family::V4, "bank.example.com") == Some(of(POOL_B, Family::V4)));
    // The other one knew at once: the second that is cut off has all pairs.
    assert!(longest > Duration::from_secs(2), "none of them had billing's pair: {longest:?}");
}
