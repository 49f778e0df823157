//! Single requests about objects, as JSON: for commands that run once.

use http::Request;
use serde_json::{Value, json};

use crate::{Connection, Error, within};

/// Objects of one answer to a list.
const PAGE: usize = 500;

/// Reads an object; `None` if there is none.
///
/// # Errors
/// The API server refused, or is away.
pub async fn get(connection: &Connection, path: &str) -> Result<Option<Value>, Error> {
    match send(connection, Request::get(path), &Value::Null).await {
        Err(error) if error.code() == Some(404) => Ok(None),
        other => other.map(Some),
    }
}

/// Reads every object of a collection; `path` has no query.
///
/// # Errors
/// The API server refused, or is away.
pub async fn list(connection: &Connection, path: &str, labels: &str) -> Result<Vec<Value>, Error> {
    let mut all = Vec::new();
    each(connection, path, labels, |object| all.push(object)).await?;
    Ok(all)
}

/// Hands on every object of a collection as it comes, a page at a time; `path` has no query.
///
/// # Errors
/// The API server refused, or is away: there are more than were handed on.
pub async fn each(connection: &Connection, path: &str, labels: &str, mut take: impl FnMut(Value)) -> Result<(), Error> {
    let mut next = String::new();
    loop {
        let query = format!("limit={PAGE}&labelSelector={}&continue={}", escape(labels), escape(&next));
        let mut page = send(connection, Request::get(format!("{path}?{query}")), &Value::Null).await?;
        if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
            items.into_iter().for_each(&mut take);
        }
        page["metadata"]["continue"].as_str().unwrap_or_default().clone_into(&mut next);
        if next.is_empty() {
            return Ok(());
        }
    }
}

/// Makes an object in a collection.
///
/// # Errors
/// The API server refused, or is away; 409 where it is there already.
pub async fn create(connection: &Connection, collection: &str, object: &Value) -> Result<Value, Error> {
    let request = Request::post(collection).header(http::header::CONTENT_TYPE, "application/json");
    send(connection, request, object).await
}

/// Merges a patch into an object (RFC 7386).
///
/// # Errors
/// The API server refused, or is away.
pub async fn merge(connection: &Connection, path: &str, patch: &Value) -> Result<Value, Error> {
    let request = Request::patch(path).header(http::header::CONTENT_TYPE, "application/merge-patch+json");
    send(connection, request, patch).await
}

/// Deletes an object. One that is not there is no error.
///
/// # Errors
/// The API server refused, or is away.
pub async fn delete(connection: &Connection, path: &str) -> Result<(), Error> {
    match send(connection, Request::delete(path), &json!({})).await {
        Err(error) if error.code() != Some(404) => Err(error),
        _ => Ok(()),
    }
}

/// Deletes an object if it still is the one with this UID. That it is not, or not there, is no error.
///
/// # Errors
/// The API server refused, or is away.
pub async fn delete_one(connection: &Connection, path: &str, uid: &str) -> Result<(), Error> {
    let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}});
    let request = Request::delete(path).header(http::header::CONTENT_TYPE, "application/json");
    match send(connection, request, &options).await {
        Err(error) if !matches!(error.code(), Some(404 | 409)) => Err(error),
        _ => Ok(()),
    }
}

async fn send(connection: &Connection, request: http::request::Builder, body: &Value) -> Result<Value, Error> {
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let request = request.body(body).map_err(kube::Error::HttpError)?;
    within(connection.client.request::<Value>(request)).await
}

/// A text as a value of a query.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            out.push(char::from(b));
        } else {
            out += &format!("%{b:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn queries_are_escaped() {
        assert_eq!(super::escape("a=b,c/d é"), "a%3Db%2Cc%2Fd%20%C3%A9");
    }
}
