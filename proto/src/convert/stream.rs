//! The messages of the two streams, and snapshots in several parts.

use std::time::Duration;

use prost::Message;
use tidegate_policy::denied::Denied;
use tidegate_policy::state::{Entry, EntryKey, FactUpdate, FactValue};
use tidegate_policy::{ClassKey, GroupKey, PortSet, ScopeKey};

use super::denied::denied_from_wire;
use super::entry::{grant_from_wire, grant_to_wire, name_to_wire, named_from_wire};
use super::peer::Seen;
use super::started::{StartedPod, started_from_wire};
use super::{
    MAX_ERROR, MAX_ITEMS, MAX_JOINED, MAX_TTL_MS, Problem, WireError, bounded, ip_from_wire, ip_to_wire, key_from_wire,
    key_to_wire, name_from_wire, names_from_wire,
};
use crate::wire;

/// After how many octets a batch goes on in another part.
const PART: usize = 1 << 20;

/// From the agent, on either stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Up {
    /// The first message.
    Hello {
        /// The node's name.
        node: String,
        /// The agent's boot id.
        boot_id: u64,
    },
    /// An ack.
    Applied {
        /// The gateway's boot id, from the update.
        boot_id: u64,
        /// Everything up to here was applied.
        sequence: u64,
        /// Why it was not applied in whole; cut to [`MAX_ERROR`] octets when sent.
        error: Option<String>,
    },
}

impl Up {
    fn hello(h: wire::Hello) -> Result<Self, WireError> {
        Ok(Up::Hello { node: name_from_wire(h.node, "hello.node")?, boot_id: h.boot_id })
    }

    fn applied(a: wire::Applied) -> Result<Self, WireError> {
        bounded(a.error.len(), MAX_ERROR, "applied.error")?;
        let error = (!a.error.is_empty()).then_some(a.error);
        Ok(Up::Applied { boot_id: a.boot_id, sequence: a.sequence, error })
    }
}

fn cut(mut text: String) -> String {
    let mut end = MAX_ERROR.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

macro_rules! up {
    ($ack:ident, $module:ident) => {
        impl From<Up> for wire::$ack {
            fn from(up: Up) -> Self {
                use wire::$module::Kind;
                let kind = match up {
                    Up::Hello { node, boot_id } => Kind::Hello(wire::Hello { node, boot_id }),
                    Up::Applied { boot_id, sequence, error } => {
                        let error = error.map(cut).unwrap_or_default();
                        Kind::Applied(wire::Applied { boot_id, sequence, error })
                    }
                };
                wire::$ack { kind: Some(kind) }
            }
        }

        impl TryFrom<wire::$ack> for Up {
            type Error = WireError;

            fn try_from(ack: wire::$ack) -> Result<Self, WireError> {
                use wire::$module::Kind;
                match ack.kind.ok_or(Problem::Missing.of("ack.kind"))? {
                    Kind::Hello(h) => Up::hello(h),
                    Kind::Applied(a) => Up::applied(a),
                    #[allow(unreachable_patterns, reason = "only one of the two messages has more kinds")]
                    _ => Err(Problem::Missing.of("ack.kind")),
                }
            }
        }
    };
}
up!(StateAck, state_ack);
up!(FactsAck, facts_ack);

/// From the agent on the Facts stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FactsUp {
    /// A hello or an ack.
    Up(Up),
    /// What the agent sees of the gateways.
    Seen(Seen),
    /// What the node's kernel denied lately; whose pods those are is not said.
    Denied(Vec<Denied>),
    /// The pods whose network was made lately, instead of all that was said before.
    Started(Vec<StartedPod>),
}

impl TryFrom<wire::FactsAck> for FactsUp {
    type Error = WireError;

    fn try_from(ack: wire::FactsAck) -> Result<Self, WireError> {
        match ack.kind {
            Some(wire::facts_ack::Kind::Seen(s)) => Seen::try_from(s).map(FactsUp::Seen),
            Some(wire::facts_ack::Kind::Denied(d)) => {
                denied_from_wire(d.denied, "denied_batch.denied").map(FactsUp::Denied)
            }
            Some(wire::facts_ack::Kind::Started(s)) => started_from_wire(s).map(FactsUp::Started),
            kind => Up::try_from(wire::FactsAck { kind }).map(FactsUp::Up),
        }
    }
}

/// One update of the State stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateBatch {
    /// The gateway's name.
    pub gateway: String,
    /// The gateway's boot id.
    pub boot_id: u64,
    /// The sequence of the stream.
    pub sequence: u64,
    /// Replaces all that the gateway said before.
    pub snapshot: bool,
    /// Another part of the sequence follows.
    pub more: bool,
    /// Entries to set, in order.
    pub set: Vec<Entry>,
    /// Identities to delete.
    pub delete: Vec<EntryKey>,
}

impl StateBatch {
    /// The messages to send: one, or several parts where one would be too large.
    pub fn into_messages(self) -> Vec<wire::StateUpdate> {
        let empty = wire::StateUpdate {
            gateway: self.gateway,
            boot_id: self.boot_id,
            sequence: self.sequence,
            snapshot: self.snapshot,
            ..Default::default()
        };
        let mut parts = Parts::new(empty, self.more);
        for e in &self.set {
            if let Entry::Name(name, to) = e {
                let name = name_to_wire(name, *to);
                parts.add(name.encoded_len(), |m| m.names.push(name));
                continue;
            }
            let e = wire::Entry::from(e);
            let len = e.encoded_len();
            parts.add(len, |m| m.set.push(e));
        }
        for k in &self.delete {
            if let EntryKey::Name(name) = k {
                parts.add(name.len(), |m| m.names_gone.push(name.clone()));
                continue;
            }
            let k = wire::EntryKey::from(k);
            let len = k.encoded_len();
            parts.add(len, |m| m.delete.push(k));
        }
        parts.finish(|m, more| m.more = more)
    }
}

impl TryFrom<wire::StateUpdate> for StateBatch {
    type Error = WireError;

    fn try_from(u: wire::StateUpdate) -> Result<Self, WireError> {
        bounded(u.set.len(), MAX_ITEMS, "state_update.set")?;
        bounded(u.delete.len(), MAX_ITEMS, "state_update.delete")?;
        bounded(u.names.len(), MAX_ITEMS, "state_update.names")?;
        let mut set: Vec<Entry> = u.set.into_iter().map(Entry::try_from).collect::<Result<_, _>>()?;
        let mut delete: Vec<EntryKey> = u.delete.into_iter().map(EntryKey::try_from).collect::<Result<_, _>>()?;
        for name in u.names {
            set.push(named_from_wire(name)?);
        }
        let gone = names_from_wire(u.names_gone, MAX_ITEMS, "state_update.names_gone")?;
        delete.extend(gone.into_iter().map(EntryKey::Name));
        Ok(Self {
            gateway: name_from_wire(u.gateway, "state_update.gateway")?,
            boot_id: u.boot_id,
            sequence: u.sequence,
            snapshot: u.snapshot,
            more: u.more,
            set,
            delete,
        })
    }
}

/// A grant that facts need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantEntry {
    /// The group.
    pub group: GroupKey,
    /// The class.
    pub class: ClassKey,
    /// What holds.
    pub ports: PortSet,
}

/// One batch of the Facts stream. Without grants and facts, and with the last sequence again, it is a heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FactsBatch {
    /// The gateway's boot id.
    pub boot_id: u64,
    /// The sequence of the stream.
    pub sequence: u64,
    /// Replaces all facts that the gateway said before.
    pub snapshot: bool,
    /// Another part of the sequence follows.
    pub more: bool,
    /// Grants, to be applied before the facts.
    pub grants: Vec<GrantEntry>,
    /// Facts. Lives longer than [`MAX_TTL_MS`] are cut to it when sent; parts of a millisecond are dropped.
    pub facts: Vec<FactUpdate>,
    /// Others are to be asked for names, if there are any.
    pub steps_back: bool,
}

impl FactsBatch {
    /// The heartbeat after the batch with this sequence.
    pub fn heartbeat(boot_id: u64, sequence: u64) -> Self {
        Self { boot_id, sequence, ..Self::default() }
    }

    /// Whether it says nothing but that the gateway lives, and whether it steps back.
    pub fn is_heartbeat(&self) -> bool {
        !self.snapshot && !self.more && self.grants.is_empty() && self.facts.is_empty()
    }

    /// The messages to send: one, or several parts where one would be too large.
    pub fn into_messages(self) -> Vec<wire::FactsUpdate> {
        let empty = wire::FactsUpdate {
            boot_id: self.boot_id,
            sequence: self.sequence,
            snapshot: self.snapshot,
            steps_back: self.steps_back,
            ..Default::default()
        };
        let mut parts = Parts::new(empty, self.more);
        for g in &self.grants {
            let g = grant_to_wire(g.group, g.class, &g.ports);
            let len = g.encoded_len();
            parts.add(len, |m| m.grants.push(g));
        }
        for f in &self.facts {
            let f = fact_to_wire(f);
            let len = f.encoded_len();
            parts.add(len, |m| m.facts.push(f));
        }
        parts.finish(|m, more| m.more = more)
    }
}

fn fact_to_wire(f: &FactUpdate) -> wire::Fact {
    wire::Fact {
        scope: key_to_wire(f.scope.0),
        ip: ip_to_wire(f.ip),
        value: f.value.map(|v| wire::FactValue {
            class: key_to_wire(v.class.0),
            ttl_ms: u64::try_from(v.ttl.as_millis()).unwrap_or(MAX_TTL_MS).min(MAX_TTL_MS),
        }),
    }
}

fn fact_from_wire(f: wire::Fact) -> Result<FactUpdate, WireError> {
    let value = match f.value {
        None => None,
        Some(v) if v.ttl_ms > MAX_TTL_MS => return Err(Problem::Range(v.ttl_ms).of("fact_value.ttl_ms")),
        Some(v) => Some(FactValue {
            class: ClassKey(key_from_wire(&v.class, "fact_value.class")?),
            ttl: Duration::from_millis(v.ttl_ms),
        }),
    };
    Ok(FactUpdate {
        scope: ScopeKey(key_from_wire(&f.scope, "fact.scope")?),
        ip: ip_from_wire(&f.ip, "fact.ip")?,
        value,
    })
}

impl TryFrom<wire::FactsUpdate> for FactsBatch {
    type Error = WireError;

    fn try_from(u: wire::FactsUpdate) -> Result<Self, WireError> {
        bounded(u.grants.len(), MAX_ITEMS, "facts_update.grants")?;
        bounded(u.facts.len(), MAX_ITEMS, "facts_update.facts")?;
        let grant =
            |g: &wire::Grant| grant_from_wire(g).map(|(group, class, ports)| GrantEntry { group, class, ports });
        Ok(Self {
            boot_id: u.boot_id,
            sequence: u.sequence,
            snapshot: u.snapshot,
            more: u.more,
            grants: u.grants.iter().map(grant).collect::<Result<_, _>>()?,
            facts: u.facts.into_iter().map(fact_from_wire).collect::<Result<_, _>>()?,
            steps_back: u.steps_back,
        })
    }
}

/// Messages of one sequence, each within [`PART`] unless a single item is larger.
struct Parts<M> {
    empty: M,
    more: bool,
    full: Vec<M>,
    open: M,
    used: usize,
    items: usize,
}

impl<M: Clone> Parts<M> {
    fn new(empty: M, more: bool) -> Self {
        Self { open: empty.clone(), empty, more, full: Vec::new(), used: 0, items: 0 }
    }

    fn add(&mut self, len: usize, put: impl FnOnce(&mut M)) {
        if self.items > 0 && (self.used + len > PART || self.items == MAX_ITEMS) {
            self.full.push(std::mem::replace(&mut self.open, self.empty.clone()));
            (self.used, self.items) = (0, 0);
        }
        put(&mut self.open);
        // A tag and a length come before each item.
        self.used += len + 6;
        self.items += 1;
    }

    fn finish(mut self, set_more: impl Fn(&mut M, bool)) -> Vec<M> {
        self.full.iter_mut().for_each(|m| set_more(m, true));
        set_more(&mut self.open, self.more);
        self.full.push(self.open);
        self.full
    }
}

/// A batch that may come in several parts.
pub trait Part: Sized {
    /// The boot id, the sequence, whether it is a snapshot.
    fn identity(&self) -> (u64, u64, bool);
    /// Whether another part follows.
    fn more(&self) -> bool;
    /// How many items it has.
    fn items(&self) -> usize;
    /// Adds the next part.
    fn append(&mut self, next: Self);
}

impl Part for StateBatch {
    fn identity(&self) -> (u64, u64, bool) {
        (self.boot_id, self.sequence, self.snapshot)
    }

    fn more(&self) -> bool {
        self.more
    }

    fn items(&self) -> usize {
        self.set.len() + self.delete.len()
    }

    fn append(&mut self, next: Self) {
        self.more = next.more;
        self.set.extend(next.set);
        self.delete.extend(next.delete);
    }
}

impl Part for FactsBatch {
    fn identity(&self) -> (u64, u64, bool) {
        (self.boot_id, self.sequence, self.snapshot)
    }

    fn more(&self) -> bool {
        self.more
    }

    fn items(&self) -> usize {
        self.grants.len() + self.facts.len()
    }

    fn append(&mut self, next: Self) {
        self.more = next.more;
        self.grants.extend(next.grants);
        self.facts.extend(next.facts);
    }
}

/// Puts the parts of a sequence together. One per stream. Heartbeats may come between parts: they are not pushed.
#[derive(Debug)]
pub struct Joiner<B>(Option<B>);

impl<B> Default for Joiner<B> {
    fn default() -> Self {
        Self(None)
    }
}

impl<B: Part> Joiner<B> {
    /// Takes the next message of the stream and gives the batch once it is whole.
    /// After an error the stream has to be opened anew.
    pub fn push(&mut self, part: B) -> Result<Option<B>, WireError> {
        let whole = match self.0.take() {
            None => part,
            Some(mut open) => {
                if open.identity() != part.identity() {
                    return Err(Problem::Parts.of("sequence"));
                }
                open.append(part);
                open
            }
        };
        bounded(whole.items(), MAX_JOINED, "sequence")?;
        if whole.more() {
            self.0 = Some(whole);
            return Ok(None);
        }
        Ok(Some(whole))
    }
}
