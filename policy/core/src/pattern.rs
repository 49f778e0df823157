//! Patterns over names.
//!
//! A `*` matches zero or more of `[-_a-z0-9]` inside one label. `**.` in front
//! matches one or more whole labels, so it leaves out the apex. A lone `*` matches
//! every valid name. Further stars in a row mean what one means. A pattern is
//! matched label by label, never on joined text, so that no star crosses a dot.

use std::fmt;
use std::sync::Arc;

use crate::Name;
use crate::name::{MAX_LABEL, MAX_NAME};

/// A valid pattern in canonical form: lower-case, A-labels, no final dot, no needless stars. Cheap to clone.
///
/// Two patterns are equal when their canonical texts are.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern {
    text: Arc<str>,
    head: Head,
}

/// How a pattern starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Head {
    /// The pattern is `*`.
    Any,
    /// It starts with `**.`.
    Many,
    /// As many labels as are written.
    Labels,
}

/// Why a text is not a pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The text is empty or only a dot.
    #[error("the pattern is empty")]
    Empty,
    /// More than 253 octets in canonical form.
    #[error("the pattern is longer than {MAX_NAME} octets")]
    TooLong,
    /// Two dots in a row, or a leading dot.
    #[error("the pattern has an empty label")]
    EmptyLabel,
    /// A label of more than 63 octets beside its stars.
    #[error("the label {0:?} is longer than {MAX_LABEL} octets")]
    LabelTooLong(String),
    /// A character outside `[-_a-zA-Z0-9.*]`.
    #[error("the pattern has {0:?}, which is not a letter, a digit, '-', '_', '.' or '*'")]
    BadCharacter(char),
    /// A `*` in a label that is not ASCII: what it would match depends on the encoding.
    #[error("the label {0:?} mixes '*' with characters that are not ASCII; write its A-label form")]
    StarInIdn(String),
    /// IDNA refuses the label (UTS 46).
    #[error("the label {0:?} is not a valid internationalised label")]
    Idna(String),
}

/// Something that is allowed but seldom meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Lint {
    /// A `*` touches the registrable label from the left: `*x.com` also matches `evilx.com`.
    #[error(
        "also matches names of others, such as one with \"evil\" put in front; write \"*.\" or \"**.\" before the name"
    )]
    Siblings,
    /// The wildcard stands at or above what is probably a public suffix.
    #[error("covers names of different owners: the wildcard stands at or above a public suffix")]
    PublicSuffix,
    /// A lone `*`.
    #[error("matches every name")]
    Everything,
    /// `**` that is not the whole first label.
    #[error("has \"**\" where it means the same as \"*\": only \"**.\" in front matches several labels")]
    InnerDoubleStar,
}

impl Pattern {
    /// Reads a pattern that a person wrote: any case, final dot optional, internationalised labels allowed.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        if text.bytes().all(|b| b == b'*') {
            return Ok(Self { text: "*".into(), head: Head::Any });
        }
        // A bound before any work: an A-label is at least as long as a quarter of the UTF-8 that it stands for.
        if text.len() > 8 * MAX_NAME {
            return Err(PatternError::TooLong);
        }
        let mut out = String::with_capacity(text.len());
        let mut head = Head::Labels;
        for (i, label) in text.split('.').enumerate() {
            if i > 0 {
                out.push('.');
            }
            if i == 0 && label.len() > 1 && label.bytes().all(|b| b == b'*') {
                head = Head::Many;
                out.push_str("**");
            } else {
                push_label(&mut out, label)?;
            }
        }
        if out.len() > MAX_NAME {
            return Err(PatternError::TooLong);
        }
        Ok(Self { text: out.into(), head })
    }

    /// The canonical text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it matches every valid name.
    pub fn is_any(&self) -> bool {
        self.head == Head::Any
    }

    /// Whether it starts with `**.`.
    pub fn is_many(&self) -> bool {
        self.head == Head::Many
    }

    /// Whether it has no wildcard at all, so that it matches one name.
    pub fn is_exact(&self) -> bool {
        !self.text.contains('*')
    }

    /// The labels without a leading `**`, as text; empty for `*`.
    fn tail(&self) -> &str {
        match self.head {
            Head::Any => "",
            Head::Many => self.text.get(3..).unwrap_or(""),
            Head::Labels => &self.text,
        }
    }

    /// The longest suffix of whole labels without a star; empty if the last label has one.
    pub fn literal_suffix(&self) -> &str {
        match self.text.rfind('*') {
            None => &self.text,
            Some(star) => match self.text[star..].find('.') {
                Some(dot) => &self.text[star + dot + 1..],
                None => "",
            },
        }
    }

    /// Whether it matches a canonical name (as in [`Name`]): lower-case, no final dot.
    pub fn matches(&self, name: &str) -> bool {
        if self.head == Head::Any {
            return true;
        }
        let mut labels = name.rsplit('.');
        for p in self.tail().rsplit('.') {
            match labels.next() {
                Some(l) if label_matches(p, l) => {}
                _ => return false,
            }
        }
        match self.head {
            Head::Many => labels.next().is_some(),
            _ => labels.next().is_none(),
        }
    }

    /// Whether it could match some name that lies below (not at) a canonical name.
    pub fn could_match_below(&self, name: &str) -> bool {
        if self.head == Head::Any {
            return true;
        }
        let mut pattern = self.tail().rsplit('.');
        for l in name.rsplit('.') {
            match pattern.next() {
                Some(p) if label_matches(p, l) => {}
                Some(_) => return false,
                None => return self.head == Head::Many,
            }
        }
        self.head == Head::Many || pattern.next().is_some()
    }

    /// Whether every name that `other` matches is matched by `self`. Exact but for
    /// labels with several stars, where it may say no to a true containment.
    pub fn covers(&self, other: &Pattern) -> bool {
        if self.head == Head::Any {
            return true;
        }
        if other.head == Head::Any {
            return false;
        }
        let mut theirs = other.tail().rsplit('.');
        for p in self.tail().rsplit('.') {
            match theirs.next() {
                Some(o) if label_matches(p, o) => {}
                _ => return false,
            }
        }
        let more = theirs.next().is_some();
        match (self.head, other.head) {
            (Head::Many, Head::Many) => true,
            (Head::Many, _) => more,
            (_, Head::Many) => false,
            _ => !more,
        }
    }

    /// Whether some name is matched by both.
    pub fn overlaps(&self, other: &Pattern) -> bool {
        if self.head == Head::Any || other.head == Head::Any {
            return true;
        }
        let (mut a, mut b) = (self.tail().rsplit('.'), other.tail().rsplit('.'));
        loop {
            match (a.next(), b.next()) {
                (Some(x), Some(y)) if labels_overlap(x.as_bytes(), y.as_bytes()) => {}
                (Some(_), Some(_)) => return false,
                (None, None) => return self.head == other.head,
                (Some(_), None) => return other.head == Head::Many,
                (None, Some(_)) => return self.head == Head::Many,
            }
        }
    }

    /// A name that it matches, for showing and for classes that are computed ahead.
    /// Absent only when the name would be longer than a name may be.
    pub fn sample(&self) -> Option<Name> {
        let text = match self.head {
            Head::Any => "x".to_owned(),
            _ => self.text.replace("**", "x").replace('*', "x"),
        };
        Name::parse(&text).ok()
    }

    /// What is probably not meant by it. The public suffix is judged by the number
    /// of labels alone: one label always, two where the last has two letters and the first at most three (`co.uk`).
    pub fn lints(&self) -> Vec<Lint> {
        let mut out = Vec::new();
        if self.head == Head::Any {
            return vec![Lint::Everything];
        }
        if self.is_exact() {
            return out;
        }
        let suffix = self.literal_suffix();
        if is_public_suffix(suffix) {
            // The label with the last star, next to the suffix.
            let rest = self.text.strip_suffix(suffix).unwrap_or("").trim_end_matches('.');
            let label = rest.rsplit('.').next().unwrap_or("");
            let literal = label.bytes().any(|b| b != b'*');
            if label.starts_with('*') && literal && !suffix.is_empty() {
                out.push(Lint::Siblings);
            } else {
                out.push(Lint::PublicSuffix);
            }
        }
        out
    }

    /// What is probably not meant by a text that [`Pattern::parse`] accepts: [`Pattern::lints`], and what the canonical form no longer shows.
    pub fn lint_text(text: &str) -> Result<Vec<Lint>, PatternError> {
        let mut out = Self::parse(text)?.lints();
        let inner = text.split('.').enumerate().any(|(i, l)| {
            let whole_first = i == 0 && l.bytes().all(|b| b == b'*') && text.contains('.');
            l.contains("**") && !whole_first
        });
        if inner {
            out.push(Lint::InnerDoubleStar);
        }
        Ok(out)
    }
}

/// Whether names directly below this suffix probably have different owners.
fn is_public_suffix(suffix: &str) -> bool {
    let mut labels = suffix.rsplit('.');
    match (labels.next(), labels.next(), labels.next()) {
        (_, None, _) => true,
        (Some(last), Some(first), None) => last.len() == 2 && first.len() <= 3,
        _ => false,
    }
}

/// Appends one label in canonical form.
fn push_label(out: &mut String, label: &str) -> Result<(), PatternError> {
    if label.is_empty() {
        return Err(PatternError::EmptyLabel);
    }
    let owned;
    let label = if label.is_ascii() {
        label
    } else if label.contains('*') {
        return Err(PatternError::StarInIdn(label.to_owned()));
    } else {
        owned = idna::domain_to_ascii(label).map_err(|_| PatternError::Idna(label.to_owned()))?;
        // UTS 46 maps some characters to dots: such a text is no single label.
        if owned.is_empty() || owned.contains('.') {
            return Err(PatternError::Idna(label.to_owned()));
        }
        owned.as_str()
    };
    let (mut literal, mut star) = (0usize, false);
    for c in label.chars() {
        match c {
            '*' if star => {}
            '*' => {
                star = true;
                out.push('*');
            }
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => {
                star = false;
                literal += 1;
                out.push(c.to_ascii_lowercase());
            }
            _ => return Err(PatternError::BadCharacter(c)),
        }
    }
    if literal > MAX_LABEL {
        return Err(PatternError::LabelTooLong(label.to_owned()));
    }
    Ok(())
}

/// Whether a label of a pattern matches a label. Linear but for the search of the
/// middle pieces; both are at most 127 octets.
fn label_matches(pattern: &str, label: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == label;
    };
    let Some(mut left) = label.strip_prefix(first) else {
        return false;
    };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for piece in middle.split('*').filter(|p| !p.is_empty()) {
        // The leftmost place is the best one: it leaves the most for what follows.
        match left.find(piece) {
            Some(at) => left = &left[at + piece.len()..],
            None => return false,
        }
    }
    left.ends_with(last)
}

/// Whether some label is matched by both: the product of two small automata.
fn labels_overlap(a: &[u8], b: &[u8]) -> bool {
    // reach[j]: a[..i] and b[..j] can have matched the same text.
    let mut reach = vec![false; b.len() + 1];
    for i in 0..=a.len() {
        let mut next = vec![false; b.len() + 1];
        for j in 0..=b.len() {
            let skip_a = i > 0 && a[i - 1] == b'*' && reach[j];
            let skip_b = j > 0 && b[j - 1] == b'*' && next[j - 1];
            let both = i > 0 && j > 0 && {
                let (x, y) = (a[i - 1], b[j - 1]);
                // A star swallows the other side's octet and stays.
                (x == y && reach[j - 1]) || (x == b'*' && next[j - 1]) || (y == b'*' && reach[j])
            };
            next[j] = (i == 0 && j == 0) || skip_a || skip_b || both;
        }
        reach = next;
    }
    reach[b.len()]
}

impl From<&Name> for Pattern {
    fn from(name: &Name) -> Self {
        Self { text: name.as_str().into(), head: Head::Labels }
    }
}

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Self::parse(text)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    #[test]
    fn canonical_form() {
        for (text, canonical) in [
            ("*", "*"),
            ("**", "*"),
            ("**.", "*"),
            ("***.X.io.", "**.x.io"),
            ("**x.io", "*x.io"),
            ("a.**.com", "a.*.com"),
            ("API.GitHub.com.", "api.github.com"),
            ("*.Bücher.example", "*.xn--bcher-kva.example"),
        ] {
            assert_eq!(p(text).to_string(), canonical, "{text}");
            assert_eq!(p(canonical), p(text));
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        assert_eq!(Pattern::parse(""), Err(PatternError::Empty));
        assert_eq!(Pattern::parse("."), Err(PatternError::Empty));
        assert_eq!(Pattern::parse("a..b"), Err(PatternError::EmptyLabel));
        assert_eq!(Pattern::parse(".a"), Err(PatternError::EmptyLabel));
        assert_eq!(Pattern::parse("a..",), Err(PatternError::EmptyLabel));
        assert_eq!(Pattern::parse("a/b.com"), Err(PatternError::BadCharacter('/')));
        assert_eq!(Pattern::parse("bü*.com"), Err(PatternError::StarInIdn("bü*".into())));
        assert!(matches!(Pattern::parse(&format!("{}.x", "a".repeat(64))), Err(PatternError::LabelTooLong(_))));
        assert_eq!(Pattern::parse(&"a.".repeat(128)), Err(PatternError::TooLong));
        assert!(matches!(Pattern::parse("\u{200d}.com"), Err(PatternError::Idna(_))));
    }

    #[test]
    fn below_means_strictly_below() {
        for (pattern, name, expected) in [
            ("*.x.com", "x.com", true),
            ("*.x.com", "com", true),
            ("*.x.com", "a.x.com", false),
            ("**.x.com", "a.x.com", true),
            ("**.x.com", "b.a.x.com", true),
            ("**.x.com", "x.com", true),
            ("**.x.com", "y.com", false),
            ("a.x.com", "a.x.com", false),
            ("a.x.com", "x.com", true),
            ("a.*.x.com", "foo.x.com", true),
            ("a.f*.x.com", "goo.x.com", false),
            ("*", "anything", true),
        ] {
            assert_eq!(p(pattern).could_match_below(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn containment_and_overlap() {
        for (a, b, covers, overlaps) in [
            ("**.example.com", "*.example.com", true, true),
            ("*.example.com", "**.example.com", false, true),
            ("**.example.com", "example.com", false, false),
            ("*", "**.x", true, true),
            ("a*.com", "ab*.com", true, true),
            ("ab*.com", "a*.com", false, true),
            ("a*b.com", "b*a.com", false, false),
            ("a*.com", "*z.com", false, true),
            ("**.a.com", "**.b.a.com", true, true),
            ("**.b.a.com", "**.a.com", false, true),
            ("**.a.com", "x.b.com", false, false),
            ("*.*.com", "**.com", false, true),
            ("ab*ba.com", "aba.com", false, false),
        ] {
            assert_eq!(p(a).covers(&p(b)), covers, "{a} covers {b}");
            assert_eq!(p(a).overlaps(&p(b)), overlaps, "{a} overlaps {b}");
            assert_eq!(p(b).overlaps(&p(a)), overlaps, "{b} overlaps {a}");
        }
    }

    #[test]
    fn lints_warn() {
        for (text, lints) in [
            ("*", &[Lint::Everything][..]),
            ("*x.com", &[Lint::Siblings]),
            ("*-x.co.uk", &[Lint::Siblings]),
            ("**.com", &[Lint::PublicSuffix]),
            ("*.co.uk", &[Lint::PublicSuffix]),
            ("example.*", &[Lint::PublicSuffix]),
            ("*.example.com", &[]),
            ("**.s3.*.amazonaws.com", &[]),
            ("a.example.com", &[]),
            ("a.**.example.com", &[Lint::InnerDoubleStar]),
            ("**.example.com", &[]),
        ] {
            assert_eq!(Pattern::lint_text(text).unwrap(), lints, "{text}");
        }
    }

    #[test]
    fn samples_match() {
        for t in ["*", "**.a.com", "*.b.com", "a*b*.c.com", "x.y"] {
            let n = p(t).sample().unwrap();
            assert!(p(t).matches(n.as_str()), "{t} {n}");
        }
    }

    mod random {
        use super::*;
        use proptest::prelude::*;

        /// The same grammar, by plain recursion over octets.
        fn glob(p: &[u8], s: &[u8]) -> bool {
            match (p.first(), s.first()) {
                (None, None) => true,
                (Some(b'*'), _) => glob(&p[1..], s) || (!s.is_empty() && glob(p, &s[1..])),
                (Some(a), Some(b)) if a == b => glob(&p[1..], &s[1..]),
                _ => false,
            }
        }

        proptest! {
            #[test]
            fn a_label_matches_as_the_plain_reading_says(p in "[ab*]{1,8}", s in "[ab]{1,8}") {
                let canonical = Pattern::parse(&format!("{p}.x")).unwrap();
                let name = format!("{s}.x");
                let many = p.len() > 1 && p.bytes().all(|b| b == b'*');
                prop_assert_eq!(canonical.matches(&name), many || glob(p.as_bytes(), s.as_bytes()));
            }

            #[test]
            fn relations_agree_with_matching(
                a in "(\\*\\*\\.)?([ab*]{1,3}\\.){0,2}[ab]",
                b in "(\\*\\*\\.)?([ab*]{1,3}\\.){0,2}[ab]",
                n in "([ab]{1,3}\\.){0,3}[ab]",
            ) {
                let (a, b) = (Pattern::parse(&a).unwrap(), Pattern::parse(&b).unwrap());
                if a.matches(&n) && b.matches(&n) {
                    prop_assert!(a.overlaps(&b));
                }
                if a.covers(&b) && b.matches(&n) {
                    prop_assert!(a.matches(&n));
                }
                if a.matches(&n) {
                    let mut above = n.as_str();
                    while let Some((_, rest)) = above.split_once('.') {
                        prop_assert!(a.could_match_below(rest), "{a} below {rest}");
                        above = rest;
                    }
                }
            }

            #[test]
            fn hostile_text_never_panics(text in "\\PC{0,300}") {
                if let Ok(p) = Pattern::parse(&text) {
                    prop_assert_eq!(Pattern::parse(p.as_str()), Ok(p));
                }
            }
        }
    }
}
