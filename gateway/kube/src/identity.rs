//! What identity needs of the API server: a Secret and a ConfigMap written by compare-and-swap, and who somebody is and what
//! he may (TokenReview, SubjectAccessReview).

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use crate::client::{Connection, Error, within};

/// Say on which node a token's pod is (Kubernetes 1.30 and later).
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// An object's content at a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The resourceVersion; absent: there is no such object.
    pub version: Option<String>,
    /// The content; absent: the object or its key is not there.
    pub content: Option<T>,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It holds.
    Done,
    /// Somebody else wrote first: read again.
    Lost,
}

fn written<T>(result: Result<T, Error>) -> Result<Written, Error> {
    match result {
        Ok(_) => Ok(Written::Done),
        // Created or changed meanwhile, or deleted.
        Err(e) if matches!(e.code(), Some(409 | 404)) => Ok(Written::Lost),
        Err(e) => Err(e),
    }
}

/// One key of a Secret.
pub struct SecretKey {
    api: Api<Secret>,
    name: String,
    key: String,
}

impl SecretKey {
    /// A key of the Secret of this name in the gateways' namespace.
    pub fn new(connection: &Connection, name: &str, key: &str) -> Self {
        let api = Api::namespaced(connection.client.clone(), &connection.namespace);
        Self { api, name: name.to_owned(), key: key.to_owned() }
    }

    /// What is there.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn read(&self) -> Result<Versioned<Vec<u8>>, Error> {
        let found = within(self.api.get_opt(&self.name)).await?;
        let content = found.as_ref().and_then(|s| s.data.as_ref()?.get(&self.key)).map(|b| b.0.clone());
        Ok(Versioned { version: found.and_then(|s| s.metadata.resource_version), content })
    }

    /// What is at other keys of the Secret, as text.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn read_keys<const N: usize>(&self, keys: [&str; N]) -> Result<[Option<String>; N], Error> {
        let data = within(self.api.get_opt(&self.name)).await?.and_then(|s| s.data).unwrap_or_default();
        Ok(keys.map(|key| data.get(key).and_then(|b| String::from_utf8(b.0.clone()).ok())))
    }

    /// Writes what replaces `version`. Other keys of the Secret are removed.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer: it may be written then.
    pub async fn write(&self, version: Option<String>, content: Vec<u8>) -> Result<Written, Error> {
        let data = BTreeMap::from([(self.key.clone(), ByteString(content))]);
        let secret = Secret { metadata: meta(&self.name, version.clone()), data: Some(data), ..Secret::default() };
        let post = PostParams::default();
        written(match version {
            None => within(self.api.create(&post, &secret)).await,
            Some(_) => within(self.api.replace(&self.name, &post, &secret)).await,
        })
    }
}

/// One key of a ConfigMap.
pub struct ConfigMapKey {
    api: Api<ConfigMap>,
    name: String,
    key: String,
}

impl ConfigMapKey {
    /// A key of the ConfigMap of this name in the gateways' namespace.
    pub fn new(connection: &Connection, name: &str, key: &str) -> Self {
        let api = Api::namespaced(connection.client.clone(), &connection.namespace);
        Self { api, name: name.to_owned(), key: key.to_owned() }
    }

    /// What is there.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn read(&self) -> Result<Versioned<String>, Error> {
        let found = within(self.api.get_opt(&self.name)).await?;
        let content = found.as_ref().and_then(|c| c.data.as_ref()?.get(&self.key)).cloned();
        Ok(Versioned { version: found.and_then(|c| c.metadata.resource_version), content })
    }

    /// Writes what replaces `version`. Other keys of the ConfigMap are removed.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer: it may be written then.
    pub async fn write(&self, version: Option<String>, content: String) -> Result<Written, Error> {
        let data = BTreeMap::from([(self.key.clone(), content)]);
        let map = ConfigMap { metadata: meta(&self.name, version.clone()), data: Some(data), ..ConfigMap::default() };
        let post = PostParams::default();
        written(match version {
            None => within(self.api.create(&post, &map)).await,
            Some(_) => within(self.api.replace(&self.name, &post, &map)).await,
        })
    }
}

/// The label of what gateways make here, and its value.
pub(crate) const MADE: (&str, &str) = ("app.kubernetes.io/part-of", "tidegate");

fn meta(name: &str, version: Option<String>) -> ObjectMeta {
    let labels = BTreeMap::from([(MADE.0.to_owned(), MADE.1.to_owned())]);
    ObjectMeta { name: Some(name.to_owned()), resource_version: version, labels: Some(labels), ..ObjectMeta::default() }
}

/// Who shows a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// `system:serviceaccount:NAMESPACE:NAME` for a ServiceAccount.
    pub name: String,
    /// Changes when somebody else gets the name.
    pub uid: String,
    /// What he belongs to.
    pub groups: Vec<String>,
    /// What else the API server knows, such as the pod of a token.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// The node of the pod that the token is bound to. None if it is no pod's, or names several.
    pub fn node(&self) -> Option<&str> {
        self.one(NODE_NAME)
    }

    /// The UID of that node.
    pub fn node_uid(&self) -> Option<&str> {
        self.one(NODE_UID)
    }

    fn one(&self, key: &str) -> Option<&str> {
        match self.extra.get(key)?.as_slice() {
            [one] => Some(one),
            _ => None,
        }
    }
}

/// What somebody wants to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read what a namespace's `NamespaceEgress` says.
    Namespace(String),
    /// Read that of every namespace.
    Everything,
    /// Read a path such as `/metrics`.
    Path(String),
}

/// Asks the API server about others. Cheap to clone.
#[derive(Clone)]
pub struct Reviewer {
    tokens: Api<TokenReview>,
    accesses: Api<SubjectAccessReview>,
}

impl Reviewer {
    /// Through this connection.
    pub fn new(connection: &Connection) -> Self {
        let client = || connection.client.clone();
        Self { tokens: Api::all(client()), accesses: Api::all(client()) }
    }

    /// Whose token this is. None if it is nobody's, has ended, or is not for one of the audiences; an empty list is
    /// the API server's own.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn token(&self, token: String, audiences: Vec<String>) -> Result<Option<User>, Error> {
        let spec =
            TokenReviewSpec { token: Some(token), audiences: (!audiences.is_empty()).then(|| audiences.clone()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = within(self.tokens.create(&PostParams::default(), &review)).await?;
        let status = answer.status.unwrap_or_default();
        let named = status.audiences.unwrap_or_default();
        // An authenticator that does not know audiences names none.
        let meant = audiences.is_empty() || audiences.iter().any(|a| named.contains(a));
        if status.authenticated != Some(true) || !meant {
            return Ok(None);
        }
        let UserInfo { username, uid, groups, extra } = status.user.unwrap_or_default();
        let user = User {
            name: username.unwrap_or_default(),
            uid: uid.unwrap_or_default(),
            groups: groups.unwrap_or_default(),
            extra: extra.unwrap_or_default(),
        };
        Ok(Some(user).filter(|u| !u.name.is_empty()))
    }

    /// Whether somebody may.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn access(&self, user: &User, access: &Access) -> Result<bool, Error> {
        let mut spec = SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: Some(user.uid.clone()),
            groups: Some(user.groups.clone()),
            extra: Some(user.extra.clone()),
            ..SubjectAccessReviewSpec::default()
        };
        let resource = |namespace: Option<String>| ResourceAttributes {
            group: Some("tidegate.dev".to_owned()),
            resource: Some("namespaceegresses".to_owned()),
            verb: Some("get".to_owned()),
            namespace,
            ..ResourceAttributes::default()
        };
        match access {
            Access::Namespace(namespace) => spec.resource_attributes = Some(resource(Some(namespace.clone()))),
            Access::Everything => spec.resource_attributes = Some(resource(None)),
            Access::Path(path) => {
                let verb = Some("get".to_owned());
                spec.non_resource_attributes = Some(NonResourceAttributes { path: Some(path.clone()), verb });
            }
        }
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let answer = within(self.accesses.create(&PostParams::default(), &review)).await?;
        Ok(answer.status.is_some_and(|s| s.allowed && s.denied != Some(true)))
    }
}
