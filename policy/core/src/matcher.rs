//! Finds the rules whose names or patterns match a name, at a cost that does not
//! grow with the number of rules.
//!
//! ```text
//! name           api.eu.example.com
//! suffixes       api.eu.example.com → eu.example.com → example.com → com → ""
//!                looked up only at depths at which some pattern is anchored (a bit mask)
//! anchor         exact: api.eu.example.com    one label below: *.eu.example.com
//!                any label below: **.example.com    globs: a*.eu.example.com, hung off eu.example.com
//! ```
//!
//! The hash is keyed, so that nobody can write names that collide. Globs cannot be
//! hashed; at most [`MAX_GLOBS`] hang off one anchor, and the builder returns the rest.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::Fqdn;
use crate::pattern::Pattern;

/// The most globs that hang off one literal suffix in one matcher.
pub const MAX_GLOBS: usize = 64;

/// Depths (labels of the literal suffix) that a mask holds; a name has at most 127 labels.
const MAX_DEPTH: usize = 127;

/// What a match leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Dense id of the rule.
    pub rule: u32,
    /// Dense id of its policy: what [`Matcher::below`] asks for.
    pub policy: u32,
    /// Whether a name below which this rule may match counts as an ancestor of an allowed name.
    pub opens: bool,
}

/// One match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Dense id of the rule.
    pub rule: u32,
    /// Whether the whole name was written in the rule.
    pub exact: bool,
}

#[derive(Clone, Debug, Default)]
struct Anchor {
    exact: Vec<u32>,
    child: Vec<u32>,
    many: Vec<u32>,
    globs: Vec<(Pattern, Target)>,
    /// Policies with an opening rule for some name strictly below this suffix; sorted.
    below: Vec<u32>,
    /// Policies with an opening rule for every name strictly below this suffix; sorted.
    all_below: Vec<u32>,
}

/// An immutable table of names and patterns.
#[derive(Clone, Debug, Default)]
pub struct Matcher {
    anchors: HashMap<Arc<str>, Anchor, ahash::RandomState>,
    /// Bit d: some anchor has d labels. Bit 0 is the root.
    depths: u128,
    /// Those of them at which a whole name is written.
    exact: u128,
    /// Those of them at which a pattern is anchored.
    wild: u128,
}

fn depth(suffix: &str) -> usize {
    if suffix.is_empty() { 0 } else { suffix.bytes().filter(|b| *b == b'.').count() + 1 }
}

/// The bit of a depth; none for a name deeper than any.
fn bit(depth: usize) -> u128 {
    if depth <= MAX_DEPTH { 1 << depth } else { 0 }
}

/// A suffix without its first label.
fn parent(suffix: &str) -> &str {
    suffix.bytes().position(|b| b == b'.').map_or("", |dot| &suffix[dot + 1..])
}

fn insert(list: &mut Vec<u32>, id: u32) {
    if let Err(at) = list.binary_search(&id) {
        list.insert(at, id);
    }
}

impl Matcher {
    /// Builds the table. Returns, beside it, the targets whose glob found its anchor
    /// full, with that glob; earlier entries have precedence. The caller must not let a deny get lost so.
    pub fn build<'a>(entries: impl IntoIterator<Item = (&'a Fqdn, Target)>) -> (Self, Vec<(Pattern, Target)>) {
        let mut m = Self::default();
        let mut full = Vec::new();
        for (fqdn, target) in entries {
            match fqdn {
                Fqdn::Name(n) => m.add_exact(n.as_str(), target),
                Fqdn::Pattern(p) if p.is_exact() => m.add_exact(p.as_str(), target),
                Fqdn::Pattern(p) => m.add_pattern(p, target, &mut full),
            }
        }
        (m, full)
    }

    fn anchor(&mut self, suffix: &str) -> &mut Anchor {
        self.depths |= bit(depth(suffix));
        self.anchors.entry(suffix.into()).or_default()
    }

    fn add_exact(&mut self, name: &str, t: Target) {
        insert(&mut self.anchor(name).exact, t.rule);
        self.exact |= bit(depth(name));
        if let Some((_, parent)) = name.split_once('.') {
            self.open_above(parent, t);
        }
    }

    /// Marks the suffix and everything above it as having an opening rule below.
    fn open_above(&mut self, suffix: &str, t: Target) {
        if !t.opens {
            return;
        }
        let mut s = suffix;
        while !s.is_empty() {
            let a = self.anchor(s);
            if a.below.binary_search(&t.policy).is_ok() {
                // Whoever marked this one marked all above.
                break;
            }
            insert(&mut a.below, t.policy);
            s = s.split_once('.').map_or("", |(_, rest)| rest);
        }
    }

    fn add_pattern(&mut self, p: &Pattern, t: Target, full: &mut Vec<(Pattern, Target)>) {
        let suffix = p.literal_suffix();
        let wild = p.as_str().strip_suffix(suffix).unwrap_or("").trim_end_matches('.');
        let a = self.anchor(suffix);
        match wild {
            "*" if p.is_any() => {
                insert(&mut a.many, t.rule);
                if t.opens {
                    insert(&mut a.all_below, t.policy);
                }
            }
            "*" => insert(&mut a.child, t.rule),
            "**" => {
                insert(&mut a.many, t.rule);
                if t.opens {
                    insert(&mut a.all_below, t.policy);
                }
            }
            _ if a.globs.len() >= MAX_GLOBS => {
                full.push((p.clone(), t));
                return;
            }
            _ => a.globs.push((p.clone(), t)),
        }
        self.wild |= bit(depth(suffix));
        self.open_above(suffix, t);
    }

    /// The suffixes of a name at which something is anchored, the longest first, each with how many labels are in
    /// front of it. `whole` and `above` are the depths at which the name itself and its suffixes are looked up.
    fn walk<'m>(&'m self, name: &str, whole: u128, above: u128, mut f: impl FnMut(&'m Anchor, usize) -> bool) {
        let total = depth(name);
        let mut suffix = name;
        let mut depths = whole;
        for front in 0..=total {
            let here = bit(total - front);
            if depths & here != 0
                && let Some(a) = self.anchors.get(suffix)
                && !f(a, front)
            {
                return;
            }
            // Nothing further up: the rest of the name need not be walked.
            if here != 0 && above & (here - 1) == 0 {
                return;
            }
            suffix = parent(suffix);
            depths = above;
        }
    }

    /// Calls `found` for every rule that matches a canonical name; a rule may come
    /// more than once when several of its patterns match.
    pub fn matches(&self, name: &str, mut found: impl FnMut(Hit)) {
        self.walk(name, self.exact, self.wild, |a, front| {
            match front {
                0 => a.exact.iter().for_each(|r| found(Hit { rule: *r, exact: true })),
                1 => a.child.iter().for_each(|r| found(Hit { rule: *r, exact: false })),
                _ => {}
            }
            if front > 0 {
                a.many.iter().for_each(|r| found(Hit { rule: *r, exact: false }));
                for (p, t) in &a.globs {
                    if p.matches(name) {
                        found(Hit { rule: t.rule, exact: false });
                    }
                }
            }
            true
        });
    }

    /// Whether an opening rule of a policy that `of` accepts could match a name strictly below `name`.
    pub fn below(&self, name: &str, of: impl Fn(u32) -> bool) -> bool {
        let mut yes = false;
        self.walk(name, self.depths, self.depths, |a, front| {
            yes = (front == 0 && a.below.iter().any(|p| of(*p)))
                || a.all_below.iter().any(|p| of(*p))
                || (front > 0 && a.globs.iter().any(|(p, t)| t.opens && of(t.policy) && p.could_match_below(name)));
            !yes
        });
        yes
    }

    /// Number of suffix look-ups and glob comparisons that a name costs: what the bound on work is tested by.
    pub fn comparisons(&self, name: &str) -> usize {
        let mut n = 0;
        self.walk(name, self.exact, self.wild, |a, front| {
            n += 1 + if front > 0 { a.globs.len() } else { 0 };
            true
        });
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Name;
    use proptest::prelude::*;

    fn fqdn(text: &str) -> Fqdn {
        if text.contains('*') {
            Fqdn::Pattern(Pattern::parse(text).unwrap())
        } else {
            Fqdn::Name(Name::parse(text).unwrap())
        }
    }

    fn target(i: usize) -> Target {
        Target { rule: i as u32, policy: i as u32, opens: true }
    }

    fn build(texts: &[String]) -> Matcher {
        let list: Vec<Fqdn> = texts.iter().map(|t| fqdn(t)).collect();
        let (m, full) = Matcher::build(list.iter().enumerate().map(|(i, f)| (f, target(i))));
        assert!(full.is_empty());
        m
    }

    fn all(m: &Matcher, name: &str) -> Vec<u32> {
        let mut out = Vec::new();
        m.matches(name, |h| out.push(h.rule));
        out.sort_unstable();
        out.dedup();
        out
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_one_pattern_at_a_time(
            texts in proptest::collection::vec("(\\*\\*\\.|\\*\\.)?([ab*]{1,2}\\.){0,2}[ab*]{1,2}", 1..12),
            names in proptest::collection::vec("([ab]{1,2}\\.){0,3}[ab]{1,2}", 1..12),
        ) {
            let texts: Vec<String> =
                texts.into_iter().filter(|t| Pattern::parse(t).is_ok()).collect();
            let m = build(&texts);
            for n in &names {
                let expected: Vec<u32> = (0..texts.len() as u32)
                    .filter(|i| Pattern::parse(&texts[*i as usize]).unwrap().matches(n))
                    .collect();
                prop_assert_eq!(all(&m, n), expected, "{}", n);
                for (i, t) in texts.iter().enumerate() {
                    prop_assert_eq!(
                        m.below(n, |p| p == i as u32),
                        Pattern::parse(t).unwrap().could_match_below(n),
                        "{} below {}", t, n
                    );
                }
            }
        }
    }

    #[test]
    fn whether_a_match_was_exact_is_told() {
        let m = build(&["a.x.com".into(), "*.x.com".into()]);
        let mut hits = Vec::new();
        m.matches("a.x.com", |h| hits.push(h));
        assert_eq!(hits, [Hit { rule: 0, exact: true }, Hit { rule: 1, exact: false }]);
    }

    #[test]
    fn a_rule_that_opens_nothing_has_no_ancestors() {
        let f = fqdn("**.x.com");
        let (m, _) = Matcher::build([(&f, Target { opens: false, ..target(0) })]);
        assert!(!m.below("x.com", |_| true));
        assert_eq!(all(&m, "a.x.com"), [0]);
    }

    #[test]
    fn globs_of_one_anchor_are_capped_and_returned() {
        let list: Vec<Fqdn> = (0..MAX_GLOBS + 3).map(|i| fqdn(&format!("g{i}*.com"))).collect();
        let (m, full) = Matcher::build(list.iter().enumerate().map(|(i, f)| (f, target(i))));
        assert_eq!(full.len(), 3);
        assert_eq!(full[0].0.as_str(), format!("g{MAX_GLOBS}*.com"));
        assert_eq!(all(&m, "g5x.com"), [5]);
    }

    #[test]
    fn the_work_does_not_grow_with_the_rules() {
        let pattern = |i: usize| match i % 3 {
            0 => format!("h{i}.d{}.example.com", i % 97),
            1 => format!("*.s{i}.example.net"),
            _ => format!("**.t{i}.example.org"),
        };
        let few = build(&(0..300).map(pattern).collect::<Vec<_>>());
        let many = build(&(0..30_000).map(pattern).collect::<Vec<_>>());
        for name in
            ["h0.d0.example.com", "a.s1.example.net", "x.y.t2.example.org", "nobody.example.edu", "a.b.c.d.e.f.g"]
        {
            assert!(many.comparisons(name) <= few.comparisons(name) + 1, "{name}");
            assert!(many.comparisons(name) <= 5, "{name}");
        }
        let deep = vec!["a"; 127].join(".");
        assert!(many.comparisons(&deep) <= 128);
    }

    #[test]
    fn nothing_is_looked_up_where_nothing_can_match() {
        // Ancestors of names have anchors too, which only `below` asks.
        let names = build(&["a.b.x.com".into(), "c.d.x.com".into()]);
        assert_eq!(names.comparisons("a.b.x.com"), 1);
        assert_eq!(names.comparisons("e.b.x.com"), 0);
        assert_eq!(names.comparisons("e.a.b.x.com"), 0);
        let both = build(&["a.b.x.com".into(), "*.d.x.com".into()]);
        assert_eq!(both.comparisons("a.b.x.com"), 2, "the name and its suffix of three labels");
        assert_eq!(both.comparisons("f.c.d.x.com"), 1, "the suffix of three labels");
        assert_eq!(all(&both, "c.d.x.com"), [1]);
    }
}
