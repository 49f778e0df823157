//! Gives nodes their certificates.
//!
//! Strangers reach this: a connection has few bytes, one request at a time and a short life (`accept.rs`), and few
//! questions wait for the API server at a time.

use std::sync::Arc;

use tidegate_identity::{Claims, MAX_TOKEN, Role, is_name};
use tidegate_kubernetes::User;
use tidegate_proto::wire::identity_server::Identity;
use tidegate_proto::wire::{JoinReply, JoinRequest};
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status};

use super::authority::Refused;
use super::{Authority, Reviews, Times, Unknown, now};
use crate::accept::Peer;
use crate::nodes::Nodes;

/// The most octets of a request for a certificate.
const MAX_REQUEST: usize = 8 * 1024;
/// The most questions to the API server at a time: for nodes, and for others. Nodes have no more places than that.
const QUESTIONS: [usize; 2] = [64, 16];
/// How long a token may have ended by this gateway's clock, in seconds: the API server's may be behind.
const LEEWAY: u64 = 300;

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
    /// Which nodes there are.
    pub nodes: Nodes,
    questions: [Semaphore; 2],
}

/// Who asks, before anybody else was asked about him.
struct Asker {
    /// The node for which he shows a certificate that still holds, with its UID.
    held: Option<(String, Option<String>)>,
    /// He asks from an address of a node.
    at_node: bool,
}

impl Joins {
    /// A service that asks `reviews`.
    pub fn new(
        authority: watch::Receiver<Option<Arc<Authority>>>,
        reviews: Arc<dyn Reviews>,
        account: String,
        audience: String,
        times: Times,
        nodes: Nodes,
    ) -> Self {
        Self { authority, reviews, account, audience, times, nodes, questions: QUESTIONS.map(Semaphore::new) }
    }

    /// What the API server need not be asked about: a token that is for somebody else, or that has ended.
    fn promising(&self, token: &str, now: u64) -> Result<(), Status> {
        let claims = Claims::read(token).ok_or_else(|| Status::unauthenticated("this is no ServiceAccount token"))?;
        if !claims.audiences.contains(&self.audience) {
            return Err(Status::unauthenticated(format!("the token is not for the audience {}", self.audience)));
        }
        if claims.ends.saturating_add(LEEWAY) < now {
            return Err(Status::unauthenticated("the token has ended"));
        }
        if claims.subject != self.account {
            return Err(Status::permission_denied(format!("the token is not of {}", self.account)));
        }
        Ok(())
    }

    /// The UID of the node, if whoever shows the token may speak for the node.
    async fn may(&self, token: String, node: &str, asker: Asker) -> Result<Option<String>, Status> {
        self.promising(&token, now())?;
        let Asker { held, at_node } = asker;
        let questions = &self.questions[usize::from(!(at_node || held.is_some()))];
        let permit = questions.try_acquire().map_err(|_| Status::unavailable("too many nodes ask; come back"))?;
        let answer = self.reviews.token(token, vec![self.audience.clone()]).await;
        drop(permit);
        let uid = match answer {
            Ok(Some(user)) => {
                permitted(&user, &self.account, node)?;
                user.node_uid().map(str::to_owned)
            }
            Ok(None) => {
                return Err(Status::unauthenticated(format!(
                    "the token is nobody's, has ended, or is not for the audience {}",
                    self.audience
                )));
            }
            Err(why) => match (why, held) {
                // An outage of the API server must not cut nodes off: who was let in stays.
                (Unknown::Away(why), Some((name, uid))) if name == node => {
                    tracing::warn!(
                        node,
                        why,
                        "the API server is away; the certificate that the node has still is renewed"
                    );
                    uid
                }
                (why, _) => return Err(Status::unavailable(why.to_string())),
            },
        };
        if !self.nodes.admits(node, uid.as_deref()) {
            return Err(Status::permission_denied(format!(
                "there is no node {node} that has the UID of the token's pod's node"
            )));
        }
        Ok(uid)
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
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let at_node = peer.as_ref().is_some_and(|p| self.nodes.at(p.address.ip()).is_some());
        let held = peer.and_then(|p| p.bearer.clone()).filter(|b| b.role == Role::Node).map(|b| (b.name, b.uid));
        let JoinRequest { node, token, request } = request.into_inner();
        if !is_name(&node) {
            return Err(Status::invalid_argument("node: not a DNS name"));
        }
        if token.is_empty() || token.len() > MAX_TOKEN || request.len() > MAX_REQUEST {
            return Err(Status::invalid_argument("token, request: missing or too long"));
        }
        let result = self.may(token, &node, Asker { held, at_node }).await;
        let authority = self.authority.borrow().clone();
        let issued = result.and_then(|uid| {
            let authority = authority.ok_or_else(|| Status::unavailable("the authority was not read yet"))?;
            authority.node(&node, uid.as_deref(), &request, now(), &self.times).map_err(|e| match e {
                Refused::Malformed(_) => Status::invalid_argument(e.to_string()),
                Refused::Other(_) => Status::permission_denied(e.to_string()),
                Refused::Broken(_) => Status::unavailable(e.to_string()),
            })
        });
        match issued {
            Ok(issued) => {
                tracing::info!(node, ends = issued.ends, "certificate issued");
                metrics::counter!(crate::telemetry::JOINS, "result" => "issued").increment(1);
                let chain = issued.chain.iter().map(|c| c.to_vec()).collect();
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
