//! Who is who, with Kubernetes: the authority in a Secret, this gateway's own certificate, and nodes that ask for theirs.
//!
//! ```text
//!  Secret ◀─compare-and-swap─ keeper (kube thread) ──▶ ConfigMap: the trust bundle that agents mount
//!                               │ authority      │ own certificate
//!                               ▼                ▼
//!  agent ──token, request──▶ join ◀─ TokenReview  control port, peers
//! ```

mod authority;
mod join;
mod keeper;
mod reviews;

pub use join::Joins;
pub use reviews::{Reviews, Unknown};

use authority::{Authority, Times};
use keeper::Keeper;
use reviews::KubeReviews;

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Result, bail};
use parking_lot::Mutex;
use tidegate_identity::{Files, Paths, Source};
use tidegate_kubernetes::Reviewer;

use crate::admin::Guard;
use crate::config::{self, Config};
use crate::kube::Kube;
use crate::nodes::Nodes;

/// Unix seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// This gateway's identity, and what gives nodes theirs.
pub struct Identity {
    /// This gateway's certificate.
    pub source: Source,
    /// Nodes' certificates; absent where they are given in files.
    pub joins: Option<Joins>,
    /// Who somebody is, and what he may; absent without Kubernetes.
    pub reviews: Option<Arc<dyn Reviews>>,
}

impl Identity {
    /// By the files of the configuration, or else by the cluster's authority. `waiting` goes when there is a certificate.
    ///
    /// # Errors
    /// When there is neither.
    pub fn start(config: &Config, kube: Option<&Kube>, nodes: Nodes, waiting: Guard) -> Result<Self> {
        let reviews = kube.map(|kube| {
            let reviewer = Reviewer::new(&kube.connection());
            Arc::new(KubeReviews::new(kube.handle(), reviewer)) as Arc<dyn Reviews>
        });
        if let Some(config::Tls { certificate, key, ca }) = config.tls.clone() {
            let source = Source::Files(Arc::new(Mutex::new(Files::new(Paths { certificate, key, ca }))));
            return Ok(Self { source, joins: None, reviews });
        }
        let (Some(kube), Some(kubernetes), Some(reviews)) = (kube, &config.kubernetes, &reviews) else {
            bail!("tls: certificates must be given");
        };
        let settings = &kubernetes.identity;
        let times = Times {
            certificate: settings.certificate_seconds,
            authority: settings.authority_seconds,
            overlap: settings.overlap_seconds,
        };
        let connection = kube.connection();
        let account = format!("system:serviceaccount:{}:{}", connection.namespace, settings.service_account);
        let (keeper, kept) = Keeper::new(&connection, settings, times, Some(waiting));
        kube.spawn(keeper.run());
        let joins = Joins::new(kept.authority, reviews.clone(), account, settings.audience.clone(), times, nodes);
        Ok(Self { source: Source::Issued(kept.issued), joins: Some(joins), reviews: Some(reviews.clone()) })
    }
}
