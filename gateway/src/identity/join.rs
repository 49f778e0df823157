//! Gives nodes their certificates.
//!
//! Strangers reach this: a connection has few bytes, one request at a time and a short life (`accept.rs`), and few
//! questions wait for the API server at a time.

use std::sync::Arc;

use tidegate_identity::{Role, is_name, name_of};
use tidegate_kubernetes::User;
use tidegate_proto::wire::identity_server::Identity;
use tidegate_proto::wire::{JoinReply, JoinRequest};
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status};

use super::authority::Refused;
use super::{Authority, Reviews, Times, Unknown, now};

/// The most octets of a token and of a request for a certificate.
const MAX_TOKEN: usize = 16 * 1024;
const MAX_REQUEST: usize = 8 * 1024;
/// The most questions to the API server at a time.
const QUESTIONS: usize = 32;

/// The service.
pub struct Joins {
    /// What signs; absent while the Secret was not read yet.
    pub authority: watch::Receiver<Option<Arc<Authority>>>,
    /// Whose token it is.
    pub reviews: Arc<dyn Reviews>,
    /// The agents' ServiceAccount, as `system:serviceaccount:NAMESPACE:NAME`.
    pub account: String,
    /// What tokens have to be for.
    pub audience: String,
    /// How long certificates hold.
    pub times: Times,
    questions: Semaphore,
}

impl Joins {
    /// A service that asks `reviews`.
    pub fn new(
        authority: watch::Receiver<Option<Arc<Authority>>>,
        reviews: Arc<dyn Reviews>,
        account: String,
        audience: String,
        times: Times,
    ) -> Self {
        Self { authority, reviews, account, audience, times, questions: Semaphore::new(QUESTIONS) }
    }

    /// Whether whoever shows the token may speak for the node; `held` is the node of the certificate that he has still.
    async fn may(&self, token: String, node: &str, held: Option<String>) -> Result<(), Status> {
        let permit = self.questions.try_acquire().map_err(|_| Status::unavailable("too many nodes ask; come back"))?;
        let answer = self.reviews.token(token, vec![self.audience.clone()]).await;
        drop(permit);
        match answer {
            Ok(Some(user)) => permitted(&user, &self.account, node),
            Ok(None) => Err(Status::unauthenticated(format!(
                "the token is nobody's, has ended, or is not for the audience {}",
                self.audience
            ))),
            // An outage of the API server must not cut nodes off: who was let in stays.
            Err(Unknown::Away(why)) if held.as_deref() == Some(node) => {
                tracing::warn!(node, why, "the API server is away; the certificate that the node has still is renewed");
                Ok(())
            }
            Err(why) => Err(Status::unavailable(why.to_string())),
        }
    }
}

/// A token speaks for the node that its pod runs on, if it is of the agents' ServiceAccount.
fn permitted(user: &User, account: &str, node: &str) -> Result<(), Status> {
    if user.name != account {
        return Err(Status::permission_denied(format!("the token is of {}, not of {account}", user.name)));
    }
    match user.node() {
        Some(named) if named == node => Ok(()),
        Some(named) => Err(Status::permission_denied(format!("the token's pod runs on {named}, not on {node}"))),
        None => Err(Status::permission_denied(
            "the token names no node: it must be projected into a pod, by Kubernetes 1.30 or later",
        )),
    }
}

#[tonic::async_trait]
impl Identity for Joins {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let certificates = request.peer_certs();
        let held = certificates.as_ref().and_then(|c| name_of(c.first()?, Role::Node));
        let JoinRequest { node, token, request } = request.into_inner();
        if !is_name(&node) {
            return Err(Status::invalid_argument("node: not a DNS name"));
        }
        if token.is_empty() || token.len() > MAX_TOKEN || request.len() > MAX_REQUEST {
            return Err(Status::invalid_argument("token, request: missing or too long"));
        }
        let result = self.may(token, &node, held).await;
        let authority = self.authority.borrow().clone();
        let issued = result.and_then(|()| {
            let authority = authority.ok_or_else(|| Status::unavailable("the authority was not read yet"))?;
            authority.node(&node, &request, now(), &self.times).map_err(|e| match e {
                Refused::Malformed(_) => Status::invalid_argument(e.to_string()),
                Refused::Other(_) => Status::permission_denied(e.to_string()),
                Refused::Broken(_) => Status::unavailable(e.to_string()),
            })
        });
        match issued {
            Ok(issued) => {
                tracing::info!(node, ends = issued.ends, "certificate issued");
                metrics::counter!(crate::telemetry::JOINS, "result" => "issued").increment(1);
                let chain = vec![issued.certificate.to_vec()];
                Ok(Response::new(JoinReply { chain, renew_ms: issued.renew.saturating_mul(1000) }))
            }
            Err(status) => {
                metrics::counter!(crate::telemetry::JOINS, "result" => "refused").increment(1);
                // Strangers may ask without end.
                tracing::debug!(node, why = status.message(), "no certificate");
                Err(status)
            }
        }
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
pub(crate) mod tests;
