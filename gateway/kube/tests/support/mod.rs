//! etcd's compaction.

use std::process::Command;

use tidegate_kube::Cluster;

/// Lets etcd forget all versions but the last.
pub fn compact(cluster: &Cluster) {
    // etcd's JSON gateway takes the same certificates as its API.
    let folder = cluster.folder();
    let url = cluster.url();
    let host = url.strip_prefix("https://").unwrap().split(':').next().unwrap().to_owned();
    let post = |path: &str, body: &str| {
        let out = Command::new("curl")
            .args(["-sS", "--fail", "--cacert"])
            .arg(folder.join("ca.crt"))
            .arg("--cert")
            .arg(folder.join("kube-apiserver.crt"))
            .arg("--key")
            .arg(folder.join("kube-apiserver.key"))
            .args(["-d", body])
            .arg(format!("https://{host}:2379{path}"))
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let range = post("/v3/kv/range", r#"{"key": "AA=="}"#);
    let revision = range["header"]["revision"].as_str().unwrap().to_owned();
    post("/v3/kv/compaction", &format!(r#"{{"revision": "{revision}", "physical": true}}"#));
}
