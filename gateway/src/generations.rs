//! Whether this gateway sees less of the API server than another one does. Pure: time is an argument.
//!
//! resourceVersions of one list are comparable: gateways tell each other the newest that they have seen of an object.
//! One that has not reached what another one has seen for [`LAG`] is stale: it may still allow what was taken back, so
//! it helps nobody until it has caught up.
//!
//! Only what a peer says now counts. One that is silent has no say after [`FORGET`]: while the API server is away, the
//! last gateway carries on with what it knows. What it learns from a list that it has only just got back it says so
//! late that nobody is stale until [`RETURN`] after that: others have lost theirs as well, and come back after pauses
//! of their own. Nobody is stale later than that either, or than [`LAG`] after an edit.
//!
//! Only objects count that change something (see `crate::source::kubernetes`): heartbeats of nodes and statuses are
//! written all the time, and who does not see them helps nobody to what is not allowed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tidegate_api::index::Feed;

/// So long a gateway may be behind. Ownership moves within half a second of it: nobody is helped 5 s after an edit.
pub const LAG: Duration = Duration::from_secs(4);
/// So long behind, it gives its watch up for another one.
pub const HURRY: Duration = Duration::from_secs(1);
/// A list that was lost is got back within so long after the first gateway has it: the pause between two tries, and
/// packets of a connection that get lost.
const RETURN: Duration = Duration::from_secs(6);
/// What a silent peer said is forgotten after so long.
const FORGET: Duration = Duration::from_secs(10);
/// Different versions of one list and peer that are remembered. At five beats a second that is more than [`LAG`].
const MAX_AHEAD: usize = 64;

/// How far a list has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// The newest resourceVersion of an object that changed something.
    pub newest: u64,
    /// Everything up to this resourceVersion was seen.
    pub reached: u64,
}

/// How far every list has come. One that the API server does not have is left out.
pub type Versions = BTreeMap<Feed, Version>;

#[derive(Debug, Default)]
struct Peer {
    heard: Duration,
    /// By list, versions that were ahead of this gateway when they were first heard, rising, and when that was.
    ahead: BTreeMap<Feed, VecDeque<(u64, Duration)>>,
}

/// What this gateway and the others have seen.
#[derive(Debug, Default)]
pub struct Generations {
    own: Versions,
    /// What others are told.
    told: BTreeMap<Feed, u64>,
    peers: BTreeMap<String, Peer>,
}

impl Generations {
    /// This gateway has compiled up to here.
    pub fn set_own(&mut self, own: Versions) {
        self.own = own;
        for peer in self.peers.values_mut() {
            for (feed, ahead) in &mut peer.ahead {
                let own = self.own.get(feed);
                ahead.retain(|(version, _)| own.is_some_and(|own| *version > own.reached));
            }
        }
    }

    /// What other gateways are told: of each list, by its name, the newest version. `back` says for how long a list that was
    /// lost is back, and no time while it is not: at first it is told what was said before.
    pub fn told(&mut self, back: impl Fn(Feed) -> Option<Duration>) -> Vec<(String, u64)> {
        let settled = |f: &Feed| back(*f).is_none_or(|since| since >= RETURN - LAG);
        for feed in Feed::ALL.into_iter().filter(settled) {
            match self.own.get(&feed) {
                Some(v) => drop(self.told.insert(feed, v.newest)),
                None => drop(self.told.remove(&feed)),
            }
        }
        self.told.iter().map(|(feed, newest)| (feed.name().to_owned(), *newest)).collect()
    }

    /// Another gateway says what it has seen.
    pub fn heard(&mut self, peer: &str, said: &[(String, u64)], now: Duration) {
        self.peers.retain(|_, p| now.saturating_sub(p.heard) < FORGET);
        let peer = self.peers.entry(peer.to_owned()).or_default();
        peer.heard = now;
        for feed in Feed::ALL {
            let version = said.iter().find(|(name, _)| name == feed.name()).map(|(_, version)| version);
            // Of a list that this gateway's API server does not have, as an older one, it cannot know less.
            let (Some(version), Some(own)) = (version, self.own.get(&feed)) else {
                peer.ahead.remove(&feed);
                continue;
            };
            let ahead = peer.ahead.entry(feed).or_default();
            // It takes back what it said when the cluster was restored from a backup.
            ahead.retain(|(v, _)| v <= version);
            if *version > own.reached && ahead.back().is_none_or(|(v, _)| v < version) {
                if ahead.len() == MAX_AHEAD {
                    ahead.pop_back();
                }
                ahead.push_back((*version, now));
            }
        }
    }

    /// The lists that are behind another gateway's, and for how long.
    pub fn behind(&self, now: Duration) -> BTreeMap<Feed, Duration> {
        let mut out = BTreeMap::new();
        for peer in self.peers.values().filter(|p| now.saturating_sub(p.heard) < FORGET) {
            for (feed, ahead) in &peer.ahead {
                let Some((_, since)) = ahead.front() else { continue };
                let lag: &mut Duration = out.entry(*feed).or_default();
                *lag = now.saturating_sub(*since).max(*lag);
            }
        }
        out
    }

    /// Whether this gateway is stale.
    pub fn is_stale(&self, now: Duration) -> bool {
        self.behind(now).values().any(|lag| *lag >= LAG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn own(reached: u64) -> Versions {
        [(Feed::EgressPolicies, Version { newest: reached, reached })].into()
    }

    fn said(version: u64) -> Vec<(String, u64)> {
        vec![(Feed::EgressPolicies.name().to_owned(), version), ("a list of tomorrow".to_owned(), 9)]
    }

    #[test]
    fn one_that_does_not_reach_what_another_has_seen_is_stale() {
        let mut g = Generations::default();
        g.set_own(own(10));
        for ms in (0..=3800).step_by(200) {
            g.heard("b", &said(if ms == 0 { 10 } else { 11 }), at(ms));
            assert!(!g.is_stale(at(ms)), "{ms}");
        }
        assert_eq!(g.behind(at(3800)), [(Feed::EgressPolicies, at(3600))].into());
        // Newer ones do not start the time again.
        g.heard("b", &said(12), at(4200));
        assert!(g.is_stale(at(4200)));
        g.set_own(own(11));
        assert!(!g.is_stale(at(4200)), "only 12 is missing, and that is new");
        g.set_own(own(12));
        assert!(g.behind(at(9000)).is_empty());
        assert_eq!(g.told(|_| None), [("egresspolicies".to_owned(), 12)]);
    }

    #[test]
    fn one_that_follows_at_a_distance_is_not() {
        let mut g = Generations::default();
        g.set_own(own(0));
        for i in 1..200u64 {
            g.heard("b", &said(i), at(i * 200));
            g.set_own(own(i.saturating_sub(10)));
            assert!(!g.is_stale(at(i * 200)), "2 s behind at {i}");
        }
        for i in 200..230 {
            g.heard("b", &said(i), at(i * 200));
        }
        assert!(g.is_stale(at(230 * 200)), "it has stopped");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut g = Generations::default();
        g.set_own(own(0));
        for i in 0..10_000 {
            g.heard("b", &said(i + 1), at(i));
        }
        assert_eq!(g.peers["b"].ahead[&Feed::EgressPolicies].len(), MAX_AHEAD);
        assert!(g.is_stale(at(10_000)));
        g.set_own(own(10_000));
        assert!(!g.is_stale(at(10_000)));
    }

    #[test]
    fn what_a_peer_takes_back_or_said_long_ago_does_not_count() {
        let mut g = Generations::default();
        g.set_own(own(10));
        g.heard("b", &said(1_000_000), at(0));
        g.heard("b", &said(9), at(4500));
        assert!(!g.is_stale(at(4500)), "the cluster was restored");
        g.heard("b", &said(11), at(5000));
        assert!(g.is_stale(at(14_000)));
        assert!(!g.is_stale(at(15_000)), "nobody else is there");
        g.heard("c", &[], at(15_000));
        assert!(!g.is_stale(at(15_000)), "one without Kubernetes");
        assert_eq!(g.peers.keys().collect::<Vec<_>>(), ["c"], "who left is forgotten");
    }

    #[test]
    fn a_list_that_the_own_api_server_does_not_have_makes_nobody_stale() {
        let mut g = Generations::default();
        g.set_own(own(10));
        let said = |version| vec![(Feed::ServiceCidrs.name().to_owned(), version), ("egresspolicies".to_owned(), 10)];
        g.heard("b", &said(7), at(0));
        g.heard("b", &said(7), at(5000));
        assert!(!g.is_stale(at(5000)) && g.behind(at(5000)).is_empty());
        // It was there, and is not any more: another API server answers.
        let both = |reached| [own(10), [(Feed::ServiceCidrs, Version { newest: 7, reached })].into()];
        g.set_own(both(7).into_iter().flatten().collect());
        g.heard("b", &said(8), at(6000));
        g.set_own(own(10));
        assert!(!g.is_stale(at(11_000)));
        // And there again: from now on it counts.
        g.set_own(both(7).into_iter().flatten().collect());
        g.heard("b", &said(8), at(12_000));
        assert!(!g.is_stale(at(12_000)));
        g.heard("b", &said(8), at(16_000));
        assert!(g.is_stale(at(16_000)));
    }

    #[test]
    fn what_a_list_says_that_has_only_just_come_back_is_told_later() {
        let mut g = Generations::default();
        let back = |g: &mut Generations, ms| g.told(|f| (f == Feed::EgressPolicies).then_some(at(ms)));
        g.set_own(own(9));
        assert!(back(&mut g, 0).is_empty(), "the API server was away at the start");
        assert_eq!(g.told(|_| None), [("egresspolicies".to_owned(), 9)]);
        g.set_own(own(20));
        assert_eq!(back(&mut g, 0), [("egresspolicies".to_owned(), 9)]);
        assert_eq!(back(&mut g, 2000), [("egresspolicies".to_owned(), 20)]);
        g.set_own(Versions::new());
        assert!(g.told(|_| None).is_empty(), "the API server does not have it any more");
    }

    #[test]
    fn after_an_outage_all_have_six_seconds_and_no_edit_takes_longer() {
        // One is back at 0, and hears of an edit then or later; the other one does not come back.
        for edit in [0, 500, 1900, 2000, 3000, 8000] {
            let (mut first, mut second) = (Generations::default(), Generations::default());
            first.set_own(own(10));
            first.told(|_| None);
            second.set_own(own(10));
            let stale = (0..20_000).step_by(100).find(|ms| {
                if *ms >= edit {
                    first.set_own(own(11));
                }
                let told = first.told(|_| Some(at(*ms)));
                second.heard("first", &told, at(*ms));
                second.is_stale(at(*ms))
            });
            assert_eq!(stale, Some((edit + 4000).max(6000)), "an edit at {edit} ms");
        }
    }
}
