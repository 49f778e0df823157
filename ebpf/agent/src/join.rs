//! The agent's certificate, from a gateway: asked for with a ServiceAccount token, renewed before it ends, and kept while
//! nobody gives another one. Its key never leaves this node.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use tidegate_identity::{Claims, Credentials, MAX_TOKEN, Role, authorities_from_pem, node_uid_of, validity};
use tidegate_proto::wire::identity_client::IdentityClient;
use tidegate_proto::wire::{JoinReply, JoinRequest};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::config;
use crate::stream::random;

/// How long a connection, and then an answer, may take. The gateway asks the API server meanwhile.
const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(15);
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// The longest time between two tries while there is a certificate that holds, and while there is none: without it the node hears of
/// nothing.
const BACKOFF_LAST: Duration = Duration::from_secs(30);
const MISSING_LAST: Duration = Duration::from_secs(10);
/// How often the files are looked at while nothing is due.
const LOOK: Duration = Duration::from_secs(5);
/// The least and most time to the next renewal, whatever a gateway says.
const SOONEST: Duration = Duration::from_secs(1);
const LATEST: Duration = Duration::from_secs(30 * 86_400);
/// The most octets of an answer.
const MAX_REPLY: usize = 64 * 1024;
/// For so long after the start it is no trouble that there is no certificate yet: gateways may be starting, too.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{0}")]
    Unusable(String),
    /// No gateway is known yet.
    #[error("no gateway is known yet")]
    Nobody,
    /// No connection, or a certificate that is not usable.
    #[error(transparent)]
    Identity(#[from] tidegate_identity::Error),
    /// The gateway's answer.
    #[error("the gateway refuses: {0}")]
    Refused(String),
    /// No answer in time.
    #[error("the gateway does not answer")]
    Silent,
    /// No key, or no request.
    #[error("a request cannot be made: {0}")]
    Request(#[from] rcgen::Error),
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> JoinError {
    let path = path.display().to_string();
    move |source| JoinError::File { path, source }
}

/// Gets and renews the certificate.
pub struct Joiner {
    /// This node.
    pub node: String,
    /// The files.
    pub join: config::Join,
    /// Where gateways are.
    pub targets: watch::Receiver<Vec<SocketAddr>>,
    /// Where the certificate goes.
    pub issued: watch::Sender<Option<Arc<Credentials>>>,
    /// What is wrong, as one sentence.
    pub trouble: watch::Sender<Option<String>>,
}

/// A certificate with its key.
struct Own {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    renew: Instant,
}

/// The file in which a certificate outlives a restart, and what it is written as first.
const STORED: &str = "node.json";
const NEW: &str = "node.json.new";

/// What is kept in the folder of the certificate.
pub(crate) fn files(folder: &Path) -> [PathBuf; 2] {
    [STORED, NEW].map(|name| folder.join(name))
}

/// Its content: DER; the key is PKCS #8.
#[derive(Serialize, Deserialize)]
struct Stored {
    chain: Vec<Vec<u8>>,
    key: Vec<u8>,
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Joiner {
    /// Works until nobody wants the certificate any more.
    pub async fn run(mut self) {
        let mut own = match self.stored() {
            Ok(own) => own,
            Err(error) => {
                tracing::warn!(%error, "the certificate of an earlier run is not usable");
                None
            }
        };
        let mut authorities = Vec::new();
        let mut backoff = BACKOFF_FIRST;
        let mut number = 0usize;
        let started = Instant::now();
        while !self.issued.is_closed() {
            // The authorities may change while the certificate stays.
            let read = fs::read(&self.join.ca).map_err(file(&self.join.ca));
            let bundle = read.as_ref().map_or(&[][..], Vec::as_slice);
            let changed = read.is_ok() && bundle != authorities;
            if changed {
                authorities = bundle.to_vec();
                self.publish(own.as_ref(), &authorities);
            }
            let due = own.as_ref().is_none_or(|o| Instant::now() >= o.renew || self.is_anew(o));
            if !due {
                let left = own.as_ref().map_or(LOOK, |o| o.renew.saturating_duration_since(Instant::now()));
                sleep(left.min(LOOK)).await;
                continue;
            }
            number = number.wrapping_add(1);
            let asked = match read {
                Err(error) => Err(error),
                Ok(_) => self.ask(number, &authorities).await,
            };
            match asked {
                Ok(new) => {
                    tracing::info!(until = ends(&new.chain), "a gateway has given this node its certificate");
                    backoff = BACKOFF_FIRST;
                    self.store(&new);
                    self.publish(Some(&new), &authorities);
                    own = Some(new);
                    self.trouble.send_replace(None);
                }
                Err(error) => {
                    let valid = own.as_ref().and_then(|o| ends(&o.chain)).is_some_and(|end| end > now() as i64);
                    if own.is_some() && !valid {
                        self.issued.send_replace(None);
                    }
                    let state = if valid { "cannot be renewed" } else { "is missing" };
                    let text = format!("this node's certificate {state}: {error}");
                    if own.is_none() && started.elapsed() < PATIENCE {
                        tracing::info!("{text}");
                    } else {
                        self.say(text);
                    }
                    let half = backoff.as_millis() as u64 / 2;
                    let mut wait = Duration::from_millis(half + random() % (half + 1));
                    // What is wrong is said when the patience ends, not at some later try.
                    if let Some(left) = PATIENCE.checked_sub(started.elapsed()) {
                        wait = wait.min(left);
                    }
                    backoff = (backoff * 2).min(if valid { BACKOFF_LAST } else { MISSING_LAST });
                    // A first gateway is not kept waiting.
                    tokio::select! {
                        () = sleep(wait) => {}
                        _ = self.targets.changed() => {}
                    }
                }
            }
        }
    }

    /// Whether this node's object was made anew since: gateways refuse the certificate for the former one.
    fn is_anew(&self, own: &Own) -> bool {
        let token = fs::read_to_string(&self.join.token).ok();
        let now = token.and_then(|t| Claims::read(t.trim())).and_then(|c| c.node_uid);
        let then = own.chain.first().and_then(node_uid_of);
        now.zip(then).is_some_and(|(now, then)| now != then)
    }

    fn say(&self, text: String) {
        self.trouble.send_if_modified(|old| {
            let new = old.as_ref() != Some(&text);
            *old = Some(text);
            new
        });
    }

    /// Hands the certificate on, with the authorities that are trusted now.
    fn publish(&self, own: Option<&Own>, authorities: &[u8]) {
        let Some(own) = own else { return };
        let made =
            authorities_from_pem(authorities).and_then(|a| Credentials::new(own.chain.clone(), own.key.clone_key(), a));
        match made {
            Ok(credentials) => drop(self.issued.send_replace(Some(Arc::new(credentials)))),
            Err(error) => self.say(format!("{}: {error}", self.join.ca.display())),
        }
    }

    async fn ask(&self, number: usize, authorities: &[u8]) -> Result<Own, JoinError> {
        let address = {
            let targets = self.targets.borrow();
            // Another one each time.
            *targets.get(number % targets.len().max(1)).ok_or(JoinError::Nobody)?
        };
        let token = fs::read_to_string(&self.join.token).map_err(file(&self.join.token))?;
        let token = token.trim().to_owned();
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(JoinError::Unusable(format!("{}: no token", self.join.token.display())));
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![Role::Node.dns_name(&self.node)])?;
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&key)?.der().to_vec();
        let authorities = authorities_from_pem(authorities)?;
        // While the API server is away, a gateway knows this node by the certificate that still holds.
        let held = self.issued.borrow().clone().filter(|c| c.ends() > now() as i64);
        let connection = tidegate_identity::join(address, authorities.clone(), held.as_deref(), None, CONNECT).await?;
        let mut client = IdentityClient::new(connection.channel).max_decoding_message_size(MAX_REPLY);
        let asked = client.join(JoinRequest { node: self.node.clone(), token, request });
        let reply = timeout(ANSWER, asked).await.map_err(|_| JoinError::Silent)?;
        let JoinReply { chain, renew_ms } =
            reply.map_err(|s| JoinError::Refused(format!("{} ({})", s.message(), s.code())))?.into_inner();
        let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        // What gateways would not take is not taken either.
        Credentials::new(chain.clone(), key.clone_key(), authorities)?.check(Role::Node, &self.node, now())?;
        let renew = Instant::now() + Duration::from_millis(renew_ms).clamp(SOONEST, LATEST);
        Ok(Own { chain, key, renew })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.join.folder.join(name)
    }

    /// The certificate of an earlier run, if it still holds.
    fn stored(&self) -> Result<Option<Own>, JoinError> {
        let (path, now) = (self.path(STORED), now());
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(file(&path))?,
        };
        let Stored { chain, key } =
            serde_json::from_slice(&text).map_err(|e| JoinError::Unusable(format!("{}: {e}", path.display())))?;
        let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
        let authorities = authorities_from_pem(&fs::read(&self.join.ca).map_err(file(&self.join.ca))?)?;
        Credentials::new(chain.clone(), key.clone_key(), authorities)?.check(Role::Node, &self.node, now)?;
        let left = ends(&chain).map_or(0, |end| u64::try_from(end).unwrap_or(0).saturating_sub(now));
        // Soon: what was said about its renewal is not known any more, and nodes that restart together ask one by one.
        let wait = Duration::from_secs(left / 3).mul_f64((random() % 1000) as f64 / 1000.0);
        Ok(Some(Own { chain, key, renew: Instant::now() + wait.max(SOONEST) }))
    }

    /// Keeps it for the next run, in one file so that key and certificate fit. Without it that run has to wait for a gateway.
    fn store(&self, own: &Own) {
        let stored =
            Stored { chain: own.chain.iter().map(|c| c.to_vec()).collect(), key: own.key.secret_der().to_vec() };
        let write = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.join.folder)?;
            let new = self.path(NEW);
            // A left-over may have another mode.
            match fs::remove_file(&new) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            out.write_all(&serde_json::to_vec(&stored)?)?;
            fs::rename(&new, self.path(STORED))
        };
        if let Err(error) = write() {
            let folder = self.join.folder.display();
            tracing::warn!(%folder, %error, "the certificate cannot be kept for the next start");
        }
    }
}

fn ends(chain: &[CertificateDer<'_>]) -> Option<i64> {
    chain.first().and_then(validity).map(|(_, end)| end)
}
