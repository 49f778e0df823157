//! Pods that start: their programs are attached before their first instruction.

use std::collections::BTreeSet;
use std::iter;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_cni::files::{self, Standing};
use tidegate_cni::wire::{Answer, Ask, Attached};
use tidegate_ebpf::{Fixed, Program, detach_fixed, fixed_devices};
use tidegate_policy::state::{Named, NodeState, Touch};
use tidegate_proto::StartedPod;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Node;
use crate::cni::{PATIENCE, Request, Waiting, is};
use crate::config::UnknownPods;
use crate::events;
use crate::open::{Closed, Open};

/// While nothing but names of Services changes, the file is not written more often: it has all of them.
const NAMES_EVERY: Duration = Duration::from_secs(10);

/// Where the plugin's questions are.
pub(super) struct Questions<'a> {
    pub asked: &'a mut mpsc::Receiver<Request>,
    /// Where it goes which pods have started.
    pub told: &'a watch::Sender<Arc<Vec<StartedPod>>>,
}

impl Node {
    /// Takes what the plugin has asked: all of it is in the next pass.
    pub(super) async fn enter(&mut self, first: Option<Request>, from: &mut Questions<'_>) {
        let now = Instant::now();
        let mut any = false;
        for Request { ask, since, answer } in first.into_iter().chain(iter::from_fn(|| from.asked.try_recv().ok())) {
            any = true;
            match ask {
                Ask::Add(attached) => {
                    let of = attached.attachment.clone();
                    self.pods.add(attached);
                    if let Some(answer) = answer {
                        self.pods.waiting.push(Waiting { of, since, until: now + PATIENCE, answer });
                    }
                }
                Ask::Del(of) => self.pods.remove(&of),
                Ask::Gc(left) => self.pods.retain(&left.iter().collect()),
            }
        }
        if any {
            // First, so that gateways work at it meanwhile.
            from.told.send_replace(Arc::new(self.pods.started()));
            self.merge();
            self.refresh().await;
        }
    }

    /// Says which pods start without waiting for this node: before the kernel is written, so that none does by what is about to
    /// change, and after.
    pub(super) fn publish(&mut self) {
        let known = self.ready && !self.datapath.is_upgrade() && !self.problems.contains_key("maps");
        // Where unknown pods are dropped each new one is unknown until the kernel is written.
        let opens = known && self.config.unknown_pods == UnknownPods::Pass;
        self.guarded = self.keeper.isolated();
        let now = match &self.guarded {
            Some(guarded) if opens => {
                let mut closed = self.held.clone();
                closed.extend(self.closed());
                closed.addresses.extend(guarded);
                Open {
                    namespaces: self.merged.namespaces.clone(),
                    cluster: self.merged.cluster.prefixes.clone(),
                    closed,
                }
            }
            _ => Open::default(),
        };
        *self.open.lock() = now;
    }

    /// What the kernel's maps judge once they hold what this node wants.
    pub(super) fn closed(&self) -> Closed {
        let touched = self.merged.endpoints.iter().filter(|(_, e)| e.touch != Touch::Untouched);
        let addresses: BTreeSet<IpAddr> = touched.map(|(ip, _)| *ip).collect();
        let devices = addresses.iter().flat_map(|ip| [self.interfaces.get(ip).copied(), self.pods.device(*ip)]);
        Closed { devices: devices.flatten().collect(), addresses }
    }

    /// Answers those whose pods are ready, those who have waited long enough, and all while there is nothing to go by.
    pub(super) fn answer_starts(&mut self) {
        for Waiting { of, since, until, answer } in std::mem::take(&mut self.pods.waiting) {
            let given = match self.pods.get(&of) {
                None => Some(Answer::Refused("the pod is gone again".into())),
                Some(_) if !self.ready || self.datapath.is_upgrade() => {
                    Some(Answer::Refused("the agent has no policy yet".into()))
                }
                Some(a) if self.is_attached(a) => (self.is_known(a) || Instant::now() >= until).then_some(Answer::Done),
                Some(a) if Instant::now() >= until => {
                    Some(Answer::Refused(format!("no program could be attached to device {}", a.ifindex)))
                }
                Some(_) => None,
            };
            match given {
                Some(given) => {
                    metrics::histogram!(events::POD_STARTS).record(since.elapsed().as_secs_f64());
                    // The plugin may have given up.
                    let _ = answer.send(given);
                }
                None => self.pods.waiting.push(Waiting { of, since, until, answer }),
            }
        }
    }

    /// Whether the kernel judges what the pod sends, by what this node knows of it.
    fn is_attached(&self, a: &Attached) -> bool {
        let places = a.addresses.iter().all(|ip| self.interfaces.get(&ip.to_canonical()) == Some(&a.ifindex));
        let held = !self.problems.contains_key("maps");
        places && held && self.attached.contains_key(&(Program::PodEgress, a.ifindex))
    }

    /// Whether the pod needs to wait no longer: nothing is ever denied to pods of its namespace, nor by netfilter to the
    /// pod that had its address before; or the gateway that serves it has told of it, or none is there.
    fn is_known(&self, a: &Attached) -> bool {
        let (node, namespace, name) = (&self.config.node, &a.pod.namespace, &a.pod.name);
        let mut addresses = a.addresses.iter().map(|ip| ip.to_canonical());
        if self.merged.namespaces.get(namespace.as_str()) == Some(&Touch::Untouched) {
            return self.keeper.isolated().is_none_or(|isolated| !addresses.any(|ip| isolated.contains(&ip)));
        }
        if !self.gateways.iter().any(|g| g.model.live()) {
            return true;
        }
        addresses.all(|ip| {
            let says = |state: &NodeState| state.endpoints.get(&ip).is_some_and(|e| is(e, node, namespace, name));
            match self.merged.endpoints.get(&ip).and_then(|e| e.member) {
                // Questions go to the scope's owner: what others know already is not enough.
                Some((scope, _)) => {
                    let owner = self.merged.scopes.get(&scope).and_then(|s| self.gateways.index(&s.owner));
                    owner.and_then(|i| self.gateways.get(i)).is_some_and(|g| says(g.model.state()))
                }
                None => self.gateways.iter().any(|g| g.model.live() && says(g.model.state())),
            }
        })
    }

    /// Takes away what the plugin attached by itself, where this agent's programs are.
    pub(super) fn retire_fixed(&mut self) {
        if self.config.cni.is_none() || self.datapath.is_upgrade() {
            return;
        }
        self.pods.follow(|index| self.topology.links.contains_key(&index));
        for index in fixed_devices(&self.config.pins) {
            let gone = !self.topology.links.contains_key(&index);
            if (gone || self.attached.contains_key(&(Program::PodEgress, index)))
                && let Err(error) = detach_fixed(&self.config.pins, index)
            {
                tracing::warn!(index, %error, "a program that the CNI plugin attached stays");
            }
        }
    }

    /// Keeps on disk what holds while no agent runs.
    pub(super) fn keep_standing(&mut self) {
        self.write_standing(NAMES_EVERY);
        // A pod may have started between this agent's look and the program.
        if self.ready && !fixed_devices(&self.config.pins).is_empty() {
            self.retire_fixed();
        }
    }

    /// Writes it if it is other than what was written; if only names are, no sooner than `names` after the last time.
    pub(super) fn write_standing(&mut self, names: Duration) {
        let Some(cni) = self.config.cni.as_ref().filter(|_| self.ready) else { return };
        let now = Instant::now();
        if let Some((_, of, written)) = &self.pods.standing {
            let m = &self.merged;
            let same = of.cluster == m.cluster && of.nodes == m.nodes && of.namespaces == m.namespaces;
            if same && (of.names == m.names || now.saturating_duration_since(*written) < names) {
                return;
            }
        }
        let (cluster, config) = (&self.merged.cluster, &self.config);
        let standing = Standing::new(
            Fixed {
                tunnel_port: config.tunnel_port,
                overlay_ports: config.overlay_ports.iter().copied().collect(),
                mark: config.mark.value,
                mark_cluster: config.mark.cluster(),
                mark_mask: config.mark.mask,
                nodes: self.merged.nodes.values().flat_map(|n| n.addresses.iter().copied()).collect(),
                prefixes: cluster.prefixes.clone(),
                node_ports: cluster.node_ports,
                dns: cluster.dns.clone(),
                suffixes: cluster.suffixes.clone(),
                names: inside(&self.merged),
            },
            self.merged.namespaces.iter().map(|(name, touch)| (name.to_string(), written(*touch))).collect(),
        );
        let same = self.pods.standing.as_ref().is_some_and(|(written, ..)| *written == standing);
        let result = if same { Ok(()) } else { standing.write(&cni.standing) };
        let failed = result.err().map(|e| format!("{} cannot be written: {e}", cni.standing.display()));
        self.pods.standing = failed.is_none().then(|| {
            let NodeState { cluster, nodes, namespaces, names, .. } = self.merged.clone();
            (standing, NodeState { cluster, nodes, namespaces, names, ..NodeState::default() }, now)
        });
        self.problem("standing", failed);
    }
}

/// The names that lead inside, in order: equal states are equal files.
fn inside(state: &NodeState) -> Vec<String> {
    let mut names: Vec<String> =
        state.names.iter().filter(|(_, to)| **to == Named::Inside).map(|(name, _)| name.to_string()).collect();
    names.sort_unstable();
    names
}

const fn written(touch: Touch) -> files::Touch {
    match touch {
        Touch::Untouched => files::Touch::Untouched,
        Touch::Guarded => files::Touch::Guarded,
        Touch::Isolated => files::Touch::Isolated,
    }
}
