//! The chained CNI plugin, run as a container runtime runs it: with an agent, without one, and where there never was one. What
//! a pod sends in its first instruction is judged.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use serde_json::{Value, json};
use tidegate_lab::family::{FAMILIES, Family};
use tidegate_lab::lab::wait_for;
use tidegate_lab::observe::Watch;
use tidegate_lab::probe::{curl, dig};
use tidegate_lab::scenario::{Namespace, Pod};
use tidegate_lab::{Lab, Options, Scenario, foreign, netns, world};

static ONE: Mutex<()> = Mutex::new(());
/// What an agent attaches to a pod's device.
const AGENTS: [&str; 2] = ["pod_egress", "pod_ingress"];
const NODE: &str = "node-1";
const READY: Duration = Duration::from_secs(30);
/// What a program in a debug build on a busy machine may take beyond what it waits for.
const SLOW: Duration = Duration::from_millis(900);

fn up(name: &str) -> (MutexGuard<'static, ()>, Lab) {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml");
    let scenario = Scenario::load(file.as_ref()).unwrap();
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique(name) };
    (one, Lab::up(scenario, &options).unwrap())
}

/// What the plugin answered.
struct Answer {
    code: i32,
    text: String,
    took: Duration,
}

/// A pod's network, as the plugins before ours make it: theirs is the result that it hands on.
struct Made {
    pod: Pod,
    uid: String,
    result: Value,
}

fn make(lab: &mut Lab, namespace: &str, name: &str) -> Made {
    let mut pod = Pod::new(namespace, name, NODE);
    pod.labels.insert("app".into(), "web".into());
    let pod = lab.add_network(pod).unwrap();
    let ips: Vec<Value> = pod
        .addresses()
        .iter()
        .map(|ip| json!({"address": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }), "interface": 1}))
        .collect();
    let veth = world::veth(lab.scenario(), &pod);
    let result = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": veth}, {"name": "eth0", "sandbox": "/x"}],
        "ips": ips,
        "dns": {},
    });
    Made { uid: format!("u-{name}"), pod, result }
}

fn configuration(lab: &Lab, result: &Value) -> Value {
    let folder = lab.layout().cni(NODE);
    json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "type": "tidegate-cni",
        "folder": folder.join("run"),
        "standing": folder.join("standing.json"),
        "pins": lab.layout().bpffs().join(NODE),
        "prevResult": result,
    })
}

fn call(lab: &Lab, command: &str, made: &Made) -> Answer {
    call_with(lab, command, made, &configuration(lab, &made.result).to_string())
}

/// Runs the product's own file in the node's network, as a runtime does.
fn call_with(lab: &Lab, command: &str, made: &Made, input: &str) -> Answer {
    let started = Instant::now();
    let pod = &made.pod;
    let (namespace, name, uid) = (&pod.namespace, &pod.name, &made.uid);
    let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}");
    let netns = netns::path(lab.pod(&pod.key()).netns());
    let mut run = Command::new(lab.tidegate());
    run.env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", format!("c-{}-{}", pod.namespace, pod.name))
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", arguments)
        .env("CNI_PATH", "/opt/cni/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = lab.place(NODE).unwrap().within(|| run.spawn()).unwrap().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    Answer { code: out.status.code().unwrap(), text, took: started.elapsed() }
}

/// Adds a pod; what the plugins before gave is handed on.
#[track_caller]
fn add(lab: &Lab, made: &Made) -> Duration {
    let answer = call(lab, "ADD", made);
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert_eq!(serde_json::from_str::<Value>(&answer.text).unwrap(), made.result);
    answer.took
}

fn outside(family: Family) -> IpAddr {
    family.pick("198.51.100.14", "2001:db8:100::14").parse().unwrap()
}

/// Counts, at the router, what pods send to an address that no policy allows.
fn leaks(lab: &Lab) -> Vec<Watch> {
    FAMILIES.iter().map(|f| lab.watch(outside(*f), "").unwrap()).collect()
}

fn leaked(watches: &[Watch]) -> u64 {
    watches.iter().map(|w| w.packets().unwrap()).sum()
}

/// In its first instruction a pod connects out, to an address and to a port that is never allowed; returns whether it got there.
fn gets_out(lab: &Lab, made: &Made, family: Family) -> bool {
    let url = format!("http://{}:8080/", SocketAddr::new(outside(family), 0).to_string().trim_end_matches(":0"));
    curl(&lab.pod(&made.pod.key()), family, &url, &["--max-time", "2"]).source().is_some()
}

/// The same, without a lost packet: a SYN is repeated after a second.
fn gets_out_at_once(lab: &Lab, made: &Made, family: Family) -> bool {
    let url = format!("http://{}/", SocketAddr::new(outside(family), 8080));
    curl(&lab.pod(&made.pod.key()), family, &url, &["--connect-timeout", "0.9"]).source().is_some()
}

/// It reaches a pod of the cluster.
fn gets_in(lab: &Lab, made: &Made, family: Family) -> bool {
    let to = lab.scenario().pod("untouched/backend").unwrap();
    let ip: IpAddr = family.pick(to.ipv4.unwrap().into(), to.ipv6.unwrap().into());
    let url = format!("http://{}/", SocketAddr::new(ip, 8080));
    curl(&lab.pod(&made.pod.key()), family, &url, &["--max-time", "5"]).source().is_some()
}

fn programs(lab: &Lab, made: &Made) -> Vec<String> {
    let veth = world::veth(lab.scenario(), &made.pod);
    foreign::programs(lab.place(NODE).unwrap().netns(), &veth).unwrap()
}

fn tell(lab: &Lab) {
    let files = tidegate_lab::product::manifests(lab.scenario()).unwrap();
    let (name, text) = files.into_iter().find(|(name, _)| name == "pods.yaml").unwrap();
    lab.edit_manifest(&name, &text).unwrap();
}

/// A name that policy allows works at the first try: one question, one SYN.
#[track_caller]
fn first_try(lab: &Lab, made: &Made) {
    let place = lab.pod(&made.pod.key());
    let answer = dig(&place, "api.example.com", "A", &["+tries=1", "+timeout=3"]);
    assert!(answer.text().contains("198.51.100.10"), "{}", answer.text());
    let got = curl(&place, Family::V4, "https://api.example.com/", &["--connect-timeout", "0.9"]);
    assert_eq!(got.source(), Some("203.0.113.10".parse().unwrap()), "{}", got.text());
}

#[test]
fn with_an_agent_the_first_instruction_is_judged() {
    let (_one, mut lab) = up("cni");
    let watches = leaks(&lab);

    // Nobody but the plugin knows this pod: closed but for the cluster.
    let unknown = make(&mut lab, "shop", "early");
    add(&lab, &unknown);
    for family in FAMILIES {
        assert!(!gets_out(&lab, &unknown, family), "{family:?}");
        assert!(gets_in(&lab, &unknown, family), "{family:?}");
    }
    assert_eq!(programs(&lab, &unknown), AGENTS);
    assert_eq!(call(&lab, "CHECK", &unknown).code, 0);
    // Then gateways tell of it.
    tell(&lab);
    let dig_once = || dig(&lab.pod("shop/early"), "api.example.com", "A", &["+tries=1", "+timeout=1"]);
    assert!(wait_for(READY, || dig_once().text().contains("198.51.100.10").then_some(())).is_some());
    first_try(&lab, &unknown);

    // One that gateways learn of while its network is made: the answer waits for that.
    for n in 0..5 {
        let new = make(&mut lab, "shop", &format!("new-{n}"));
        tell(&lab);
        add(&lab, &new);
        first_try(&lab, &new);
        for family in FAMILIES {
            assert!(!gets_out(&lab, &new, family), "{family:?}");
        }
    }
    assert_eq!(leaked(&watches), 0);

    // Of a namespace that nobody put under it.
    let free = make(&mut lab, "untouched", "free");
    let took = add(&lab, &free);
    assert!(took < SLOW, "an untouched pod waited {took:?}");
    for family in FAMILIES {
        assert!(gets_out(&lab, &free, family), "{family:?}");
    }

    // The pod goes, and another one gets its address within the same second.
    assert_eq!(call(&lab, "DEL", &free).code, 0);
    let address = free.pod.clone();
    lab.remove_pod(&free.pod.key()).unwrap();
    let mut heir = Pod::new("shop", "heir", NODE);
    heir.labels.insert("app".into(), "web".into());
    (heir.ipv4, heir.ipv6) = (address.ipv4, address.ipv6);
    let pod = lab.add_network(heir).unwrap();
    let heir = Made { uid: "u-heir".into(), result: free.result.clone(), pod };
    let before = leaked(&watches);
    add(&lab, &heir);
    for family in FAMILIES {
        assert!(!gets_out(&lab, &heir, family), "{family:?}");
    }
    assert_eq!(leaked(&watches), before);

    // And the other way round, while gateways still tell of the one that is gone: what guards its address would drop the
    // first packets of the next.
    let address = heir.pod.clone();
    let guarded = |lab: &Lab| {
        let set = lab.place(NODE).unwrap().run(&["nft", "list", "set", "inet", "tidegate", "isolated4"]).stdout;
        let address = address.ipv4.unwrap().to_string();
        set.split(|c: char| c != '.' && !c.is_ascii_digit()).any(|word| word == address)
    };
    tell(&lab);
    let stale = lab.manifest("pods.yaml").unwrap();
    assert_eq!(call(&lab, "DEL", &heir).code, 0);
    lab.remove_pod(&heir.pod.key()).unwrap();
    assert!(wait_for(READY, || (!guarded(&lab)).then_some(())).is_some());
    lab.edit_manifest("pods.yaml", &stale).unwrap();
    assert!(wait_for(READY, || guarded(&lab).then_some(())).is_some());
    let mut next = Pod::new("untouched", "next", NODE);
    (next.ipv4, next.ipv6) = (address.ipv4, address.ipv6);
    let pod = lab.add_network(next).unwrap();
    let next = Made { uid: "u-next".into(), result: heir.result.clone(), pod };
    assert!(guarded(&lab), "the address was let go before it had another pod");
    add(&lab, &next);
    for family in FAMILIES {
        assert!(gets_out_at_once(&lab, &next, family), "{family:?}: the first packet was lost");
    }
}

/// A file that takes no more octets, in the place of the one that a node's agent writes next. Like a disk that hangs, it holds up all
/// that the agent does for its node.
struct Hung {
    file: File,
    path: PathBuf,
    agent: i32,
}

impl Hung {
    fn new(lab: &Lab) -> Self {
        let folder = lab.layout().cni(NODE);
        let agent = lab.process(NODE).unwrap().pid;
        assert!(wait_for(READY, || folder.join("standing.json").exists().then_some(())).is_some());
        let (full, path) = (folder.join("full"), folder.join(format!(".standing.json.{agent}.new")));
        nix::unistd::mkfifo(&full, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&full).unwrap();
        while file.write(&[0; 4096]).is_ok() {}
        fs::rename(full, &path).unwrap();
        // There is something to write now.
        let mut more = lab.scenario().clone();
        let (labels, annotations) = Default::default();
        more.namespaces.push(Namespace { name: "another".into(), labels, annotations });
        let files = tidegate_lab::product::manifests(&more).unwrap();
        let (name, text) = files.iter().find(|(name, _)| name.contains("another")).unwrap();
        lab.edit_manifest(name, text).unwrap();
        let hung = Self { file, path, agent };
        assert!(wait_for(READY, || hung.holds().then_some(())).is_some(), "the agent writes nothing");
        hung
    }

    /// Whether the agent has begun to write.
    fn holds(&self) -> bool {
        let open = fs::read_dir(format!("/proc/{}/fd", self.agent)).unwrap().flatten();
        open.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == self.path))
    }

    fn ends(mut self) {
        let mut some = [0; 4096];
        let read = wait_for(READY, || {
            while self.file.read(&mut some).is_ok_and(|n| n > 0) {}
            (!self.holds()).then_some(())
        });
        assert!(read.is_some(), "the agent still writes");
    }
}

/// Whatever the agent is at: an untouched pod is answered at once, and gets the other program when the agent comes to it.
#[test]
fn an_untouched_pod_waits_for_nothing() {
    let (_one, mut lab) = up("cnifree");
    let watches = leaks(&lab);
    let free: Vec<Made> = (0..5).map(|n| make(&mut lab, "untouched", &format!("free-{n}"))).collect();
    let closed = make(&mut lab, "shop", "closed");
    let lab = &lab;
    std::thread::scope(|all| {
        let hung = Hung::new(lab);
        let waits = all.spawn(|| add(lab, &closed));
        for made in &free {
            let took = add(lab, made);
            assert!(took < SLOW, "an untouched pod waited {took:?}");
            assert_eq!(programs(lab, made), AGENTS[..1], "the agent was not held up");
            for family in FAMILIES {
                assert!(gets_out_at_once(lab, made, family), "{family:?}");
            }
        }
        let took = call(lab, "DEL", &free[4]).took;
        assert!(took < SLOW, "a pod that goes waited {took:?}");
        assert!(!waits.is_finished(), "a pod was answered for that may be isolated");
        hung.ends();
        waits.join().unwrap();
    });
    let before = leaked(&watches);
    for made in &free[..4] {
        assert!(wait_for(READY, || (programs(lab, made) == AGENTS).then_some(())).is_some());
        for family in FAMILIES {
            assert!(gets_out_at_once(lab, made, family), "{family:?}");
        }
    }
    assert!(leaked(&watches) > before);
    let before = leaked(&watches);
    for family in FAMILIES {
        assert!(!gets_out(lab, &closed, family), "{family:?}");
    }
    assert_eq!(leaked(&watches), before);
}

#[test]
fn without_an_agent_what_is_not_open_is_closed() {
    let (_one, mut lab) = up("cnino");
    let watches = leaks(&lab);
    let standing = lab.layout().cni(NODE).join("standing.json");
    assert!(wait_for(READY, || standing.exists().then_some(())).is_some());
    lab.signal(NODE, Signal::SIGKILL, Some(READY)).unwrap();
    // As agents write it that know Services.
    let mut known: Value = serde_json::from_slice(&std::fs::read(&standing).unwrap()).unwrap();
    (known["names"], known["suffixes"]) = (json!(["backend.untouched.svc"]), json!(["cluster.local"]));
    std::fs::write(&standing, known.to_string()).unwrap();

    let closed = make(&mut lab, "shop", "closed");
    add(&lab, &closed);
    assert_eq!(programs(&lab, &closed), ["pod_static"]);
    for family in FAMILIES {
        assert!(!gets_out(&lab, &closed, family), "{family:?}");
        assert!(gets_in(&lab, &closed, family), "{family:?}");
    }
    // Questions too, but for Services: the cluster's own server would carry them out.
    for family in FAMILIES {
        let dns = lab.scenario().cluster_dns_servers();
        let server = format!("@{}", dns.iter().find(|a| a.is_ipv4() == (family == Family::V4)).unwrap().ip());
        let asks = |name: &str| dig(&lab.pod("shop/closed"), name, "A", &[server.as_str(), "+tries=1", "+timeout=1"]);
        assert_eq!(asks("api.example.com").status, "");
        assert_eq!(asks("backend.untouched.svc.cluster.local").answers.len(), 1, "{family:?}");
        assert_eq!(asks("api.example.com.shop.svc.cluster.local").status, "NXDOMAIN", "{family:?}");
    }
    let asked = lab.queries("cluster").unwrap();
    let stray = asked.iter().find(|q| q["name"].as_str().is_some_and(|n| n.starts_with("api.example.com")));
    assert!(stray.is_none(), "{stray:?}");
    assert_eq!(leaked(&watches), 0);
    assert_eq!(call(&lab, "CHECK", &closed).code, 0);
    assert_eq!(call(&lab, "STATUS", &closed).code, 0);
    let free = make(&mut lab, "untouched", "free");
    let took = add(&lab, &free);
    assert!(took < SLOW, "an untouched pod waited {took:?}");
    assert_eq!(programs(&lab, &free), Vec::<String>::new());
    for family in FAMILIES {
        assert!(gets_out(&lab, &free, family), "{family:?}");
    }
    let before = leaked(&watches);

    // The agent is back: its program comes before the plugin's, which goes.
    lab.start(NODE).unwrap();
    lab.wait_ready(NODE, READY).unwrap();
    let now = wait_for(READY, || (programs(&lab, &closed) == AGENTS).then_some(()));
    assert!(now.is_some(), "{:?}", programs(&lab, &closed));
    for family in FAMILIES {
        assert!(!gets_out(&lab, &closed, family), "{family:?}");
    }
    tell(&lab);
    let once = || dig(&lab.pod("shop/closed"), "api.example.com", "A", &["+tries=1", "+timeout=1"]);
    assert!(wait_for(READY, || once().text().contains("198.51.100.10").then_some(())).is_some());
    first_try(&lab, &closed);
    assert_eq!(leaked(&watches), before);

    // A pod that goes leaves nothing behind.
    assert_eq!(call(&lab, "DEL", &closed).code, 0);
    assert_eq!(call(&lab, "DEL", &closed).code, 0, "again");
    let records: Vec<PathBuf> =
        std::fs::read_dir(lab.layout().cni(NODE).join("run/pods")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(records.iter().all(|r| !r.display().to_string().contains("closed")), "{records:?}");
}

#[test]
fn where_there_never_was_an_agent_everything_is_closed() {
    let (_one, mut lab) = up("cninever");
    let watches = leaks(&lab);
    lab.signal(NODE, Signal::SIGTERM, Some(READY)).unwrap();
    let config = lab.layout().config(NODE).display().to_string();
    let tidegate = lab.tidegate().display().to_string();
    let cleaned = lab.place(NODE).unwrap().run(&[tidegate.as_str(), "agent", "--config", &config, "--cleanup"]);
    assert_eq!(cleaned.status, 0, "{}", cleaned.stderr);
    assert!(!lab.layout().cni(NODE).join("standing.json").exists());
    for namespace in ["shop", "untouched"] {
        let made = make(&mut lab, namespace, "closed");
        add(&lab, &made);
        assert_eq!(programs(&lab, &made), ["pod_static"]);
        for family in FAMILIES {
            assert!(!gets_out(&lab, &made, family), "{family:?}");
        }
    }
    assert_eq!(leaked(&watches), 0);

    // What a runtime says wrongly is named, and nothing is let through by it.
    let made = make(&mut lab, "shop", "wrong");
    let mut config = configuration(&lab, &made.result);
    config["prevResult"] = Value::Null;
    let answer = call_with(&lab, "ADD", &made, &config.to_string());
    let error: Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!((answer.code, &error["code"], &error["msg"]), (1, &json!(7), &json!("prevResult")));

    // Nor by a node where nothing can be pinned: the pod does not start, the agent neither, and both say why.
    let nowhere = lab.layout().folder.join("pins");
    let mut config = configuration(&lab, &made.result);
    config["pins"] = json!(nowhere);
    let answer = call_with(&lab, "ADD", &made, &config.to_string());
    let error: Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!((answer.code, &error["code"]), (1, &json!(11)), "{error}");
    assert!(error["details"].as_str().unwrap().contains("is not on a BPF file system"), "{error}");
    assert_eq!(programs(&lab, &made), Vec::<String>::new());
    let file = lab.layout().folder.join("nowhere.yaml");
    let text = std::fs::read_to_string(lab.layout().config(NODE)).unwrap();
    let pins = lab.layout().bpffs().join(NODE).display().to_string();
    assert!(text.contains(&pins), "{text}");
    std::fs::write(&file, text.replace(&pins, &nowhere.display().to_string())).unwrap();
    let said = lab.place(NODE).unwrap().run(&[tidegate.as_str(), "agent", "--config", &file.display().to_string()]);
    assert!(said.status != 0 && said.stderr.contains("is not on a BPF file system"), "{said:?}");
    let version = call_with(&lab, "VERSION", &made, r#"{"cniVersion":"1.0.0"}"#);
    assert!(version.code == 0 && version.text.contains("\"supportedVersions\""), "{}", version.text);
}

/// How long the plugin keeps pods waiting: 100 of an untouched namespace, with an agent and without.
#[test]
fn a_new_pod_waits_for_a_moment() {
    let (_one, mut lab) = up("cnitime");
    let free = make(&mut lab, "untouched", "free");
    let all = |what: &str, lab: &Lab| {
        let mut took: Vec<Duration> = (0..100).map(|_| add(lab, &free)).collect();
        took.sort_unstable();
        println!("ADD {what}: p50 {:?}, p99 {:?}", took[50], took[98]);
        assert!(took[50] < Duration::from_millis(250) && took[98] < SLOW, "{what}: {took:?}");
    };
    all("of an untouched pod, with an agent", &lab);
    lab.signal(NODE, Signal::SIGKILL, Some(READY)).unwrap();
    all("of an untouched pod, without an agent", &lab);
    let closed = make(&mut lab, "shop", "closed");
    let mut took: Vec<Duration> = (0..100).map(|_| add(&lab, &closed)).collect();
    took.sort_unstable();
    println!("ADD of an isolated pod, without an agent: p50 {:?}, p99 {:?}", took[50], took[98]);
    assert!(took[98] < 2 * SLOW, "{took:?}");
}

/// With an API server: the pod is there, its address is not yet. The node tells the gateways, and what policy allows works at
/// the first try.
#[test]
fn gateways_hear_of_a_pod_before_the_api_server_knows_its_address() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/variants/kubernetes.yaml");
    let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("cnikube") };
    let mut lab = Lab::up(Scenario::load(file.as_ref()).unwrap(), &options).unwrap();
    let watches = leaks(&lab);
    let mut took = Vec::new();
    for n in 0..10 {
        let mut made = make(&mut lab, "shop", &format!("first-{n}"));
        let object = json!({
            "metadata": {"name": made.pod.name, "labels": {"app": "web"}},
            "spec": {"nodeName": NODE, "containers": [{"name": "main", "image": "lab"}]},
        });
        let object = lab.request("POST", "/api/v1/namespaces/shop/pods", &object).unwrap();
        made.uid = object["metadata"]["uid"].as_str().unwrap().to_owned();
        took.push(add(&lab, &made));
        first_try(&lab, &made);
        for family in FAMILIES {
            assert!(!gets_out(&lab, &made, family), "{family:?}");
        }
        if n == 0 {
            // Its kubelet says the same later, and nothing changes.
            lab.set_addresses(&made.pod.key(), &made.pod.addresses()).unwrap();
            first_try(&lab, &made);
        }
    }
    took.sort_unstable();
    println!("ADD of an isolated pod, with gateways that hear of it: {took:?}");
    assert!(took[9] < Duration::from_millis(1900), "the plugin gave up waiting: {took:?}");
    assert_eq!(leaked(&watches), 0);

    // Of a pod with another UID the address is not believed: it is closed.
    let made = make(&mut lab, "shop", "other");
    let object = json!({
        "metadata": {"name": "other", "labels": {"app": "web"}},
        "spec": {"nodeName": NODE, "containers": [{"name": "main", "image": "lab"}]},
    });
    lab.request("POST", "/api/v1/namespaces/shop/pods", &object).unwrap();
    add(&lab, &made);
    let answer = dig(&lab.pod("shop/other"), "api.example.com", "A", &["+tries=1", "+timeout=1"]);
    assert!(!answer.text().contains("198.51"), "{}", answer.text());
}

/// The agent puts the plugin and its entry into the node, puts it back when others write there, and takes it out.
#[test]
fn the_plugin_is_installed_and_stays_so() {
    let (_one, mut lab) = up("cniput");
    let folder = lab.layout().cni(NODE);
    let (bin, conf) = (folder.join("bin"), folder.join("net.d"));
    for folder in [&bin, &conf] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let list = conf.join("10-lab.conflist");
    let plain = "{\"cniVersion\": \"1.0.0\", \"name\": \"lab\",\n \"plugins\": [\n  {\"type\": \"ptp\"}\n ]}\n";
    std::fs::write(&list, plain).unwrap();
    let config = lab.layout().config(NODE);
    let text = std::fs::read_to_string(&config).unwrap();
    let with = format!("cni:\n  binDir: {}\n  confDir: {}\n", bin.display(), conf.display());
    assert!(text.contains("cni:\n"), "{text}");
    std::fs::write(&config, text.replacen("cni:\n", &with, 1)).unwrap();
    lab.restart(NODE).unwrap();

    let entered = || std::fs::read_to_string(&list).unwrap().contains("tidegate-cni").then_some(());
    assert!(wait_for(READY, entered).is_some());
    assert!(bin.join("tidegate-cni").is_file());
    // The file itself, with the entry itself, as a runtime puts both together.
    let value: Value = serde_json::from_str(&std::fs::read_to_string(&list).unwrap()).unwrap();
    assert_eq!(value["plugins"][0], json!({"type": "ptp"}));
    let made = make(&mut lab, "shop", "put");
    let mut entry = value["plugins"][1].clone();
    for (key, of) in [("cniVersion", json!("1.0.0")), ("name", json!("lab")), ("prevResult", made.result.clone())] {
        entry[key] = of;
    }
    assert_eq!(call_with(&lab, "ADD", &made, &entry.to_string()).code, 0);
    assert_eq!(programs(&lab, &made), AGENTS);

    std::fs::write(&list, plain).unwrap();
    assert!(wait_for(READY, entered).is_some(), "the network plugin wrote its own again");
    // Without an agent it stays.
    lab.signal(NODE, Signal::SIGTERM, Some(READY)).unwrap();
    assert!(entered().is_some() && bin.join("tidegate-cni").is_file());
    let (tidegate, file) = (lab.tidegate().display().to_string(), config.display().to_string());
    let cleaned = lab.place(NODE).unwrap().run(&[tidegate.as_str(), "agent", "--config", &file, "--cleanup"]);
    assert_eq!(cleaned.status, 0, "{}", cleaned.stderr);
    assert_eq!(std::fs::read_to_string(&list).unwrap(), plain);
    assert!(!bin.join("tidegate-cni").exists());
}
