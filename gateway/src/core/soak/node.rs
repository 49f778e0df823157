//! A node's agent: what it keeps of what the gateway says, and its kernel's maps.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tidegate_agent::merge::{Model, Source, Update, merge};
use tidegate_ebpf::{Datapath, Interface, Local};
use tidegate_policy::state::NodeState;
use tidegate_proto::wire::{FactsUpdate, StateUpdate};
use tidegate_proto::{FactsBatch, Joiner, StateBatch};
use tokio::sync::mpsc;

use crate::core::ToCore;
use crate::push::{Ack, StreamId};

#[path = "../../../../ebpf/agent/src/told.rs"]
mod told;

struct Streams {
    id: StreamId,
    state: mpsc::Receiver<StateUpdate>,
    facts: mpsc::Receiver<FactsUpdate>,
    states: Joiner<StateBatch>,
    batches: Joiner<FactsBatch>,
}

/// The agent, without a kernel on nodes that only come and go.
pub struct Node {
    name: String,
    boot: u64,
    model: Model,
    told: told::Told,
    merged: NodeState,
    streams: Option<Streams>,
    datapath: Option<Datapath>,
}

impl Node {
    pub fn new(name: &str, datapath: Option<Datapath>) -> Self {
        let (model, told) = (Model::default(), told::Told::default());
        Self { name: name.into(), boot: 1, model, told, merged: NodeState::default(), streams: None, datapath }
    }

    /// New streams; gives the core's ends, and the agent's boot.
    pub fn connect(&mut self, id: StreamId) -> (mpsc::Sender<StateUpdate>, mpsc::Sender<FactsUpdate>, u64) {
        let (to_state, state) = mpsc::channel(1024);
        let (to_facts, facts) = mpsc::channel(1024);
        let (states, batches) = (Joiner::default(), Joiner::default());
        self.streams = Some(Streams { id, state, facts, states, batches });
        (to_state, to_facts, self.boot)
    }

    /// The streams are gone.
    pub fn away(&mut self) -> Option<StreamId> {
        self.model.away();
        Some(self.streams.take()?.id)
    }

    /// Another agent starts; the kernel keeps what it holds.
    pub fn restart(&mut self) {
        self.boot += 1;
        self.model = Model::default();
        self.told = told::Told::default();
    }

    fn local(&self) -> Local {
        let here = self.merged.endpoints.iter().filter(|(_, e)| e.node == self.name);
        let interface = |ip: &IpAddr| Interface { ifindex: 100 + u32::from(last_octet(*ip)), mac: [2; 6] };
        let interfaces: BTreeMap<IpAddr, Interface> = here.map(|(ip, _)| (*ip, interface(ip))).collect();
        Local { node: self.name.clone(), interfaces, drop_unknown: true, ..Local::default() }
    }

    fn merge(&mut self) {
        self.merged =
            merge(&[Source { name: "gw-a", live: self.model.live(), silent: false, state: self.model.state() }]);
        let local = self.local();
        if let Some(d) = &mut self.datapath {
            d.apply(&self.merged, &local, false).unwrap();
        }
    }

    /// What comes every half a minute, and every minute.
    pub fn full_pass(&mut self) {
        let local = self.local();
        if let Some(d) = &mut self.datapath {
            d.apply(&self.merged, &local, true).unwrap();
            d.sweep().unwrap();
        }
    }

    /// Takes what has come; gives the acks.
    pub fn work(&mut self, name: &str, now: Duration) -> Vec<ToCore> {
        let mut out = Vec::new();
        loop {
            let Some(s) = &mut self.streams else { return out };
            let id = s.id;
            if let Ok(message) = s.facts.try_recv() {
                let batch = FactsBatch::try_from(message).unwrap();
                if batch.is_heartbeat() {
                    if let Some(d) = &mut self.datapath {
                        d.heartbeat("gw-a").unwrap();
                    }
                    continue;
                }
                let Some(mut batch) = s.batches.push(batch).unwrap() else { continue };
                let ack = Ack { boot_id: batch.boot_id, sequence: batch.sequence, error: None };
                let grants = std::mem::take(&mut batch.grants);
                let keys: Vec<_> = grants.iter().map(|g| (g.group, g.class)).collect();
                let grants = grants.into_iter().map(|g| (g.group, g.class, g.ports)).collect();
                if self.model.grants(batch.boot_id, grants, now) && self.model.live() {
                    self.merged =
                        merge(&[Source { name: "gw-a", live: true, silent: false, state: self.model.state() }]);
                    let fresh: Vec<_> =
                        keys.iter().filter_map(|k| Some((k.0, k.1, self.merged.grants.get(k)?.clone()))).collect();
                    if let Some(d) = &mut self.datapath {
                        d.grants(&fresh).unwrap();
                    }
                }
                let updates = self.told.take(0, batch, now, |_| Some(0));
                if let Some(d) = &mut self.datapath {
                    d.facts(&updates).unwrap();
                }
                out.push(ToCore::FactsAck { node: name.into(), id, ack });
            } else if let Ok(message) = s.state.try_recv() {
                let Some(b) = s.states.push(StateBatch::try_from(message).unwrap()).unwrap() else { continue };
                let ack = Ack { boot_id: b.boot_id, sequence: b.sequence, error: None };
                let (boot, sequence, snapshot) = (b.boot_id, b.sequence, b.snapshot);
                let update = Update { boot, sequence, snapshot, set: b.set, delete: b.delete };
                self.model.update(update, now).unwrap();
                self.merge();
                out.push(ToCore::StateAck { node: name.into(), id, ack });
            } else {
                return out;
            }
        }
    }

    /// How much it holds.
    pub fn look(&self, mut put: impl FnMut(&str, usize)) {
        put("told facts", self.told.len());
        for (map, n) in self.datapath.iter().flat_map(Datapath::entries) {
            put(map, n);
        }
    }

    /// Its pins go.
    pub fn cleanup(self) {
        if let Some(d) = self.datapath {
            d.cleanup().unwrap();
        }
    }
}

fn last_octet(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(a) => a.octets()[3],
        IpAddr::V6(a) => a.octets()[15],
    }
}
