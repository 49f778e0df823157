//! What a container runtime asks of a plugin, and how it is answered: CNI 1.1 (github.com/containernetworking/cni, SPEC.md).
//! Pure.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::files;

/// Versions of the specification that are spoken. A chained plugin hands the result on as it came, whatever the version.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest one.
pub const NEWEST: &str = "1.1.0";
/// The most octets on standard input.
pub const MAX_INPUT: usize = 1 << 20;
/// The most addresses of a pod.
pub const MAX_ADDRESSES: usize = 16;

/// Codes of errors: those below 100 are the specification's.
pub mod code {
    /// The version of the configuration is not spoken.
    pub const VERSION: u32 = 1;
    /// An environment variable is wrong.
    pub const ENVIRONMENT: u32 = 4;
    /// Input or output failed.
    pub const IO: u32 = 5;
    /// The input is no JSON of the right form.
    pub const DECODE: u32 = 6;
    /// The configuration is wrong.
    pub const CONFIG: u32 = 7;
    /// A transient failure; the runtime may try again.
    pub const AGAIN: u32 = 11;
    /// The pod's device is of a kind that no program can be attached to.
    pub const DEVICE: u32 = 100;
    /// CHECK found no program.
    pub const MISSING: u32 = 101;
}

/// Why it failed, as the runtime is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{msg}: {details}")]
pub struct CniError {
    /// The version that the runtime speaks.
    #[serde(rename = "cniVersion")]
    pub version: String,
    /// One of [`code`].
    pub code: u32,
    /// What is wrong; names the field or variable where it is one.
    pub msg: String,
    /// Why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// An error for a runtime that speaks the newest version until the configuration says otherwise.
    pub fn new(code: u32, msg: impl Into<String>, details: impl ToString) -> Self {
        Self { version: NEWEST.into(), code, msg: msg.into(), details: details.to_string() }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A container joins the network.
    Add,
    /// It leaves.
    Del,
    /// Is it still as it was?
    Check,
    /// Only these are left.
    Gc,
    /// Could a container be added?
    Status,
    /// Which versions are spoken?
    Version,
}

/// A container's device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// The container's id.
    #[serde(rename = "containerID")]
    pub container: String,
    /// Its device's name, inside.
    pub ifname: String,
}

/// A pod of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; empty where the runtime does not tell it.
    #[serde(default)]
    pub uid: String,
}

/// Where the agent and its files are: keys of the plugin's entry in the network configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Paths {
    /// Folder of the agent's socket and of the records.
    #[serde(default = "default_folder")]
    pub folder: PathBuf,
    /// What holds while no agent runs.
    #[serde(default = "default_standing")]
    pub standing: PathBuf,
    /// Folder of pinned programs, on a bpffs.
    #[serde(default = "default_pins")]
    pub pins: PathBuf,
}

fn default_folder() -> PathBuf {
    files::FOLDER.into()
}

fn default_standing() -> PathBuf {
    files::STANDING.into()
}

fn default_pins() -> PathBuf {
    files::PINS.into()
}

impl Default for Paths {
    fn default() -> Self {
        Self { folder: default_folder(), standing: default_standing(), pins: default_pins() }
    }
}

/// A call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What is asked for.
    pub command: Command,
    /// The version that the answer is written in.
    pub version: String,
    /// Where the agent is.
    pub paths: Paths,
    /// Whose device; of `Add`, `Del` and `Check`.
    pub attachment: Option<Attachment>,
    /// The container's network namespace; of `Add` and `Check`, of `Del` if it is still there.
    pub netns: Option<PathBuf>,
    /// The pod; of `Add`.
    pub pod: Option<Pod>,
    /// Its addresses, as the plugins before this one gave them.
    pub addresses: Vec<IpAddr>,
    /// Their result, as it came; of `Add` and `Check`.
    pub result: Option<String>,
    /// What is left; of `Gc`.
    pub left: Vec<Attachment>,
}

#[derive(Deserialize)]
struct Config<'a> {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(flatten)]
    paths: Paths,
    #[serde(rename = "prevResult", default, borrow)]
    result: Option<&'a RawValue>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    left: Option<Vec<Attachment>>,
}

#[derive(Deserialize)]
struct Outer<'a> {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(rename = "prevResult", default, borrow)]
    result: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Given {
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
}

impl Call {
    /// Reads a call. `variable` gives the environment.
    ///
    /// # Errors
    /// The first thing that is wrong, as the specification codes it; the message names the variable or field.
    pub fn read(variable: impl Fn(&str) -> Option<String>, input: &[u8]) -> Result<Self, CniError> {
        let command = match variable("CNI_COMMAND").as_deref() {
            Some("ADD") => Command::Add,
            Some("DEL") => Command::Del,
            Some("CHECK") => Command::Check,
            Some("GC") => Command::Gc,
            Some("STATUS") => Command::Status,
            Some("VERSION") => Command::Version,
            Some(other) => return Err(environment("CNI_COMMAND", format!("{other:?} is no command"))),
            None => return Err(environment("CNI_COMMAND", "it is not set")),
        };
        if input.len() > MAX_INPUT {
            return Err(CniError::new(code::DECODE, "stdin", format!("more than {MAX_INPUT} octets")));
        }
        let mut version = NEWEST.to_owned();
        Self::read_as(command, &mut version, &variable, input).map_err(|e| CniError { version, ..e })
    }

    fn read_as(
        command: Command,
        version: &mut String,
        variable: &impl Fn(&str) -> Option<String>,
        input: &[u8],
    ) -> Result<Self, CniError> {
        let decode = |e: serde_json::Error| CniError::new(code::DECODE, "stdin", e);
        // The raw result cannot be told from other keys that are flattened.
        let outer: Outer<'_> = serde_json::from_slice(input).map_err(decode)?;
        if !outer.version.is_empty() && VERSIONS.contains(&outer.version.as_str()) {
            version.clone_from(&outer.version);
        }
        let mut call = Self {
            command,
            version: version.clone(),
            paths: Paths::default(),
            attachment: None,
            netns: None,
            pod: None,
            addresses: Vec::new(),
            result: None,
            left: Vec::new(),
        };
        if command == Command::Version {
            return Ok(call);
        }
        if !VERSIONS.contains(&outer.version.as_str()) {
            let spoken = VERSIONS.join(", ");
            let text = format!("{:?} is none of {spoken}", outer.version);
            return Err(CniError::new(code::VERSION, "cniVersion", text));
        }
        let config: Config<'_> = serde_json::from_slice(input).map_err(decode)?;
        debug_assert_eq!(config.version, outer.version);
        for (key, path) in
            [("folder", &config.paths.folder), ("standing", &config.paths.standing), ("pins", &config.paths.pins)]
        {
            if !path.is_absolute() {
                return Err(CniError::new(code::CONFIG, key, format!("{} is not absolute", path.display())));
            }
        }
        call.paths = config.paths;
        match command {
            Command::Gc => {
                let left = config.left.unwrap_or_default();
                if let Some(bad) = left.iter().find(|a| !is_container(&a.container) || !is_device(&a.ifname)) {
                    let text = format!("{:?} of {:?}", bad.ifname, bad.container);
                    return Err(CniError::new(code::CONFIG, "cni.dev/valid-attachments", text));
                }
                call.left = left;
                return Ok(call);
            }
            Command::Status => return Ok(call),
            _ => {}
        }
        let needed = |name: &'static str| variable(name).ok_or_else(|| environment(name, "it is not set"));
        let (container, ifname) = (needed("CNI_CONTAINERID")?, needed("CNI_IFNAME")?);
        if !is_container(&container) {
            return Err(environment("CNI_CONTAINERID", format!("{container:?} is no id")));
        }
        if !is_device(&ifname) {
            return Err(environment("CNI_IFNAME", format!("{ifname:?} is no device's name")));
        }
        call.attachment = Some(Attachment { container, ifname });
        call.netns = variable("CNI_NETNS").filter(|p| !p.is_empty()).map(PathBuf::from);
        if command == Command::Del {
            return Ok(call);
        }
        if call.netns.is_none() {
            return Err(environment("CNI_NETNS", "it is not set"));
        }
        let missing =
            || CniError::new(code::CONFIG, "prevResult", "it is missing: this plugin is chained behind others");
        let result = config.result.or(outer.result).filter(|r| r.get() != "null").ok_or_else(missing)?;
        call.addresses = addresses(result)?;
        call.result = Some(result.get().to_owned());
        if command == Command::Add {
            call.pod = Some(pod(&variable("CNI_ARGS").unwrap_or_default())?);
        }
        Ok(call)
    }
}

fn environment(name: &'static str, details: impl ToString) -> CniError {
    CniError::new(code::ENVIRONMENT, name, details)
}

/// An id may become part of a file's name.
fn is_container(id: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=128).contains(&id.len()) && id.bytes().all(good) && id.as_bytes()[0].is_ascii_alphanumeric()
}

fn is_device(name: &str) -> bool {
    let bad = |b: u8| b <= b' ' || b >= 0x7f || matches!(b, b'/' | b':');
    (1..16).contains(&name.len()) && !matches!(name, "." | "..") && !name.bytes().any(bad)
}

/// A name of an object of Kubernetes.
fn is_name(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
    (1..=253).contains(&name.len()) && name.bytes().all(good)
}

fn addresses(result: &RawValue) -> Result<Vec<IpAddr>, CniError> {
    let given: Given = serde_json::from_str(result.get()).map_err(|e| CniError::new(code::DECODE, "prevResult", e))?;
    if given.ips.len() > MAX_ADDRESSES {
        return Err(CniError::new(code::CONFIG, "prevResult.ips", format!("more than {MAX_ADDRESSES}")));
    }
    let mut out = Vec::new();
    for ip in given.ips {
        let parsed = ip.address.parse::<IpNet>().map(|n| n.addr()).or_else(|_| ip.address.parse::<IpAddr>());
        match parsed.map(|a| a.to_canonical()) {
            Ok(a) if !a.is_unspecified() && !a.is_loopback() && !a.is_multicast() => out.push(a),
            _ => {
                let text = format!("{:?} is no pod's address", ip.address);
                return Err(CniError::new(code::CONFIG, "prevResult.ips.address", text));
            }
        }
    }
    if out.is_empty() {
        return Err(CniError::new(code::CONFIG, "prevResult.ips", "there is no address"));
    }
    Ok(out)
}

/// The pod, out of `KEY=value;KEY=value`.
fn pod(arguments: &str) -> Result<Pod, CniError> {
    let value =
        |key: &str| arguments.split(';').filter_map(|a| a.split_once('=')).find(|(k, _)| *k == key).map(|(_, v)| v);
    let name = |key: &str| match value(key) {
        Some(v) if is_name(v) => Ok(v.to_owned()),
        Some(v) => Err(environment("CNI_ARGS", format!("{key}: {v:?} is no name"))),
        None => Err(environment("CNI_ARGS", format!("{key} is missing: not a pod of Kubernetes"))),
    };
    let (namespace, pod) = (name("K8S_POD_NAMESPACE")?, name("K8S_POD_NAME")?);
    let uid = value("K8S_POD_UID").unwrap_or_default();
    if uid.len() > 64 || !uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(environment("CNI_ARGS", format!("K8S_POD_UID: {uid:?} is no UID")));
    }
    Ok(Pod { namespace, name: pod, uid: uid.to_owned() })
}

/// The answer to `VERSION`.
pub fn versions(version: &str) -> String {
    serde_json::json!({"cniVersion": version, "supportedVersions": VERSIONS}).to_string()
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
