//! Facts that the kernel holds, and no gateway that is heard stands by. Pure.
//!
//! A gateway may die before others hear of the answer that it has just given, and an earlier run of the agent may have been
//! told by one that is gone. Nobody would tell this node of another class of such an address: so it says that it has it, and
//! gateways that know the address, or learn it later, tell it from then on.

use std::cmp::Reverse;
use std::net::IpAddr;

use tidegate_policy::ScopeKey;
use tidegate_proto::MAX_ORPHANS;

type Fact = (ScopeKey, IpAddr);

/// What gateways are told of.
#[derive(Debug)]
pub struct Orphans {
    found: Vec<Fact>,
    /// Whether there may be more.
    due: bool,
}

impl Default for Orphans {
    /// An earlier run may have left some.
    fn default() -> Self {
        Self { found: Vec::new(), due: true }
    }
}

impl Orphans {
    /// Somebody may stand by less than before: all facts are looked through the next time.
    pub fn look(&mut self) {
        self.due = true;
    }

    /// Those of now. `held`: all facts of the kernel, with what they hold for, the more the longer; `stands`: whether a
    /// gateway that is heard stands by one. Of too many those that hold longest.
    pub fn find(&mut self, held: impl Iterator<Item = (Fact, u64)>, stands: impl Fn(Fact) -> bool) -> &[Fact] {
        if std::mem::take(&mut self.due) {
            let mut all: Vec<_> = held.filter(|(f, _)| !stands(*f)).map(|(f, until)| (Reverse(until), f)).collect();
            if all.len() > MAX_ORPHANS {
                all.select_nth_unstable(MAX_ORPHANS);
                all.truncate(MAX_ORPHANS);
            }
            all.sort_unstable();
            self.found = all.into_iter().map(|(_, f)| f).collect();
        } else {
            self.found.retain(|f| !stands(*f));
        }
        &self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(n: u32) -> Fact {
        (ScopeKey(1), IpAddr::from(n.to_be_bytes()))
    }

    #[test]
    fn facts_are_told_until_somebody_stands_by_them() {
        let mut orphans = Orphans::default();
        let held = || [(fact(1), 10), (fact(2), 20), (fact(3), 0)].into_iter();
        // What an earlier run has left comes first.
        assert_eq!(orphans.find(held(), |f| f == fact(1)), [fact(2), fact(3)]);
        assert_eq!(orphans.find(held(), |f| f == fact(2)), [fact(3)]);
        assert_eq!(orphans.find(held(), |_| false), [fact(3)], "nothing is looked through again");
        orphans.look();
        assert_eq!(orphans.find(held(), |_| false), [fact(2), fact(1), fact(3)]);
        assert_eq!(orphans.find(held(), |_| true), []);
    }

    #[test]
    fn of_too_many_those_that_hold_longest_are_told() {
        let most = MAX_ORPHANS as u32;
        let held = (0..2 * most).map(|n| (fact(n), u64::from(n)));
        let mut orphans = Orphans::default();
        let expected: Vec<_> = (most..2 * most).rev().map(fact).collect();
        assert_eq!(orphans.find(held, |_| false), expected);
    }
}
