//! The authority in a real API server, and tokens that it gave and judges.

use std::collections::BTreeMap;

use tidegate_kube::Cluster;
use tidegate_kubernetes::{Access, Reviewer, Settings, Versioned, Written};
use tidegate_proto::wire::JoinRequest;
use tidegate_proto::wire::identity_client::IdentityClient;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tonic::Code;

use super::*;
use crate::core::ToCore;
use crate::identity::join::tests::{ACCOUNT, DAY, gateway, heard, joiner, stream};
use crate::identity::{Joins, KubeReviews, Reviews, Unknown};
use crate::nodes;
use crate::nodes::tests::known;

const LONG: Duration = Duration::from_secs(60);

const OBJECTS: &str = r#"
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: tidegate-system}}
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
- {apiVersion: v1, kind: Node, metadata: {name: node-1}}
- {apiVersion: v1, kind: Node, metadata: {name: node-2}}
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: tidegate-agent, namespace: tidegate-system}}
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: other, namespace: tidegate-system}}
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: tidegate-agent, namespace: shop}}
- apiVersion: v1
  kind: Pod
  metadata: {name: agent-1, namespace: tidegate-system}
  spec: {serviceAccountName: tidegate-agent, nodeName: node-1, containers: [{name: a, image: a}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: agent-2, namespace: tidegate-system}
  spec: {serviceAccountName: tidegate-agent, nodeName: node-2, containers: [{name: a, image: a}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: other-1, namespace: tidegate-system}
  spec: {serviceAccountName: other, nodeName: node-1, containers: [{name: a, image: a}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: agent-1, namespace: shop}
  spec: {serviceAccountName: tidegate-agent, nodeName: node-1, containers: [{name: a, image: a}]}
- apiVersion: rbac.authorization.k8s.io/v1
  kind: Role
  metadata: {name: reader, namespace: shop}
  rules: [{apiGroups: [tidegate.dev], resources: [namespaceegresses], verbs: [get]}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: RoleBinding
  metadata: {name: reader, namespace: shop}
  roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
  subjects: [{kind: ServiceAccount, name: other, namespace: tidegate-system}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: scraper}
  rules: [{nonResourceURLs: [/metrics], verbs: [get]}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRoleBinding
  metadata: {name: scraper}
  roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: scraper}
  subjects: [{kind: ServiceAccount, name: tidegate-agent, namespace: shop}]
"#;

fn cluster() -> Cluster {
    let cluster = Cluster::start().unwrap();
    cluster.kubectl(&["apply", "-f", "-"], OBJECTS).unwrap().success().unwrap();
    cluster
}

async fn connection(cluster: &Cluster, name: &str) -> Connection {
    let settings = Settings {
        kubeconfig: vec![cluster.kubeconfig()],
        context: None,
        namespace: Some("tidegate-system".into()),
        service: "tidegate-gateway".into(),
        name: name.into(),
        node: "n".into(),
    };
    Connection::new(settings).await.unwrap()
}

fn token(cluster: &Cluster, namespace: &str, account: &str, args: &[&str]) -> String {
    let all = [&["create", "token", account, "-n", namespace][..], args].concat();
    cluster.kubectl(&all, "").unwrap().success().unwrap().trim().to_owned()
}

/// An agent's token, as it is projected into its pod.
fn projected(cluster: &Cluster, namespace: &str, account: &str, pod: &str) -> String {
    let args = ["--audience", "tidegate", "--bound-object-kind", "Pod", "--bound-object-name", pod];
    token(cluster, namespace, account, &args)
}

async fn until<T>(what: &str, mut holds: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(value) = holds() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        sleep(Duration::from_millis(20)).await;
    }
}

fn start(connection: &Connection, times: Times) -> (Kept, tokio::task::JoinHandle<()>) {
    let (keeper, kept) = Keeper::new(connection, &config::Identity::default(), times, None);
    (kept, tokio::spawn(keeper.run()))
}

/// Gateways that start together agree on one authority; nodes join with projected tokens and nothing else; an outage of the
/// API server cuts nobody off.
#[tokio::test]
async fn nodes_join_by_the_api_servers_word() {
    let cluster = cluster();
    let mut all = Vec::new();
    for name in ["gw-a", "gw-b", "gw-c"] {
        all.push(start(&connection(&cluster, name).await, DAY));
    }
    let mut authorities = Vec::new();
    for (kept, _) in &all {
        authorities.push(until("an authority", || kept.authority.borrow().clone()).await);
    }
    assert!(authorities.windows(2).all(|w| w[0] == w[1]), "one authority");
    let reads = connection(&cluster, "x").await;
    let bundle = ConfigMapKey::new(&reads, "tidegate-trust", BUNDLE).read().await.unwrap().content.unwrap();
    assert_eq!(bundle, authorities[0].bundle());
    assert!(!bundle.contains("PRIVATE"));
    let secret = SecretKey::new(&reads, "tidegate-ca", AUTHORITY).read().await.unwrap();
    let secret = secret.content.unwrap();
    assert_eq!(Authority::from_bytes(&secret).unwrap(), *authorities[0]);

    let (kept, _) = &all[0];
    let own = until("a certificate", || kept.issued.borrow().clone()).await;
    own.check(Role::Gateway, "gw-a", now()).unwrap();
    let reviews: Arc<dyn Reviews> = Arc::new(KubeReviews::new(Handle::current(), Reviewer::new(&reads)));
    // All that ask are on a node's address: how many may come from others is another test's.
    let (teller, nodes) = nodes::channel();
    let uid = cluster.kubectl(&["get", "node", "node-1", "-o", "jsonpath={.metadata.uid}"], "").unwrap();
    teller.tell(known(&[("node-1", &uid.success().unwrap(), "127.0.0.1")]));
    let joins = Joins::new(
        kept.authority.clone(),
        reviews.clone(),
        ACCOUNT.into(),
        "tidegate".into(),
        Times { certificate: 6, ..DAY },
        nodes.clone(),
    );
    let port = gateway(own, Some(joins), nodes).await;

    let key = KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::new(vec!["node-1.node.tidegate".to_owned()]).unwrap();
    let request = request.serialize_request(&key).unwrap().der().to_vec();
    let roots = authorities_from_pem(bundle.as_bytes()).unwrap();
    let ask = async |token: String| {
        let joined = tidegate_identity::join(port.address, roots.clone(), None, None, LONG).await.unwrap();
        let asked = JoinRequest { node: "node-1".into(), token, request: request.clone() };
        IdentityClient::new(joined.channel).join(asked).await.map(drop).map_err(|s| s.code())
    };
    let system = "tidegate-system";
    let audience = ["--audience", "tidegate"];
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", "agent-1"];
    let short = [&audience[..], &bound[..]].concat();
    for (what, token, expected) in [
        ("a pod's", projected(&cluster, system, "tidegate-agent", "agent-1"), Ok(())),
        (
            "of a pod on another node",
            projected(&cluster, system, "tidegate-agent", "agent-2"),
            Err(Code::PermissionDenied),
        ),
        ("of another account", projected(&cluster, system, "other", "other-1"), Err(Code::PermissionDenied)),
        ("of another namespace", projected(&cluster, "shop", "tidegate-agent", "agent-1"), Err(Code::PermissionDenied)),
        ("no pod's", token(&cluster, system, "tidegate-agent", &audience), Err(Code::PermissionDenied)),
        ("for the API server", token(&cluster, system, "tidegate-agent", &bound), Err(Code::Unauthenticated)),
        ("nobody's", token(&cluster, system, "tidegate-agent", &short) + "x", Err(Code::Unauthenticated)),
        ("no token", "Bearer".into(), Err(Code::Unauthenticated)),
    ] {
        assert_eq!(ask(token).await, expected, "{what}");
    }
    // The token of a pod that is gone.
    let gone = projected(&cluster, system, "tidegate-agent", "agent-2");
    let delete = ["delete", "pod", "agent-2", "-n", system, "--grace-period=0", "--force"];
    cluster.kubectl(&delete, "").unwrap().success().unwrap();
    assert_eq!(ask(gone).await, Err(Code::Unauthenticated));

    // Tenants.
    let right = async |token: String, access: Access| {
        let user = reviews.token(token, Vec::new()).await.unwrap().unwrap();
        reviews.access(user, access).await.unwrap()
    };
    let (tenant, scraper) = (token(&cluster, system, "other", &[]), token(&cluster, "shop", "tidegate-agent", &[]));
    let (shop, system_too) = (Access::Namespace("shop".into()), Access::Namespace(system.into()));
    assert!(right(tenant.clone(), shop.clone()).await);
    assert!(!right(tenant.clone(), system_too).await);
    assert!(!right(tenant.clone(), Access::Everything).await);
    assert!(!right(tenant, Access::Path("/metrics".into())).await);
    assert!(right(scraper.clone(), Access::Path("/metrics".into())).await);
    assert!(!right(scraper, shop).await);
    let audience = projected(&cluster, system, "tidegate-agent", "agent-1");
    assert_eq!(reviews.token(audience.clone(), Vec::new()).await, Ok(None), "an agent's token is no tenant's");

    // A real agent, and then no API server: streams go on, and come back with certificates that are renewed.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.crt"), &bundle).unwrap();
    std::fs::write(folder.path().join("token"), &audience).unwrap();
    let (joiner, source, _said) = joiner(folder.path(), port.address);
    let agent = tokio::spawn(joiner.run());
    let first = until("the node's certificate", || source.now().ok()).await;
    cluster.stop_api_server();
    let (tx, _rx) = tokio::sync::mpsc::channel(8);
    let streams = tokio::spawn(stream(port.address, "node-1", source.clone()).state(tx));
    until("a certificate without the API server", || source.now().ok().filter(|c| c.ends() > first.ends())).await;
    let Some(ToCore::StateUp { node, .. }) = heard(&port.core, LONG).await else { panic!() };
    assert_eq!(node, "node-1");
    assert!(matches!(ask(audience).await, Err(Code::Unavailable)), "nobody new");
    assert!(matches!(reviews.token("any".into(), Vec::new()).await, Err(Unknown::Away(_))));
    agent.abort();
    streams.abort();
    all.iter().for_each(|(_, task)| task.abort());
}

/// A whole rotation in seconds, with two gateways, at any time of which each trusts the other.
#[tokio::test]
async fn the_authority_rotates_under_gateways_that_run() {
    let cluster = cluster();
    let times = Times { certificate: 6, authority: 36, overlap: 4 };
    let (connection_a, connection_b) = (connection(&cluster, "gw-a").await, connection(&cluster, "gw-b").await);
    let ((a, task_a), (b, task_b)) = (start(&connection_a, times), start(&connection_b, times));
    let trust = ConfigMapKey::new(&connection_a, "tidegate-trust", BUNDLE);
    let first = until("an authority", || a.authority.borrow().clone()).await;
    let (mut most, mut signers) = (0, BTreeMap::new());
    let deadline = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < deadline, "no rotation: {most} authorities, {} signers", signers.len());
        sleep(Duration::from_millis(100)).await;
        let held: Option<Vec<_>> = [&a, &b].iter().map(|kept| kept.issued.borrow().clone()).collect();
        let Some(held) = held else { continue };
        let Versioned { content: Some(bundle), .. } = trust.read().await.unwrap() else { continue };
        most = most.max(bundle.matches("BEGIN").count());
        let authorities = authorities_from_pem(bundle.as_bytes()).unwrap();
        for (own, name) in held.iter().zip(["gw-a", "gw-b"]) {
            // By the bundle that everybody reads, whoever signed.
            let (_, leaf) = x509_parser::parse_x509_certificate(&own.chain()[0]).unwrap();
            let known = authorities.iter().any(|authority| {
                let (_, authority) = x509_parser::parse_x509_certificate(authority).unwrap();
                leaf.verify_signature(Some(authority.public_key())).is_ok()
            });
            assert!(known, "{name}: {most}");
            signers.insert(leaf.issuer().to_string(), ());
        }
        // The former one has come, and gone.
        if signers.len() >= 2 && most >= 2 && bundle.matches("BEGIN").count() == 1 {
            assert!(!bundle.contains(first.bundle().trim()), "the former authority is not trusted any more");
            break;
        }
    }
    // Somebody breaks the Secret: what was read last holds, and nothing is written over it.
    let secret = SecretKey::new(&connection_a, "tidegate-ca", AUTHORITY);
    loop {
        let version = secret.read().await.unwrap().version;
        if secret.write(version, b"broken".to_vec()).await.unwrap() == Written::Done {
            break;
        }
    }
    sleep(Duration::from_secs(7)).await;
    assert_eq!(secret.read().await.unwrap().content.as_deref(), Some(&b"broken"[..]));
    let own = a.issued.borrow().clone().unwrap();
    own.check(Role::Gateway, "gw-a", now()).unwrap();
    task_a.abort();
    task_b.abort();
}

/// An authority that somebody else keeps, as cert-manager does, below a root; and then another one below the same.
#[tokio::test]
async fn a_given_authority_is_used_and_never_written() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa};
    let cluster = cluster();
    let connection = connection(&cluster, "gw-a").await;
    let ca = || {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    let named = |name: &str| {
        let mut params = ca();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params
    };
    let root = CertifiedIssuer::self_signed(named("root"), KeyPair::generate().unwrap()).unwrap();
    let give = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let certificate = named(name).signed_by(&key, &root).unwrap();
        let secret = serde_json::json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": "corp", "namespace": "tidegate-system"},
            "stringData": {"tls.crt": certificate.pem(), "tls.key": key.serialize_pem(), "ca.crt": root.pem()}});
        cluster.kubectl(&["apply", "-f", "-"], &secret.to_string()).unwrap().success().unwrap();
    };
    give("first");
    let settings = config::Identity { secret: "corp".into(), given: true, ..config::Identity::default() };
    let times = Times { certificate: 6, ..DAY };
    let (keeper, kept) = Keeper::new(&connection, &settings, times, None);
    let task = tokio::spawn(keeper.run());
    let own = until("a certificate", || kept.issued.borrow().clone()).await;
    own.check(Role::Gateway, "gw-a", now()).unwrap();
    let version = async || SecretKey::new(&connection, "corp", "tls.crt").read().await.unwrap().version;
    let written = version().await;
    let bundle = ConfigMapKey::new(&connection, "tidegate-trust", BUNDLE).read().await.unwrap().content.unwrap();
    assert_eq!(authorities_from_pem(bundle.as_bytes()).unwrap(), [root.der().clone()]);

    // A node's certificate holds for whoever trusts the root.
    let key = KeyPair::generate().unwrap();
    let asked =
        CertificateParams::new(vec!["node-1.node.tidegate".to_owned()]).unwrap().serialize_request(&key).unwrap();
    let authority = kept.authority.borrow().clone().unwrap();
    let issued = authority.node("node-1", Some("u"), asked.der(), now(), &DAY).unwrap();
    assert_eq!(issued.chain.len(), 2);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let node = Credentials::new(issued.chain, key, vec![root.der().clone()]).unwrap();
    node.check(Role::Node, "node-1", now()).unwrap();
    assert_eq!(version().await, written);

    // Renewed by somebody: what is signed from then on is signed by the new one.
    give("second");
    let issuer =
        |own: &Credentials| x509_parser::parse_x509_certificate(&own.chain()[0]).unwrap().1.issuer().to_string();
    assert!(issuer(&own).contains("first"));
    until("the second one's", || kept.issued.borrow().clone().filter(|own| issuer(own).contains("second"))).await;
    task.abort();
    // Who forgets to say that it is given does not lose it.
    let (version, settings) = (version().await, config::Identity { given: false, ..settings });
    let (keeper, _kept) = Keeper::new(&connection, &settings, DAY, None);
    let why = keeper.read().await.unwrap_err().to_string();
    assert!(why.contains("identity.given"), "{why}");
    assert_eq!(SecretKey::new(&connection, "corp", "tls.key").read().await.unwrap().version, version);
}

/// What the chart has cert-manager make is used, and what cert-manager makes of it when it is renewed: cert-manager's own
/// controllers, the chart's Certificate, an authority of the company.
#[tokio::test]
async fn what_cert_manager_keeps_is_used_and_followed() {
    let cluster = cluster();
    let _controllers = cluster.start_cert_manager().unwrap();
    let kubectl = |args: &[&str], stdin: &str| cluster.kubectl(args, stdin).unwrap().success().unwrap();
    kubectl(&["apply", "-f", "-"], COMPANY);
    let values = [
        "identity.certManager.enabled=true",
        "identity.certManager.issuerRef.name=corp",
        "identity.certManager.issuerRef.kind=Issuer",
    ];
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../helm/tidegate");
    let mut helm = std::process::Command::new(tidegate_kube::tool(tidegate_kube::Tool::Helm).unwrap());
    helm.args(["template", "tidegate", chart, "-n", "tidegate-system", "-s", "templates/identity.yaml"]);
    for value in values {
        helm.args(["--set", value]);
    }
    let rendered = helm.output().unwrap();
    assert!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
    kubectl(&["apply", "-f", "-"], &String::from_utf8(rendered.stdout).unwrap());

    // The gateway starts before there is anything.
    let connection = connection(&cluster, "gw-a").await;
    let settings = config::Identity { given: true, ..config::Identity::default() };
    let times = Times { certificate: 6, ..DAY };
    let (keeper, kept) = Keeper::new(&connection, &settings, times, None);
    let task = tokio::spawn(keeper.run());
    let own = until("a certificate", || kept.issued.borrow().clone()).await;
    own.check(Role::Gateway, "gw-a", now()).unwrap();
    let root = SecretKey::new(&connection, "root", "tls.crt").read().await.unwrap().content.unwrap();
    let bundle = ConfigMapKey::new(&connection, "tidegate-trust", BUNDLE).read().await.unwrap().content.unwrap();
    assert_eq!(authorities_from_pem(bundle.as_bytes()).unwrap(), authorities_from_pem(&root).unwrap());

    // As `cmctl renew` does, or the clock: a new key, and the Secret is written anew.
    let secret = SecretKey::new(&connection, settings.secret.as_str(), "tls.crt");
    let before = secret.read().await.unwrap();
    let first = kept.authority.borrow().clone().unwrap();
    let renew = serde_json::json!({"status": {"conditions": [{"type": "Issuing", "status": "True", "reason": "ManuallyTriggered",
        "message": "a test", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    let patch = renew.to_string();
    let name = settings.secret.as_str();
    kubectl(
        &["patch", "certificate", "-n", "tidegate-system", name, "--subresource=status", "--type=merge", "-p", &patch],
        "",
    );
    until("the renewed one's", || kept.authority.borrow().clone().filter(|now| *now != first)).await;
    let after = secret.read().await.unwrap();
    assert_ne!(after.content, before.content);
    let renewed =
        until("a certificate of it", || kept.issued.borrow().clone().filter(|now| now.chain()[1] != own.chain()[1]))
            .await;
    // Whoever trusts the company's root trusts both.
    for credentials in [own, renewed] {
        credentials.check(Role::Gateway, "gw-a", now()).unwrap();
    }
    let still = ConfigMapKey::new(&connection, "tidegate-trust", BUNDLE).read().await.unwrap().content.unwrap();
    assert_eq!(still, bundle);
    task.abort();
}

/// The company's authority, which signs for those who ask in this namespace.
const COMPANY: &str = r#"
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: itself, namespace: tidegate-system}
spec: {selfSigned: {}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: root, namespace: tidegate-system}
spec: {secretName: root, commonName: The Company, isCA: true, issuerRef: {name: itself}, privateKey: {algorithm: ECDSA, size: 256}}
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: corp, namespace: tidegate-system}
spec: {ca: {secretName: root}}
"#;

#[test]
fn what_is_no_authority_is_refused() {
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let leaf = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let own = Authority::first(now(), &DAY, KeyPair::generate().unwrap()).unwrap().bundle();
    for (certificate, key) in [(leaf.as_str(), &key), (own.as_str(), &other), ("", &key)] {
        assert!(Authority::given(certificate, &key.serialize_pem(), None).is_err());
    }
    // As OpenSSL and cert-manager write keys unless told otherwise.
    let sec1 = "-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIPyGRXDz58boMfv4pPTqy8DiPVuqC6So8HSJ43yVycHroAoGCCqGSM49
AwEHoUQDQgAEXNqmm8vOhOpfSZN+JfScBXifZMvKYVnByqC1nDvXfLLwZSDEuGuB
wvZRUKdoMaOc9Hr+lnk/c3uhNM23PyQZjQ==
-----END EC PRIVATE KEY-----
";
    let why = Authority::given(&own, sec1, None).unwrap_err().to_string();
    assert!(why.contains("tls.key") && why.contains("PKCS #8"), "{why}");
    // A root of its own.
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap();
    let given = Authority::given(&root.pem(), &key.serialize_pem(), None).unwrap();
    assert_eq!(authorities_from_pem(given.bundle().as_bytes()).unwrap(), [root.der().clone()]);
}

#[test]
fn it_is_known_when_nobody_stays_trusted() {
    let one = |_| Authority::first(now(), &DAY, KeyPair::generate().unwrap()).unwrap().bundle();
    let [a, b, c] = [(); 3].map(one);
    let both = a.clone() + &b;
    for (old, new, apart) in
        [(&a, &b, true), (&a, &both, false), (&both, &a, false), (&both, &c, true), (&"".into(), &a, false)]
    {
        assert_eq!(are_apart(old, new), apart);
    }
}

#[test]
fn after_a_pass_that_failed_the_next_one_is_soon_and_then_later() {
    let due = Duration::from_secs(86_400);
    let waits: Vec<u64> = (0..8).map(|failed| pause(failed, due, 1.0).as_millis() as u64).collect();
    assert_eq!(waits, [30_000, 500, 1000, 2000, 4000, 8000, 16_000, 30_000]);
    assert_eq!(pause(u32::MAX, due, 0.5), EVERY);
    assert_eq!(pause(2, due, 0.5), Duration::from_millis(500));
    assert_eq!((pause(0, Duration::ZERO, 1.0), pause(9, Duration::ZERO, 1.0)), (SOONEST, SOONEST));
}
