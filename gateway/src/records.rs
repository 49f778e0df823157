//! What the status of pools says of owners, and what is to be written there. Pure: time is an argument.
//!
//! While the API server answers, a claim is made only once it is written, over exactly what the claimant saw standing
//! there: of two that want a pair one comes too late and learns it. Nothing waits for an API server that is silent, or
//! that answers and does not write: then claims go by the peers, and are written when it can be.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate_proto::Pair;

use crate::ownership::{Known, SILENCE};

/// A claim waits at most so long to be written. With the silence before it, and the addresses' way into place after it, an
/// egress address is back within three seconds.
const ANSWER: Duration = Duration::from_millis(700);
/// What is held already, and could not be written, is tried again so often.
const AGAIN: Duration = Duration::from_secs(1);
/// How far above the known epoch a recorded one may be. Beyond it somebody made it up, and it is overwritten.
pub const MAX_STEP: u64 = 1 << 20;

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The pair.
    pub pair: Pair,
    /// Its new owner and epoch.
    pub claim: Known,
    /// What must stand there until then; absent: nothing.
    pub over: Option<Known>,
}

#[derive(Debug)]
struct Asked {
    epoch: u64,
    over: Option<Known>,
    /// When it was asked for first.
    since: Duration,
    /// When it was asked for last.
    at: Duration,
}

/// The API server as one gateway sees it.
#[derive(Debug)]
pub struct Records {
    me: String,
    /// When it answered last; the start if never.
    heard: Duration,
    /// What stands in the status of each pair.
    stands: BTreeMap<Pair, Known>,
    /// Pools that are no objects, such as the built-in one: nothing of them is recorded.
    absent: BTreeSet<String>,
    /// What is being written.
    asked: BTreeMap<Pair, Asked>,
    out: Vec<Write>,
}

impl Records {
    /// For the gateway `me`, which has started at `now`.
    pub fn new(me: &str, now: Duration) -> Self {
        Self {
            me: me.to_owned(),
            heard: now,
            stands: BTreeMap::new(),
            absent: BTreeSet::new(),
            asked: BTreeMap::new(),
            out: Vec::new(),
        }
    }

    /// It has answered.
    pub fn answered(&mut self, now: Duration) {
        self.heard = now;
    }

    /// Whether it has not answered for so long that nobody waits for it.
    pub fn is_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.heard) >= SILENCE
    }

    /// What stands in the status of a pool; `None` where there is no such object. Says which claims are written now that
    /// were asked for.
    pub fn stands(&mut self, pool: &str, records: Option<&[(Pair, Known)]>) -> Vec<(Pair, u64)> {
        self.stands.retain(|p, _| p.pool != pool);
        if records.is_none() {
            self.absent.insert(pool.to_owned());
            return Vec::new();
        }
        self.absent.remove(pool);
        self.stands.extend(records.into_iter().flatten().filter(|(p, _)| p.pool == pool).cloned());
        let mut written = Vec::new();
        let (stands, me) = (&self.stands, &self.me);
        self.asked.retain(|pair, asked| {
            let now = stands.get(pair);
            if now.is_some_and(|k| k.owner == *me && k.epoch == asked.epoch) {
                written.push((pair.clone(), asked.epoch));
                return false;
            }
            // Somebody else came first, and it cannot be written over that any more.
            pair.pool != pool || now == asked.over.as_ref()
        });
        written
    }

    /// Whether a claim can be made now. If not it is to be written first, and asked for again until it can.
    pub fn may_claim(&mut self, pair: &Pair, epoch: u64, now: Duration) -> bool {
        if self.is_silent(now) || self.absent.contains(&pair.pool) {
            self.asked.remove(pair);
            return true;
        }
        let over = self.stands.get(pair).cloned();
        let since = match self.asked.get(pair) {
            Some(a) if a.epoch == epoch && a.over == over => return now.saturating_sub(a.since) >= ANSWER,
            Some(a) => a.since,
            None => now,
        };
        self.ask(pair, epoch, over, since, now);
        false
    }

    /// What is held stands in the status, too, as soon as it can be written.
    pub fn keep(&mut self, pair: &Pair, epoch: u64, now: Duration) {
        let over = self.stands.get(pair).cloned();
        let claim = Known { owner: self.me.clone(), epoch };
        let lower = over.as_ref().is_none_or(|k| claim.beats(k) || !credible(k, epoch));
        if !lower || self.is_silent(now) || self.absent.contains(&pair.pool) {
            self.asked.remove(pair);
            return;
        }
        let asked = self.asked.get(pair);
        if asked.is_none_or(|a| a.epoch != epoch || a.over != over || now.saturating_sub(a.at) >= AGAIN) {
            let since = asked.map_or(now, |a| a.since);
            self.ask(pair, epoch, over, since, now);
        }
    }

    fn ask(&mut self, pair: &Pair, epoch: u64, over: Option<Known>, since: Duration, now: Duration) {
        let claim = Known { owner: self.me.clone(), epoch };
        self.out.push(Write { pair: pair.clone(), claim, over: over.clone() });
        self.asked.insert(pair.clone(), Asked { epoch, over, since, at: now });
    }

    /// Forgets what is asked for of other pairs than these.
    pub fn retain(&mut self, wanted: impl Fn(&Pair) -> bool) {
        self.asked.retain(|p, _| wanted(p));
    }

    /// What is to be written since the last time.
    pub fn take(&mut self) -> Vec<Write> {
        std::mem::take(&mut self.out)
    }
}

/// Whether an epoch that stands somewhere can have come about when `known` is known.
pub fn credible(record: &Known, known: u64) -> bool {
    record.epoch <= known.saturating_add(MAX_STEP)
}
