//! Questions to the API server, from other threads than the one that speaks to it.

use tidegate_kubernetes::{Access, Error, Reviewer, User};
use tokio::runtime::Handle;
use tokio::task::JoinError;

/// Why nobody says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// The API server is not there.
    #[error("the API server does not answer: {0}")]
    Away(String),
    /// It refuses to say.
    #[error("the API server refuses the question: {0}")]
    Refused(String),
}

/// Who somebody is, and what he may.
#[tonic::async_trait]
pub trait Reviews: Send + Sync + 'static {
    /// Whose token this is; None if it is nobody's, or not for one of the audiences. An empty list is the API
    /// server's own.
    async fn token(&self, token: String, audiences: Vec<String>) -> Result<Option<User>, Unknown>;
    /// Whether he may.
    async fn access(&self, user: User, access: Access) -> Result<bool, Unknown>;
}

/// By the API server.
pub struct KubeReviews {
    handle: Handle,
    reviewer: Reviewer,
}

impl KubeReviews {
    /// Asks on this runtime.
    pub fn new(handle: Handle, reviewer: Reviewer) -> Self {
        Self { handle, reviewer }
    }
}

fn unknown<T>(answer: Result<Result<T, Error>, JoinError>) -> Result<T, Unknown> {
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(e)) if e.code().is_some_and(|c| (400..500).contains(&c) && c != 429) => {
            Err(Unknown::Refused(e.to_string()))
        }
        Ok(Err(e)) => Err(Unknown::Away(e.to_string())),
        Err(_) => Err(Unknown::Away("this gateway is about to end".into())),
    }
}

#[tonic::async_trait]
impl Reviews for KubeReviews {
    async fn token(&self, token: String, audiences: Vec<String>) -> Result<Option<User>, Unknown> {
        let reviewer = self.reviewer.clone();
        unknown(self.handle.spawn(async move { reviewer.token(token, audiences).await }).await)
    }

    async fn access(&self, user: User, access: Access) -> Result<bool, Unknown> {
        let reviewer = self.reviewer.clone();
        unknown(self.handle.spawn(async move { reviewer.access(&user, &access).await }).await)
    }
}
