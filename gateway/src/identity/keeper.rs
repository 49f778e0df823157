//! Keeps the authority's Secret, the trust bundle, and this gateway's own certificate.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tidegate_identity::{Credentials, Role, authorities_from_pem};
use tidegate_kubernetes::{ConfigMapKey, Connection, SecretKey};
use tokio::sync::watch;
use tokio::time::sleep;

use super::{Authority, Times, now};
use crate::admin::Guard;
use crate::config;

/// The keys of the Secret and of the ConfigMap.
const AUTHORITY: &str = "authority.json";
/// Those of a Secret that is given: `kubernetes.io/tls`.
const GIVEN: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];
const BUNDLE: &str = "ca.crt";
/// How often the Secret is read. A rotation shows within this time.
const EVERY: Duration = Duration::from_secs(30);
/// The least time between two passes.
const SOONEST: Duration = Duration::from_secs(1);
/// The time to the next pass after the first that failed; it doubles with each that does, up to [`EVERY`].
const AGAIN: Duration = Duration::from_millis(500);
/// Reads and writes of one pass: each write is followed by a reading.
const ROUNDS: usize = 8;

/// The task's state.
pub struct Keeper {
    gateway: String,
    names: Vec<String>,
    secret: SecretKey,
    /// The Secret is somebody else's, and only read.
    given: bool,
    trust: ConfigMapKey,
    times: Times,
    authority: watch::Sender<Option<Arc<Authority>>>,
    issued: watch::Sender<Option<Arc<Credentials>>>,
    own: Option<Own>,
    waiting: Option<Guard>,
}

struct Own {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Unix seconds.
    renew: u64,
    bundle: String,
}

/// What others take from it.
pub struct Kept {
    /// What signs.
    pub authority: watch::Receiver<Option<Arc<Authority>>>,
    /// This gateway's own certificate.
    pub issued: watch::Receiver<Option<Arc<Credentials>>>,
}

impl Keeper {
    /// A keeper of the Secret and the ConfigMap that `settings` name. `waiting` goes with the first certificate.
    pub fn new(
        connection: &Connection,
        settings: &config::Identity,
        times: Times,
        waiting: Option<Guard>,
    ) -> (Self, Kept) {
        let (authority, authority_rx) = watch::channel(None);
        let (issued, issued_rx) = watch::channel(None);
        let Connection { namespace, service, name, .. } = connection;
        // For those who ask by the Service's name, such as of the admin API.
        let names = vec![format!("{service}.{namespace}.svc"), format!("{service}.{namespace}.svc.cluster.local")];
        let this = Self {
            gateway: name.clone(),
            names,
            secret: SecretKey::new(connection, &settings.secret, AUTHORITY),
            given: settings.given,
            trust: ConfigMapKey::new(connection, &settings.trust, BUNDLE),
            times,
            authority,
            issued,
            own: None,
            waiting,
        };
        (this, Kept { authority: authority_rx, issued: issued_rx })
    }

    /// Works until nobody wants a certificate any more.
    pub async fn run(mut self) {
        let mut said = String::new();
        let mut failed = 0;
        while !self.issued.is_closed() {
            let read = if self.given { self.read_given().await } else { self.read().await };
            let read = read.map(|authority| {
                self.authority.send_if_modified(|old| {
                    let new = old.as_deref() != Some(&authority);
                    if new {
                        *old = Some(Arc::new(authority));
                    }
                    new
                });
            });
            // Also while the API server is away.
            let renewed = self.renew();
            match read.and(renewed) {
                Ok(()) => {
                    said.clear();
                    failed = 0;
                }
                Err(error) => {
                    failed += 1;
                    let text = format!("{error:#}");
                    if text != said {
                        tracing::error!(
                            error = text,
                            "the cluster's authority cannot be kept; what was read last holds"
                        );
                        said = text;
                    }
                }
            }
            let authority = self.authority.borrow().clone();
            let due = authority.and_then(|a| a.due(&self.times)).into_iter().chain(self.own.as_ref().map(|o| o.renew));
            let left = due.min().map_or(EVERY, |at| Duration::from_secs(at.saturating_sub(now())));
            sleep(pause(failed, left, rand::random_range(0.5..1.0))).await;
        }
    }

    /// Brings Secret and bundle up to date; returns what holds then.
    async fn read(&self) -> Result<Authority> {
        for _ in 0..ROUNDS {
            // In this order: a bundle that was read before a newer authority was written is not written over.
            let trust = self.trust.read().await.context("the trust ConfigMap")?;
            let secret = self.secret.read().await.context("the authority's Secret")?;
            let now = now();
            let Some(bytes) = &secret.content else {
                // To write it would remove the other keys: somebody's own authority, perhaps.
                if secret.version.is_some() {
                    bail!(
                        "the authority's Secret is there without {AUTHORITY}: set identity.given if it is yours, or delete it"
                    );
                }
                let first = Authority::first(now, &self.times, KeyPair::generate()?)?;
                tracing::info!("there is no authority yet; making one");
                self.secret.write(secret.version, first.to_bytes()).await.context("the authority's Secret")?;
                continue;
            };
            let authority = Authority::from_bytes(bytes).context("the authority's Secret")?;
            let mut new = authority.step(now, &self.times, KeyPair::generate)?;
            if new.is_none() {
                let bundle = authority.bundle();
                if trust.content.as_ref() != Some(&bundle) {
                    tell_apart(trust.content.as_deref(), &bundle);
                    self.trust.write(trust.version, bundle).await.context("the trust ConfigMap")?;
                    continue;
                }
                new = authority.published(now);
            }
            let Some(new) = new else { return Ok(authority) };
            tracing::info!(?new, "the authority goes a step on");
            self.secret.write(secret.version, new.to_bytes()).await.context("the authority's Secret")?;
        }
        bail!("others keep writing the Secret or the ConfigMap");
    }

    /// Reads the Secret that somebody else keeps, and brings the bundle up to date.
    async fn read_given(&self) -> Result<Authority> {
        for _ in 0..ROUNDS {
            let trust = self.trust.read().await.context("the trust ConfigMap")?;
            let [certificates, key, roots] = self.secret.read_keys(GIVEN).await.context("the authority's Secret")?;
            let needed = |content: Option<String>, key: &str| {
                content.with_context(|| format!("the authority's Secret, which is given, has no {key}"))
            };
            let (certificates, key) = (needed(certificates, GIVEN[0])?, needed(key, GIVEN[1])?);
            let authority = Authority::given(&certificates, &key, roots.as_deref())
                .context("the authority's Secret, which is given")?;
            let bundle = authority.bundle();
            if trust.content.as_ref() == Some(&bundle) {
                return Ok(authority);
            }
            tell_apart(trust.content.as_deref(), &bundle);
            self.trust.write(trust.version, bundle).await.context("the trust ConfigMap")?;
        }
        bail!("others keep writing the ConfigMap");
    }

    /// Renews the own certificate if it is time, and hands it on with the authorities that are trusted now.
    fn renew(&mut self) -> Result<()> {
        let Some(authority) = self.authority.borrow().clone() else { return Ok(()) };
        let (now, bundle) = (now(), authority.bundle());
        let held = self.own.as_ref().filter(|o| now < o.renew);
        if held.is_some_and(|o| o.bundle == bundle) {
            return Ok(());
        }
        // A new bundle, and perhaps without the authority of the certificate.
        let kept = held.and_then(|o| credentials(&o.chain, &o.key, &bundle).ok());
        if let Some(kept) = kept.filter(|c| c.check(Role::Gateway, &self.gateway, now).is_ok()) {
            if let Some(own) = &mut self.own {
                own.bundle = bundle;
            }
            self.issued.send_replace(Some(Arc::new(kept)));
            return Ok(());
        }
        let key = KeyPair::generate()?;
        let issued = authority.gateway(&self.gateway, &self.names, &key, now, &self.times)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain = issued.chain;
        let credentials = credentials(&chain, &key, &bundle)?;
        credentials.check(Role::Gateway, &self.gateway, now)?;
        tracing::info!(ends = issued.ends, "this gateway's certificate is renewed");
        self.issued.send_replace(Some(Arc::new(credentials)));
        self.own = Some(Own { chain, key, renew: now + issued.renew, bundle });
        self.waiting = None;
        Ok(())
    }
}

/// Says so where nobody is trusted from now on who was until now.
fn tell_apart(old: Option<&str>, new: &str) {
    if old.is_some_and(|old| are_apart(old, new)) {
        tracing::warn!(
            "another authority takes the place of the one that was trusted: agents are cut off until they have read the ConfigMap \
             and have new certificates, and until then their nodes keep what they know"
        );
    }
}

/// Whether the first bundle has certificates, and the second none of them.
fn are_apart(old: &str, new: &str) -> bool {
    let all = |pem: &str| authorities_from_pem(pem.as_bytes()).unwrap_or_default();
    let (old, new) = (all(old), all(new));
    !old.is_empty() && old.iter().all(|c| !new.contains(c))
}

/// The time to the next pass, after so many that failed one after the other. `left`: until something is due. `jitter`: a
/// number of at most 1, so that gateways do not come back all at once.
fn pause(failed: u32, left: Duration, jitter: f64) -> Duration {
    let wait = left.clamp(SOONEST, EVERY);
    match failed.checked_sub(1) {
        None => wait,
        Some(doublings) => wait.min(AGAIN.saturating_mul(2u32.saturating_pow(doublings)).mul_f64(jitter)),
    }
}

fn credentials(
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    bundle: &str,
) -> Result<Credentials, tidegate_identity::Error> {
    Credentials::new(chain.to_vec(), key.clone_key(), authorities_from_pem(bundle.as_bytes())?)
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
