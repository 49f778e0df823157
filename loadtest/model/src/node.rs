//! A node's agent without its kernel: the real merge and bookkeeping of facts over maps in memory, in the order of
//! `ebpf/agent/src/node.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use prost::Message;
use tidegate_agent::merge::{Model, Source, Update, merge, with_facts};
use tidegate_policy::ScopeKey;
use tidegate_policy::state::NodeState;
use tidegate_proto::{FactsBatch, Joiner, ScopeClaim, Seen, StateBatch, wire};

use crate::kernel::Kernel;
use crate::objects::GATEWAYS;
use crate::orphans::Orphans;
use crate::told::Told;

/// A gateway that says nothing for so long is silent.
const QUIET: Duration = Duration::from_millis(600);
/// A gateway that said something within this time is seen.
const SEEN: Duration = Duration::from_secs(1);
/// A stream on which nothing comes for so long ends.
pub const SILENCE: Duration = Duration::from_millis(1500);
/// So long a new agent waits for the other gateways.
const SETTLE: Duration = Duration::from_secs(1);

/// What the agent has of one gateway.
#[derive(Default)]
struct Heard {
    model: Model,
    state: Joiner<StateBatch>,
    facts: Joiner<FactsBatch>,
    /// When the `Facts` stream last said something, and whether it ended since.
    sign: Option<(Duration, bool)>,
    in_sync: bool,
    /// When the `Facts` stream began.
    opened: Option<Duration>,
    /// What is applied of the `Facts` stream: the gateway's boot and the sequence.
    applied: Option<(u64, u64)>,
    state_applied: Option<(u64, u64)>,
    /// What is applied with the next pass.
    pending: Option<(u64, u64)>,
}

/// The node.
pub struct Node {
    /// Its name.
    pub name: &'static str,
    /// Identifies the agent's present run.
    pub agent: u64,
    /// Its kernel, which outlives the agent.
    pub kernel: Kernel<false>,
    heard: [Heard; GATEWAYS.len()],
    told: Told,
    orphans: Orphans,
    merged: NodeState,
    /// Whether the kernel held a state of an earlier run.
    adopted: bool,
    /// Since when there is a state.
    since: Option<Duration>,
    ready: bool,
    silent: BTreeSet<String>,
}

impl Node {
    /// A node that has just booted.
    pub fn new(name: &'static str, now: Duration) -> Self {
        Self {
            name,
            agent: 1,
            kernel: Kernel::new(now),
            heard: Default::default(),
            told: Told::default(),
            orphans: Orphans::default(),
            merged: NodeState::default(),
            adopted: false,
            since: None,
            ready: false,
            silent: BTreeSet::new(),
        }
    }

    /// The agent ends and another one starts; the kernel keeps what it holds unless the machine `reboots`.
    pub fn restart(&mut self, reboots: bool) {
        let kernel = std::mem::take(&mut self.kernel);
        let now = kernel.now;
        *self = Self { agent: self.agent + 1, kernel, adopted: true, ..Self::new(self.name, now) };
        if reboots {
            (self.kernel, self.adopted) = (Kernel::new(now), false);
        }
    }

    /// A `State` stream is gone.
    pub fn state_away(&mut self, g: usize, local: &BTreeSet<IpAddr>) {
        let h = &mut self.heard[g];
        h.model.away();
        h.state = Joiner::default();
        (h.state_applied, h.pending) = (None, None);
        self.pass(local);
    }

    /// A `Facts` stream is gone.
    pub fn facts_away(&mut self, g: usize, local: &BTreeSet<IpAddr>) {
        let h = &mut self.heard[g];
        h.facts = Joiner::default();
        (h.applied, h.in_sync) = (None, false);
        self.orphans.look();
        if let Some((_, ended)) = &mut h.sign {
            *ended = true;
        }
        self.stand_in(local);
    }

    /// What it has applied of a gateway's `Facts` stream.
    pub fn applied(&self, g: usize) -> Option<(u64, u64)> {
        self.heard[g].applied
    }

    /// What it has applied of a gateway's `State` stream.
    pub fn state_applied(&self, g: usize) -> Option<(u64, u64)> {
        self.heard[g].state_applied
    }

    /// Whether its kernel holds what this run of the agent was told.
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// What its kernel should hold.
    pub fn merged(&self) -> &NodeState {
        &self.merged
    }

    /// Whom it follows for a scope.
    pub fn owner(&self, scope: ScopeKey) -> Option<&str> {
        self.merged.scopes.get(&scope).map(|s| s.owner.as_str())
    }

    /// Pods came or went: the agent sees their interfaces, and pods whose state it has not heard of keep none.
    pub fn moved(&mut self, local: &BTreeSet<IpAddr>) {
        self.apply(local);
    }

    fn apply(&mut self, local: &BTreeSet<IpAddr>) {
        if self.ready {
            self.kernel.apply(&self.merged, self.name, local, &self.silent);
        }
    }

    fn merge(&mut self) {
        let known = GATEWAYS.iter().zip(&self.heard).filter(|(_, h)| h.model.known());
        let silent = &self.silent;
        let sources: Vec<Source<'_>> = known
            .map(|((name, _), h)| Source {
                name,
                live: h.model.live(),
                silent: silent.contains(*name),
                state: h.model.state(),
            })
            .collect();
        self.merged = merge(&sources);
        self.check_owners();
        let (now, owners) = (self.kernel.now, self.owners());
        let updates = self.told.follow(now, |s| owners.get(&s).copied());
        self.kernel.facts(&updates);
    }

    /// It follows the highest epoch of those that it was ever told, whoever says so.
    fn check_owners(&self) {
        let told = || self.heard.iter().filter(|h| h.model.known()).map(|h| &h.model.state().scopes);
        for key in told().flat_map(BTreeMap::keys) {
            let claims = || told().filter_map(|s| s.get(key));
            let (highest, followed) = (claims().map(|c| c.epoch).max(), self.merged.scopes.get(key));
            let said = followed.is_some_and(|f| claims().any(|c| c.epoch == f.epoch && c.owner == f.owner));
            let epoch = followed.map(|f| f.epoch);
            assert!(epoch == highest && said, "{} follows {followed:?}, and was told of {highest:?}", self.name);
        }
    }

    /// Whether it hears what a gateway learns.
    pub fn hears(&self, g: usize) -> bool {
        self.heard[g].in_sync && !self.silent.contains(GATEWAYS[g].0)
    }

    /// Who owns which scope, of the gateways that are heard.
    fn owners(&self) -> BTreeMap<ScopeKey, usize> {
        let heard = |name: &str| GATEWAYS.iter().position(|(n, _)| *n == name).filter(|at| self.hears(*at));
        self.merged.scopes.iter().filter_map(|(k, s)| Some((*k, heard(&s.owner)?))).collect()
    }

    /// Merges, and brings the kernel to that once enough gateways were heard.
    fn pass(&mut self, local: &BTreeSet<IpAddr>) {
        let now = self.kernel.now;
        if self.since.is_none() && self.heard.iter().any(|h| h.model.known()) {
            self.since = Some(now);
        }
        self.merge();
        let all = self.heard.iter().all(|h| h.model.live());
        self.ready |= self.since.is_some_and(|at| !self.adopted || all || now.saturating_sub(at) >= SETTLE);
        if self.ready {
            self.apply(local);
            for h in &mut self.heard {
                h.state_applied = h.pending.take().or(h.state_applied);
            }
        }
    }

    /// Takes a message of a `State` stream. `local`: the addresses of the pods that are here.
    pub fn take_state(&mut self, g: usize, message: &[u8], local: &BTreeSet<IpAddr>) {
        let message = wire::StateUpdate::decode(message).expect("what a gateway sends can be decoded");
        let part = StateBatch::try_from(message).expect("what a gateway sends is accepted");
        let h = &mut self.heard[g];
        let Some(b) = h.state.push(part).expect("parts come in order") else { return };
        let update =
            Update { boot: b.boot_id, sequence: b.sequence, snapshot: b.snapshot, set: b.set, delete: b.delete };
        h.model.update(update, self.kernel.now).expect("updates come in order");
        h.pending = Some((b.boot_id, b.sequence));
        self.pass(local);
    }

    /// Takes a message of a `Facts` stream.
    pub fn take_facts(&mut self, g: usize, message: &[u8], local: &BTreeSet<IpAddr>) {
        let message = wire::FactsUpdate::decode(message).expect("what a gateway sends can be decoded");
        let part = FactsBatch::try_from(message).expect("what a gateway sends is accepted");
        let now = self.kernel.now;
        self.heard[g].sign = Some((now, false));
        if self.silent.contains(GATEWAYS[g].0) {
            self.stand_in(local);
        }
        let Some(mut b) = self.heard[g].facts.push(part).expect("parts come in order") else { return };
        let (applied, snapshot) = ((b.boot_id, b.sequence), b.snapshot);
        let grants: Vec<_> = std::mem::take(&mut b.grants).into_iter().map(|g| (g.group, g.class, g.ports)).collect();
        let came = grants.clone();
        let changed = self.heard[g].model.grants(b.boot_id, grants, now);
        if changed {
            self.merge();
        }
        if changed || !self.ready {
            self.kernel.grants(&with_facts(came, &self.merged, self.ready));
        }
        if snapshot {
            self.orphans.look();
        }
        let owners = self.owners();
        let updates = self.told.take(g, b, now, |s| owners.get(&s).copied());
        self.kernel.facts(&updates);
        let h = &mut self.heard[g];
        h.applied = Some(applied);
        h.in_sync |= snapshot;
        self.beat(g);
    }

    /// A `Facts` stream has begun.
    pub fn opened(&mut self, g: usize) {
        // Until something comes it counts as silent, and from now on something must come.
        self.heard[g].opened = Some(self.kernel.now);
    }

    /// Whether its kernel follows what all gateways say, and none is silent.
    pub fn is_well(&self) -> bool {
        self.ready && self.silent.is_empty() && self.heard.iter().all(|h| h.in_sync)
    }

    /// A heartbeat of a gateway, with nothing before it on its `Facts` stream.
    pub fn sign(&mut self, g: usize) {
        let h = &mut self.heard[g];
        if h.in_sync {
            h.sign = Some((self.kernel.now, false));
        }
        self.beat(g);
    }

    /// Whether nothing came on a `Facts` stream for so long that it ends.
    pub fn stalled(&self, g: usize) -> bool {
        let now = self.kernel.now;
        let h = &self.heard[g];
        let said = h.sign.map(|(at, _)| at);
        said.max(h.opened).is_some_and(|at| now.saturating_sub(at) >= SILENCE)
    }

    fn beat(&mut self, g: usize) {
        let h = &self.heard[g];
        let now = self.kernel.now;
        if h.in_sync && self.ready && h.sign.is_some_and(|(at, ended)| !ended && now.saturating_sub(at) < SILENCE) {
            self.kernel.heartbeat(GATEWAYS[g].0);
        }
    }

    /// Steers the DNS of silent gateways' scopes to those that stand in, and back.
    fn stand_in(&mut self, local: &BTreeSet<IpAddr>) {
        let now = self.kernel.now;
        let silent = |h: &Heard| h.sign.is_none_or(|(at, ended)| ended || now.saturating_sub(at) >= QUIET);
        let silent = GATEWAYS.iter().zip(&self.heard).filter(|(_, h)| silent(h)).map(|((n, _), _)| (*n).to_owned());
        let silent = silent.collect();
        if self.silent != silent {
            self.silent = silent;
            self.merge();
            self.apply(local);
        }
    }

    /// A tenth of a second has passed: notices who fell silent, and says whom it sees and follows.
    pub fn listen(&mut self, local: &BTreeSet<IpAddr>) -> Seen {
        self.stand_in(local);
        if !self.ready && self.since.is_some() {
            self.pass(local);
        }
        self.kernel.sweep();
        let now = self.kernel.now;
        let seen = |h: &Heard| h.sign.is_some_and(|(at, _)| now.saturating_sub(at) < SEEN);
        let gateways = GATEWAYS.iter().zip(&self.heard).filter(|(_, h)| seen(h)).map(|((n, _), _)| (*n).to_owned());
        Seen {
            gateways: gateways.collect(),
            claims: self.merged.scopes.iter().map(|(k, s)| ScopeClaim { scope: *k, epoch: s.epoch }).collect(),
            orphans: self.orphans(),
        }
    }

    /// What the kernel holds and no gateway that is heard stands by.
    fn orphans(&mut self) -> Vec<(ScopeKey, IpAddr)> {
        let heard = self.heard.iter().enumerate().filter(|(_, h)| h.in_sync).fold(0, |all, (i, _)| all | 1 << i);
        if heard == 0 || !self.ready {
            return Vec::new();
        }
        self.orphans.find(self.kernel.lives(), |fact| self.told.stands(fact, heard)).to_vec()
    }
}
