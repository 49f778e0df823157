//! Manifests that are broken, and a disk that is full.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tidegate_lab::Mark;
use tidegate_lab::lab::wait_for;
use tidegate_lab::liar;
use tidegate_lab::probe::dig;
use tidegate_random::noise;

use crate::{GATEWAYS, unaffected, up};

/// Bad manifests among good ones: the good ones hold and change, the bad ones are named.
#[test]
fn bad_manifests_among_good_ones() {
    let (_one, lab, before) = up("manifests");
    let folder = lab.layout().manifests();
    let policy = |spec: &str| {
        format!(
            "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: bad, namespace: shop}}\nspec:\n{spec}\n"
        )
    };
    let bomb = (1..12).fold("a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned(), |s, n| {
        let p = n - 1;
        format!("{s}a{n}: &a{n} [*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p},*a{p}]\n")
    });
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("bad-noise.yaml", noise(1, 5_000)),
        ("bad-utf8.yaml", b"apiVersion: \xff\xfe\n".to_vec()),
        ("bad-bomb.yaml", bomb.into_bytes()),
        ("bad-deep.yaml", [vec![b'['; 20_000], vec![b']'; 20_000]].concat()),
        ("bad-json.json", b"{\"apiVersion\": \"tidegate.dev/v1alpha1\",".to_vec()),
        ("bad-field.yaml", policy("  podSelector: {}\n  egres: []").into()),
        ("bad-type.yaml", policy("  podSelector: 7\n  egress: {}").into()),
        ("bad-port.yaml", policy("  podSelector: {}\n  egress: [{toFQDNs: [{matchName: a.example}], toPorts: [{protocol: TCP, port: 70000}]}]").into()),
        ("bad-name.yaml", policy("  podSelector: {}\n  egress: [{toFQDNs: [{matchName: \"a..b\"}], toPorts: [{protocol: TCP, port: 443}]}]").into()),
        ("bad-pattern.yaml", policy("  podSelector: {}\n  egress: [{toFQDNs: [{matchPattern: \"**\"}, {matchPattern: \"a*b*\"}], toPorts: [{protocol: TCP, port: 443}]}]").into()),
        ("bad-version.yaml", b"apiVersion: tidegate.dev/v9\nkind: EgressPolicy\nmetadata: {name: x, namespace: shop}\nspec: {}\n".to_vec()),
    ];
    for (name, bytes) in &bad {
        let temporary: PathBuf = lab.layout().folder.join(name);
        std::fs::write(&temporary, bytes).unwrap();
        std::fs::rename(&temporary, folder.join(name)).unwrap();
    }
    for gateway in GATEWAYS {
        for (name, _) in &bad {
            let log = || std::fs::read_to_string(lab.layout().log(gateway)).unwrap();
            let named = wait_for(Duration::from_secs(15), || log().contains(name).then_some(()));
            assert!(named.is_some(), "{gateway} names {name} in its log");
            let status =
                wait_for(Duration::from_secs(5), || lab.admin(gateway, "/status").ok()?.1.contains(name).then_some(()));
            assert!(status.is_some(), "{gateway} names {name} in its status");
        }
    }
    unaffected(&lab, &before, "bad manifests");
    // What is good still changes, in both directions.
    let web = lab.pod("shop/web");
    let good = lab.manifest("shop.yaml").unwrap();
    lab.edit_manifest("shop.yaml", &good.replace("www.example.com", "other.example.org")).unwrap();
    let asked = |name: &str, want: &str| {
        wait_for(Duration::from_secs(15), || (dig(&web, name, "A", &[]).status == want).then_some(())).is_some()
    };
    assert!(asked("other.example.org", "NOERROR"), "a good change comes through");
    assert!(asked("www.example.com", "NXDOMAIN"), "and takes away what it takes away");
    unaffected(&lab, &before, "a good change among bad ones");
}

/// A small filesystem over the folder of audit logs, until it is dropped.
struct Full(PathBuf);

impl Full {
    fn over(folder: PathBuf) -> Self {
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        Self(folder)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // Detached: the product may hold files on it.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The disk of the audit log is full: traffic flows, what is lost is counted, and said once there is room.
#[test]
fn a_full_disk_loses_records_and_nothing_else() {
    let (_one, lab, before) = up("full");
    let web = lab.pod("shop/web");
    let lost = || -> f64 { GATEWAYS.iter().map(|g| lab.metric(g, "tidegate_audit_lost_total", &[]).unwrap()).sum() };
    assert_eq!(lost(), 0.0);
    let full = Full::over(lab.layout().folder.join("audit"));
    let dns = SocketAddr::new(lab.scenario().pod("kube-system/coredns").unwrap().ipv4.unwrap().into(), 53);
    let ask = |round: usize| {
        let work = || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for n in 0..200u16 {
                let _ = socket.send_to(&liar::query(n, &format!("denied-{round}-{n}.example.org"), 1), dns);
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        web.within(work).unwrap();
    };
    let counted = (0..20).any(|round| {
        ask(round);
        std::thread::sleep(Duration::from_millis(300));
        lost() > 0.0
    });
    assert!(counted, "what was lost is counted");
    unaffected(&lab, &before, "a full disk");
    let log = GATEWAYS.map(|g| std::fs::read_to_string(lab.layout().log(g)).unwrap()).concat();
    assert!(log.contains("the audit log cannot be written"), "said in the log");
    drop(full);
    let told = wait_for(Duration::from_secs(8), || {
        GATEWAYS.iter().find_map(|g| lab.audit(g, &Mark::default()).ok()?.into_iter().find(|r| r["lost"].is_object()))
    });
    let told = told.unwrap();
    assert!(told["lost"]["dns"].as_u64().unwrap_or(0) > 0, "the next record says how many: {told}");
    let mark = lab.mark();
    assert_eq!(dig(&web, "denied.example.org", "A", &[]).status, "NXDOMAIN");
    assert!(lab.wait_audit(&GATEWAYS, &mark, |r| r["name"] == "denied.example.org").is_some(), "written again");
    unaffected(&lab, &before, "room again");
}
