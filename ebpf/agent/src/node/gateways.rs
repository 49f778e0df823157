//! What this node knows of each gateway, by a small number that facts are marked with.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::find::MAX;
use crate::merge::Model;

/// A gateway that was found, has gone, and owns nothing is forgotten after so long.
const FORGET: Duration = Duration::from_secs(600);

/// A gateway that says nothing for so long is silent: heartbeats come every 200 ms.
const QUIET: Duration = Duration::from_millis(600);

/// What is known of one gateway.
#[derive(Debug)]
pub(super) struct Heard {
    pub name: Arc<str>,
    pub model: Model,
    /// When its `Facts` stream last said something, and whether it ended since.
    pub sign: Option<(Instant, bool)>,
    /// Whether it said that others are to be asked for names.
    pub steps_back: bool,
    /// Whether its `Facts` stream is up and in the kernel, from its first snapshot on.
    pub in_sync: bool,
    /// Whether the configuration names it.
    fixed: bool,
    /// Since when it has neither stream.
    gone: Option<Instant>,
}

impl Heard {
    /// When it is silent if it says nothing more; none where its stream ended, or never was.
    fn quiet(&self) -> Option<Instant> {
        self.sign.filter(|(_, ended)| !ended).map(|(at, _)| at + QUIET)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Gateways(BTreeMap<usize, Heard>);

impl Gateways {
    /// Those of the configuration.
    pub fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let heard = |name: &str| Heard {
            name: name.into(),
            model: Model::default(),
            sign: None,
            steps_back: false,
            in_sync: false,
            fixed: true,
            gone: None,
        };
        Self(names.map(heard).enumerate().collect())
    }

    /// The number of a gateway that speaks. A new one gets a number; one that is given anew is the second value: what was
    /// marked with it counts no more. None if there are too many.
    pub fn enter(&mut self, name: &Arc<str>, owns: impl Fn(&str) -> bool) -> Option<(usize, bool)> {
        if let Some(index) = self.index(name) {
            return Some((index, false));
        }
        let (index, anew) = match (0..MAX).find(|i| !self.0.contains_key(i)) {
            Some(index) => (index, false),
            // The one that has been gone for longest makes room.
            None => {
                let gone = self.0.iter().filter(|(_, h)| !h.fixed && !owns(&h.name));
                (gone.filter_map(|(i, h)| Some((h.gone?, *i))).min()?.1, true)
            }
        };
        let heard = Heard {
            name: Arc::clone(name),
            model: Model::default(),
            sign: None,
            steps_back: false,
            in_sync: false,
            fixed: false,
            gone: None,
        };
        self.0.insert(index, heard);
        Some((index, anew))
    }

    /// Forgets those that were found, have been gone for long, and own nothing. Returns their numbers and names.
    pub fn forget(&mut self, now: Instant, owns: impl Fn(&str) -> bool) -> Vec<(usize, Arc<str>)> {
        for heard in self.0.values_mut() {
            let up = heard.model.live() || heard.sign.is_some_and(|(_, ended)| !ended);
            heard.gone = if up { None } else { heard.gone.or(Some(now)) };
        }
        // While nobody is there, what they said last is all there is.
        if !self.0.values().any(|h| h.model.live()) {
            return Vec::new();
        }
        let over = |h: &Heard| !h.fixed && h.gone.is_some_and(|at| now.duration_since(at) >= FORGET) && !owns(&h.name);
        let gone: Vec<_> = self.0.iter().filter(|(_, h)| over(h)).map(|(i, h)| (*i, h.name.clone())).collect();
        for (index, _) in &gone {
            self.0.remove(index);
        }
        gone
    }

    pub fn index(&self, name: &str) -> Option<usize> {
        self.0.iter().find(|(_, h)| *h.name == *name).map(|(i, _)| *i)
    }

    pub fn get(&self, index: usize) -> Option<&Heard> {
        self.0.get(&index)
    }

    pub fn get_mut(&mut self, index: usize) -> Option<&mut Heard> {
        self.0.get_mut(&index)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Heard> {
        self.0.values()
    }

    /// Those whose scopes others stand in for: who says nothing, or was never heard, and who steps back from others that do not.
    pub fn silent(&self, now: Instant) -> BTreeSet<String> {
        let speaks = |h: &&Heard| h.quiet().is_some_and(|at| now < at);
        let any = self.iter().filter(speaks).any(|h| !h.steps_back);
        self.iter().filter(|h| !speaks(h) || any && h.steps_back).map(|h| h.name.to_string()).collect()
    }

    /// When the next of them falls silent if it says nothing more, beside those that are `known` to be.
    pub fn next_silence(&self, known: &BTreeSet<String>) -> Option<Instant> {
        self.iter().filter(|h| !known.contains(&*h.name)).filter_map(Heard::quiet).min()
    }

    /// Those whose `Facts` streams are up and in the kernel, a bit for each.
    pub fn in_sync(&self) -> u64 {
        self.0.iter().filter(|(_, h)| h.in_sync).fold(0, |all, (i, _)| all | 1 << i)
    }

    pub fn numbers(&self) -> Vec<usize> {
        self.0.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::Update;

    fn live(g: &mut Gateways, name: &str) -> usize {
        let (index, _) = g.enter(&name.into(), |_| false).unwrap();
        let update = Update { boot: 1, sequence: 1, snapshot: true, ..Update::default() };
        g.get_mut(index).unwrap().model.update(update, Duration::ZERO).unwrap();
        index
    }

    #[test]
    fn numbers_are_stable_and_found_gateways_are_forgotten() {
        let now = Instant::now();
        let mut g = Gateways::new(["fixed"].into_iter());
        let (a, b) = (live(&mut g, "a"), live(&mut g, "b"));
        assert_eq!((g.index("fixed"), a, b), (Some(0), 1, 2));
        assert_eq!(g.enter(&"a".into(), |_| false), Some((1, false)));
        g.get_mut(a).unwrap().model.away();
        assert!(g.forget(now, |_| false).is_empty());
        let late = now + FORGET;
        assert!(g.forget(late - Duration::from_secs(1), |_| false).is_empty());
        assert!(g.forget(late, |n| n == "a").is_empty(), "it owns something");
        // The configuration's own stay whatever happens, and so do all while nobody is live.
        g.get_mut(b).unwrap().model.away();
        assert!(g.forget(late, |_| false).is_empty());
        live(&mut g, "b");
        assert_eq!(g.forget(late, |_| false), [(1, "a".into())]);
        assert_eq!((g.index("fixed"), g.index("a")), (Some(0), None));
        assert_eq!(g.enter(&"c".into(), |_| false), Some((1, false)));
    }

    #[test]
    fn who_is_silent_or_steps_back_is_stood_in_for_as_long_as_another_one_answers() {
        let start = Instant::now();
        let mut g = Gateways::new(["a", "b", "never"].into_iter());
        let say = |g: &mut Gateways, index: usize, at: Instant, steps_back: bool| {
            let heard = g.get_mut(index).unwrap();
            (heard.sign, heard.steps_back) = (Some((at, false)), steps_back);
        };
        let silent = |g: &Gateways, at: Instant| g.silent(at).into_iter().collect::<Vec<_>>().join(" ");
        assert_eq!((silent(&g, start).as_str(), g.next_silence(&BTreeSet::new())), ("a b never", None));
        let late = start + Duration::from_millis(200);
        say(&mut g, 0, start, false);
        say(&mut g, 1, late, false);
        assert_eq!(silent(&g, start + QUIET - Duration::from_millis(1)), "never");
        assert_eq!(g.next_silence(&BTreeSet::new()), Some(start + QUIET));
        assert_eq!(silent(&g, start + QUIET), "a never");
        // One that is late to be looked at is due at once, and only once.
        assert_eq!(g.next_silence(&g.silent(start + QUIET)), Some(late + QUIET));
        // Who steps back is heard, and others are asked: as long as there are any.
        say(&mut g, 0, late, true);
        assert_eq!(silent(&g, late), "a never");
        say(&mut g, 1, late, true);
        assert_eq!(silent(&g, late), "never");
        say(&mut g, 1, late, false);
        assert_eq!(silent(&g, late + QUIET), "a b never");
        g.get_mut(1).unwrap().sign = Some((late, true));
        assert_eq!((silent(&g, late).as_str(), g.next_silence(&g.silent(late))), ("b never", Some(late + QUIET)));
    }

    #[test]
    fn of_too_many_the_one_that_went_first_makes_room() {
        let now = Instant::now();
        let mut g = Gateways::default();
        for i in 0..MAX {
            live(&mut g, &format!("g{i}"));
        }
        assert_eq!(g.enter(&"new".into(), |_| false), None);
        for (i, at) in [(7, 1), (3, 0)] {
            g.get_mut(i).unwrap().model.away();
            g.forget(now + Duration::from_secs(1 - at), |_| false);
        }
        assert_eq!(g.enter(&"new".into(), |_| true), None, "all of them own something");
        assert_eq!(g.enter(&"new".into(), |n| n == "g7"), Some((3, true)));
        assert_eq!(g.enter(&"newer".into(), |_| false), Some((7, true)));
    }
}
