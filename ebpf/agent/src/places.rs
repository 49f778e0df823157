//! Which device leads to which pod, where pods say so themselves: on bridges, by ARP and neighbour discovery.
//!
//! Who takes a neighbour's address that way must not become the neighbour for the programs. So an address stays at its
//! device as long as there are both, and no device leads to two pods. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tidegate_policy::state::Touch;

/// A pod's address, as the gateways tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who<'a> {
    /// Namespace and name.
    pub pod: (&'a str, &'a str),
    /// How it is treated.
    pub touch: Touch,
}

#[derive(Clone, Debug)]
struct Held {
    index: u32,
    /// Namespace and name; not known of what an earlier agent left.
    pod: Option<(String, String)>,
}

impl Held {
    fn is(&self, who: &Who<'_>) -> bool {
        self.pod.as_ref().is_none_or(|(namespace, name)| (&**namespace, &**name) == who.pod)
    }
}

/// Devices by address.
#[derive(Clone, Debug, Default)]
pub struct Places {
    held: BTreeMap<IpAddr, Held>,
    refused: BTreeSet<IpAddr>,
}

impl Places {
    /// What an earlier agent found.
    pub fn adopt(found: BTreeMap<IpAddr, u32>) -> Self {
        let held = found.into_iter().map(|(ip, index)| (ip, Held { index, pod: None })).collect();
        Self { held, refused: BTreeSet::new() }
    }

    /// Takes what is said now: the addresses of this node's pods, which devices there are, and behind which one an
    /// address answers.
    pub fn follow(
        &mut self,
        pods: &BTreeMap<IpAddr, Who<'_>>,
        there: impl Fn(u32) -> bool,
        said: impl Fn(IpAddr) -> Option<u32>,
    ) {
        self.held.retain(|ip, held| there(held.index) && pods.get(ip).is_some_and(|who| held.is(who)));
        let mut claims: BTreeMap<u32, Vec<(bool, IpAddr, Who<'_>)>> = BTreeMap::new();
        self.refused.clear();
        for (ip, who) in pods {
            let (held, said) = (self.held.get(ip).map(|h| h.index), said(*ip));
            if held.is_some() && said.is_some_and(|index| Some(index) != held) {
                self.refused.insert(*ip);
            }
            if let Some(index) = held.or(said) {
                claims.entry(index).or_default().push((held.is_some(), *ip, *who));
            }
        }
        for (index, claims) in claims {
            // Whoever was there first; of others the most strictly treated, so that nobody gains by it, and of equals the
            // first by name.
            let first = claims.iter().max_by_key(|(held, _, who)| (*held, who.touch, std::cmp::Reverse(who.pod)));
            let Some(pod) = first.map(|(_, _, who)| who.pod) else { continue };
            for (_, ip, who) in claims {
                if who.pod == pod {
                    let pod = Some((pod.0.to_owned(), pod.1.to_owned()));
                    self.held.insert(ip, Held { index, pod });
                } else {
                    self.held.remove(&ip);
                    self.refused.insert(ip);
                }
            }
        }
    }

    /// The devices.
    pub fn found(&self) -> BTreeMap<IpAddr, u32> {
        self.held.iter().map(|(ip, held)| (*ip, held.index)).collect()
    }

    /// Addresses that answer behind a device which is another pod's, or not the one that was theirs.
    pub fn refused(&self) -> &BTreeSet<IpAddr> {
        &self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: Who<'_> = Who { pod: ("shop", "web"), touch: Touch::Isolated };
    const FREE: Who<'_> = Who { pod: ("a", "app"), touch: Touch::Untouched };

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// Follows `said`, with the devices below ten, and gives the devices of 1 to 4.
    fn follow(places: &mut Places, pods: &[(u8, Who<'_>)], said: &[(u8, u32)]) -> [Option<u32>; 4] {
        let pods = pods.iter().map(|(last, who)| (ip(*last), *who)).collect();
        let said: BTreeMap<IpAddr, u32> = said.iter().map(|(last, index)| (ip(*last), *index)).collect();
        places.follow(&pods, |index| index < 10, |ip| said.get(&ip).copied());
        let found = places.found();
        [1, 2, 3, 4].map(|last| found.get(&ip(last)).copied())
    }

    #[test]
    fn an_address_stays_where_it_was() {
        let mut places = Places::default();
        let pods = [(1, STRICT), (2, FREE)];
        let both = [Some(5), Some(6), None, None];
        assert_eq!(follow(&mut places, &pods, &[(1, 5), (2, 6)]), both);
        assert!(places.refused().is_empty());
        assert_eq!(follow(&mut places, &pods, &[(1, 5), (2, 5)]), both, "the strict one says that it is the free one");
        assert_eq!(*places.refused(), [ip(2)].into());
        assert_eq!(follow(&mut places, &pods, &[(1, 6), (2, 5)]), both);
        assert_eq!(follow(&mut places, &pods, &[]), both, "what is forgotten stays");
        assert!(places.refused().is_empty());
    }

    #[test]
    fn an_address_moves_with_its_device_and_with_its_pod() {
        let mut places = Places::default();
        let pods = [(1, STRICT), (2, FREE)];
        follow(&mut places, &pods, &[(1, 50), (2, 6)]);
        assert_eq!(follow(&mut places, &pods, &[(1, 5), (2, 6)]), [Some(5), Some(6), None, None], "its device is gone");
        let other = Who { pod: ("shop", "web-2"), ..STRICT };
        assert_eq!(follow(&mut places, &[(1, other), (2, FREE)], &[(1, 7)]), [Some(7), Some(6), None, None]);
        assert_eq!(follow(&mut places, &[(2, FREE)], &[(1, 7)]), [None, Some(6), None, None]);
    }

    #[test]
    fn a_device_leads_to_one_pod() {
        let mut places = Places::default();
        // Two addresses of one pod are no theft.
        assert_eq!(follow(&mut places, &[(1, STRICT), (3, STRICT)], &[(1, 5), (3, 5)]), [Some(5), None, Some(5), None]);
        // One that comes anew, behind the device of another.
        let pods = [(1, STRICT), (2, FREE), (3, STRICT)];
        assert_eq!(follow(&mut places, &pods, &[(1, 5), (2, 5), (3, 5)]), [Some(5), None, Some(5), None]);
        assert_eq!(*places.refused(), [ip(2)].into());
        assert_eq!(follow(&mut places, &pods, &[(2, 6)]), [Some(5), Some(6), Some(5), None]);
        // Nobody was there first.
        for pods in [[(1, STRICT), (2, FREE)], [(1, FREE), (2, STRICT)]] {
            let mut places = Places::default();
            let found = follow(&mut places, &pods, &[(1, 5), (2, 5)]);
            let strict = usize::from(pods[1].1 == STRICT);
            assert_eq!((found[strict], found[1 - strict]), (Some(5), None));
        }
        // The strict one came later.
        let mut places = Places::default();
        follow(&mut places, &[(2, FREE)], &[(2, 5)]);
        assert_eq!(follow(&mut places, &[(1, STRICT), (2, FREE)], &[(1, 5), (2, 5)]), [None, Some(5), None, None]);
    }

    #[test]
    fn what_an_earlier_agent_found_counts() {
        let mut places = Places::adopt([(ip(1), 5), (ip(2), 6), (ip(3), 70)].into());
        let pods = [(1, STRICT), (2, FREE), (3, FREE)];
        assert_eq!(follow(&mut places, &pods, &[(1, 5), (2, 5), (3, 7)]), [Some(5), Some(6), Some(7), None]);
        // It may have been fooled.
        let mut places = Places::adopt([(ip(1), 5), (ip(2), 5)].into());
        assert_eq!(follow(&mut places, &pods[..2], &[]), [Some(5), None, None, None]);
    }
}
