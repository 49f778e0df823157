//! The CNI plugin's questions, and what is known of pods through them.
//!
//! A pod's network is made before the API server knows its addresses. Until gateways tell of it, the node goes by the
//! strictest that a pod of its namespace may be: one that may be isolated is closed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tidegate_cni::files::{self, Standing};
use tidegate_cni::spec::Attachment;
use tidegate_cni::wire::{Answer, Ask, Attached, MAX_LINE, request};
use tidegate_ebpf::Attacher;
use tidegate_policy::state::{Endpoint, NodeState, Touch};
use tidegate_proto::StartedPod;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use crate::open::Open;
use crate::{config, events};

/// The most questions at once: a node starts at most some hundred pods together.
pub(crate) const MAX_WAITING: usize = 1024;
/// How long the plugin may take to ask.
const ASKING: Duration = Duration::from_secs(2);
/// How long a pod waits for its policy. Then it starts closed, and opens when its policy comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// The most pods that are known.
const MAX_PODS: usize = 4_096;

/// A question with the way back.
#[derive(Debug)]
pub struct Request {
    pub ask: Ask,
    /// When it came.
    pub since: Instant,
    /// Absent if it is answered already.
    pub answer: Option<oneshot::Sender<Answer>>,
}

/// Where questions come in.
#[derive(Clone, Debug)]
pub struct Desk {
    /// What the node changes.
    pub open: Arc<Mutex<Open>>,
    /// What it takes.
    pub requests: mpsc::Sender<Request>,
    /// What pods get before they start.
    pub attacher: Arc<Attacher>,
}

impl Desk {
    /// Attaches the program of a pod that starts at once. Whether it does is decided later.
    async fn prepare(&self, ask: &Ask) -> bool {
        let Ask::Add(attached) = ask else { return true };
        if !self.open.lock().starts(attached) {
            return false;
        }
        let (attacher, index) = (Arc::clone(&self.attacher), attached.ifindex);
        // The kernel has a lock for all devices, for which others queue, too.
        match tokio::task::spawn_blocking(move || attacher.attach(index)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!(index, %error, "a new pod waits for the node to attach its programs");
                false
            }
            Err(_) => false,
        }
    }
}

/// Hands a question on, `prepared` or not. Gives where its answer comes; nothing if it need not be waited for.
///
/// That is decided and handed on in one step: a node that changes what decides, and then takes what was asked, has all
/// that were answered by what decided before.
fn hand_on(
    ask: Ask,
    since: Instant,
    prepared: bool,
    open: &Mutex<Open>,
    requests: &mpsc::Sender<Request>,
) -> Result<Option<oneshot::Receiver<Answer>>, &'static str> {
    let open = open.lock();
    let at_once = match &ask {
        Ask::Add(attached) => prepared && open.starts(attached),
        // The plugin does not mind what became of it.
        Ask::Del(_) | Ask::Gc(_) => true,
    };
    let starts = at_once && matches!(ask, Ask::Add(_));
    let (answer, answered) = (!at_once).then(oneshot::channel).unzip();
    requests.try_send(Request { ask, since, answer }).map_err(|error| match error {
        TrySendError::Full(_) => "too many pods start at once",
        TrySendError::Closed(_) => "the agent is stopping",
    })?;
    drop(open);
    if starts {
        metrics::histogram!(events::POD_STARTS).record(since.elapsed().as_secs_f64());
    }
    Ok(answered)
}

/// Serves the plugin until the listener fails or nobody answers any more.
pub async fn serve(listener: UnixListener, desk: Desk) {
    let slots = Arc::new(Semaphore::new(MAX_WAITING));
    while !desk.requests.is_closed() {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!(error = %e, "accept on the CNI plugin's socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Without a place it is closed, and the plugin does what it can alone.
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
        let desk = desk.clone();
        tokio::spawn(async move {
            if let Err(error) = handle(stream, &desk).await {
                tracing::debug!(%error, "a question of the CNI plugin has no answer");
            }
            drop(slot);
        });
    }
}

async fn handle(mut stream: UnixStream, desk: &Desk) -> io::Result<()> {
    if stream.peer_cred()?.uid() != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (read, mut write) = stream.split();
    let mut line = Vec::new();
    let mut read = BufReader::new(read).take(MAX_LINE as u64 + 1);
    timeout(ASKING, read.read_until(b'\n', &mut line)).await??;
    let answer = match request(&line) {
        Err(error) => Answer::Refused(error),
        Ok(ask) => {
            let since = Instant::now();
            let prepared = desk.prepare(&ask).await;
            match hand_on(ask, since, prepared, &desk.open, &desk.requests) {
                Ok(None) => Answer::Done,
                Ok(Some(answered)) => {
                    answered.await.unwrap_or_else(|_| Answer::Refused("the agent is stopping".into()))
                }
                Err(why) => Answer::Refused(why.into()),
            }
        }
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    write.write_all(&text).await
}

/// Somebody who waits.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub of: Attachment,
    pub until: Instant,
    pub since: Instant,
    pub answer: oneshot::Sender<Answer>,
}

/// What the plugin told.
#[derive(Debug, Default)]
pub(crate) struct Pods {
    /// Folder of the records.
    folder: Option<PathBuf>,
    known: BTreeMap<Attachment, Attached>,
    /// Whose an address is: the last that was added.
    places: BTreeMap<IpAddr, Attachment>,
    pub waiting: Vec<Waiting>,
    /// What was written for the time without an agent, of what, and when.
    pub standing: Option<(Standing, NodeState, Instant)>,
}

impl Pods {
    /// Those that are on record.
    pub fn adopt(config: Option<&config::Cni>) -> Self {
        let mut pods = Self { folder: config.map(|c| c.folder.clone()), ..Self::default() };
        for attached in config.iter().flat_map(|c| files::all_noted(&c.folder)) {
            pods.add(attached);
        }
        pods
    }

    /// A pod was added.
    pub fn add(&mut self, attached: Attached) {
        self.known.remove(&attached.attachment);
        if self.known.len() >= MAX_PODS {
            tracing::error!("the CNI plugin has told of more pods than a node can have; one is not followed");
            return;
        }
        for ip in &attached.addresses {
            self.places.insert(ip.to_canonical(), attached.attachment.clone());
        }
        self.known.insert(attached.attachment.clone(), attached);
    }

    /// A pod's network goes.
    pub fn remove(&mut self, of: &Attachment) {
        if self.known.remove(of).is_some() {
            self.places.retain(|_, at| at != of);
        }
    }

    /// Only these are left.
    pub fn retain(&mut self, left: &BTreeSet<&Attachment>) {
        self.known.retain(|of, _| left.contains(of));
        self.places.retain(|_, at| left.contains(at));
    }

    /// Forgets pods whose devices are gone, with their records.
    pub fn follow(&mut self, there: impl Fn(u32) -> bool) {
        let gone: Vec<Attachment> =
            self.known.values().filter(|a| !there(a.ifindex)).map(|a| a.attachment.clone()).collect();
        for of in gone {
            if let Some(error) = self.folder.as_ref().and_then(|folder| files::forget(folder, &of).err()) {
                tracing::debug!(container = of.container, %error, "the record of a pod that is gone stays");
            }
            self.remove(&of);
        }
    }

    /// What gateways are told: by its UID a pod is told from another of its name.
    pub fn started(&self) -> Vec<StartedPod> {
        let known = self.known.values().filter(|a| !a.pod.uid.is_empty());
        let pod = |a: &Attached| StartedPod {
            namespace: a.pod.namespace.clone(),
            pod: a.pod.name.clone(),
            uid: a.pod.uid.clone(),
            addresses: a.addresses.iter().map(IpAddr::to_canonical).collect(),
        };
        known.map(pod).collect()
    }

    /// A pod.
    pub fn get(&self, of: &Attachment) -> Option<&Attached> {
        self.known.get(of)
    }

    fn at(&self, ip: IpAddr) -> Option<&Attached> {
        self.known.get(self.places.get(&ip)?)
    }

    /// The device that leads to an address.
    pub fn device(&self, ip: IpAddr) -> Option<u32> {
        self.at(ip).map(|a| a.ifindex)
    }

    /// Puts pods of which no gateway has told in their place: over whatever had their addresses before.
    pub fn overlay(&self, state: &mut NodeState, node: &str) {
        for ip in self.places.keys() {
            let Some(Attached { pod, .. }) = self.at(*ip) else { continue };
            if state.endpoints.get(ip).is_some_and(|e| is(e, node, &pod.namespace, &pod.name)) {
                continue;
            }
            let touch = state.namespaces.get(pod.namespace.as_str()).copied().unwrap_or(Touch::Isolated);
            let (namespace, pod, node) = (pod.namespace.clone(), pod.name.clone(), node.to_owned());
            state.endpoints.insert(*ip, Endpoint { node, namespace, pod, touch, member: None });
        }
    }
}

/// Whether the address is known to be this pod's.
pub(crate) fn is(e: &Endpoint, node: &str, namespace: &str, pod: &str) -> bool {
    (e.node.as_str(), e.namespace.as_str(), e.pod.as_str()) == (node, namespace, pod)
}

#[cfg(test)]
mod tests {
    use tidegate_cni::spec::Pod;

    use super::*;

    const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 5));

    fn attached(container: &str, namespace: &str, name: &str, ifindex: u32) -> Attached {
        let attachment = Attachment { container: container.into(), ifname: "eth0".into() };
        let pod = Pod { namespace: namespace.into(), name: name.into(), uid: String::new() };
        Attached { attachment, pod, addresses: vec![IP], ifindex }
    }

    fn told(namespace: &str, pod: &str) -> Endpoint {
        let (node, namespace, pod) = ("n".into(), namespace.into(), pod.into());
        Endpoint { node, namespace, pod, touch: Touch::Untouched, member: None }
    }

    fn touch(pods: &Pods, state: &NodeState) -> (String, Touch) {
        let mut state = state.clone();
        pods.overlay(&mut state, "n");
        let e = &state.endpoints[&IP];
        (e.namespace.clone(), e.touch)
    }

    #[test]
    fn a_new_pod_is_what_its_namespace_says_until_gateways_tell() {
        let mut pods = Pods::default();
        pods.add(attached("c1", "shop", "web", 7));
        let mut state = NodeState::default();
        assert_eq!(touch(&pods, &state), ("shop".into(), Touch::Isolated), "a namespace that nobody knows");
        for of in [Touch::Untouched, Touch::Guarded, Touch::Isolated] {
            state.namespaces.insert("shop".into(), of);
            assert_eq!(touch(&pods, &state).1, of);
        }
        state.endpoints.insert(IP, told("shop", "web"));
        assert_eq!(touch(&pods, &state).1, Touch::Untouched, "gateways have told");
        state.endpoints.insert(IP, told("free", "old"));
        assert_eq!(touch(&pods, &state), ("shop".into(), Touch::Isolated), "the address was another pod's");
        assert_eq!(pods.device(IP), Some(7));
    }

    #[test]
    fn who_was_answered_at_once_is_among_those_that_the_node_takes_next() {
        let open = Mutex::new(Open::default());
        let (requests, mut asked) = mpsc::channel(4);
        let ask = |ask, prepared| hand_on(ask, Instant::now(), prepared, &open, &requests);
        let add = |container| Ask::Add(attached(container, "free", "app", 7));
        assert!(ask(add("c1"), true).is_ok_and(|answer| answer.is_some()), "nothing is known yet");
        let mut state = NodeState::default();
        state.namespaces.insert("free".into(), Touch::Untouched);
        let cluster = vec![ipnet::IpNet::from(IP)];
        *open.lock() = Open { namespaces: state.namespaces.clone(), cluster, ..Open::default() };
        assert!(ask(add("c2"), true).is_ok_and(|answer| answer.is_none()));
        assert!(ask(add("c3"), false).is_ok_and(|answer| answer.is_some()), "it has no program");
        assert!(ask(Ask::Del(attached("c1", "", "", 0).attachment), true).is_ok_and(|answer| answer.is_none()));
        // What the node does not hear of is not done.
        assert!(ask(add("c4"), true).is_err());
        // The node changes what decides, then takes what was asked.
        *open.lock() = Open::default();
        let waits: Vec<bool> = std::iter::from_fn(|| asked.try_recv().ok()).map(|r| r.answer.is_some()).collect();
        assert_eq!(waits, [true, false, true, false]);
        assert!(ask(add("c5"), true).is_ok_and(|answer| answer.is_some()));
        drop(asked);
        assert!(ask(add("c6"), true).is_err());
    }

    #[test]
    fn an_address_is_the_last_pods_that_was_added() {
        let mut pods = Pods::default();
        pods.add(attached("c1", "shop", "web", 7));
        pods.add(attached("c2", "free", "app", 8));
        assert_eq!(pods.device(IP), Some(8));
        pods.remove(&attached("c1", "", "", 0).attachment);
        assert_eq!(pods.device(IP), Some(8));
        pods.follow(|index| index != 8);
        assert_eq!((pods.device(IP), pods.known.len()), (None, 0));
    }
}
