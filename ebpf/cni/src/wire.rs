//! What the plugin says to the agent, and the agent to it: one JSON line each way over a Unix socket. Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::spec::{Attachment, Pod};

/// Version of the lines. An agent refuses others, and the plugin then does without it.
pub const VERSION: u32 = 1;
/// The longest line, in octets.
pub const MAX_LINE: usize = 1 << 20;

/// A pod's device: what the plugin found, and what it keeps on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Attached {
    /// Which container's.
    pub attachment: Attachment,
    /// Which pod's.
    pub pod: Pod,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The device on the node's side, by its index.
    pub ifindex: u32,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Ask {
    /// Attach the pod's programs, and answer when its policy holds, or soon if it is closed until then.
    Add(Attached),
    /// The pod's network is about to go.
    Del(Attachment),
    /// Only these are left.
    Gc(Vec<Attachment>),
}

/// The plugin's line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    pub ask: Ask,
}

/// The agent's line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// It is done.
    Done,
    /// It is not, and the plugin does what it can alone.
    Refused(String),
}

/// Reads the plugin's line.
///
/// # Errors
/// Why it is refused, in one sentence.
pub fn request(line: &[u8]) -> Result<Ask, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    if line.len() > MAX_LINE {
        return Err(format!("a line of more than {MAX_LINE} octets"));
    }
    // Another version may ask for what this one does not know.
    let Version { version } = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    if version != VERSION {
        return Err(format!("version {version} is not spoken, but {VERSION}"));
    }
    let request: Request = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    if let Ask::Add(a) = &request.ask
        && (a.ifindex == 0 || a.addresses.is_empty() || a.addresses.len() > crate::spec::MAX_ADDRESSES)
    {
        return Err("a device and at most 16 addresses are needed".into());
    }
    Ok(request.ask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_it_was_and_nothing_else_is_one() {
        let attachment = Attachment { container: "c".into(), ifname: "eth0".into() };
        let pod = Pod { namespace: "shop".into(), name: "web".into(), uid: "u".into() };
        let added = Attached { attachment: attachment.clone(), pod, addresses: vec![[10, 0, 0, 1].into()], ifindex: 7 };
        for ask in [Ask::Add(added.clone()), Ask::Del(attachment.clone()), Ask::Gc(vec![attachment])] {
            let line = serde_json::to_vec(&Request { version: VERSION, ask: ask.clone() }).unwrap_or_default();
            assert_eq!(request(&line), Ok(ask));
        }
        let none = Request { version: VERSION, ask: Ask::Add(Attached { ifindex: 0, ..added }) };
        assert!(request(&serde_json::to_vec(&none).unwrap_or_default()).is_err());
        assert!(request(br#"{"version":2,"ask":{"sing":1}}"#).is_err_and(|e| e.contains("version 2")));
        assert!(request(b"{}").is_err() && request(b"").is_err());
    }
}
