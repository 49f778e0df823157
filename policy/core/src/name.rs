//! Domain names in the one form that Tidegate matches on.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// A valid name: lower-case ASCII, labels of `[-_a-z0-9]` with 1 to 63 octets, at
/// most 253 octets (RFC 1035, section 2.3.4), no final dot. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

/// Why a text is not a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty or only a dot.
    #[error("the name is empty")]
    Empty,
    /// More than 253 octets.
    #[error("the name is longer than 253 octets")]
    TooLong,
    /// Two dots in a row, or a leading dot.
    #[error("the name has an empty label")]
    EmptyLabel,
    /// A label of more than 63 octets.
    #[error("a label is longer than 63 octets")]
    LabelTooLong,
    /// An octet outside `[-_a-zA-Z0-9.]`.
    #[error("the name has a character that is not a letter, a digit, '-' or '_'")]
    BadCharacter,
    /// IDNA refuses the text (UTS 46).
    #[error("the name is not a valid internationalised name")]
    Idna,
}

/// The longest name in presentation form without the final dot, in octets.
pub const MAX_NAME: usize = 253;
/// The longest label, in octets.
pub const MAX_LABEL: usize = 63;

/// Checks a text that is already lower-case and without a final dot.
fn check(text: &[u8]) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > MAX_NAME {
        return Err(NameError::TooLong);
    }
    let mut label = 0usize;
    for &b in text {
        match b {
            b'.' if label == 0 => return Err(NameError::EmptyLabel),
            b'.' => label = 0,
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => {
                label += 1;
                if label > MAX_LABEL {
                    return Err(NameError::LabelTooLong);
                }
            }
            _ => return Err(NameError::BadCharacter),
        }
    }
    if label == 0 { Err(NameError::EmptyLabel) } else { Ok(()) }
}

impl Name {
    /// Reads ASCII text from the wire or from a client: any case, final dot optional.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            let lower = text.to_ascii_lowercase();
            check(lower.as_bytes())?;
            return Ok(Self(lower.into()));
        }
        check(text.as_bytes())?;
        Ok(Self(text.into()))
    }

    /// Reads text that a person wrote: as [`Name::parse`], and internationalised
    /// names become A-labels (UTS 46, non-transitional).
    pub fn from_user(text: &str) -> Result<Self, NameError> {
        if text.is_ascii() {
            return Self::parse(text);
        }
        let ascii = idna::domain_to_ascii(text).map_err(|_| NameError::Idna)?;
        Self::parse(&ascii)
    }

    /// The canonical text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The labels from left to right.
    pub fn labels(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('.')
    }

    /// Whether this name is `other` or lies below it, compared label by label.
    pub fn is_at_or_below(&self, other: &str) -> bool {
        match self.0.strip_suffix(other) {
            Some("") => true,
            Some(rest) => rest.ends_with('.'),
            None => false,
        }
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_form() {
        assert_eq!(Name::parse("API.GitHub.com.").unwrap().as_str(), "api.github.com");
        assert_eq!(Name::from_user("Bücher.example").unwrap().as_str(), "xn--bcher-kva.example");
        assert_eq!(Name::parse("").unwrap_err(), NameError::Empty);
        assert_eq!(Name::parse("a..b").unwrap_err(), NameError::EmptyLabel);
        assert_eq!(Name::parse(".a").unwrap_err(), NameError::EmptyLabel);
        assert_eq!(Name::parse("a b.example").unwrap_err(), NameError::BadCharacter);
        assert_eq!(Name::parse(&format!("{}.x", "a".repeat(64))).unwrap_err(), NameError::LabelTooLong);
        assert_eq!(Name::parse(&"a.".repeat(128)).unwrap_err(), NameError::TooLong);
    }

    #[test]
    fn below_is_by_label() {
        let n = Name::parse("a.example.com").unwrap();
        assert!(n.is_at_or_below("example.com"));
        assert!(n.is_at_or_below("a.example.com"));
        assert!(!n.is_at_or_below("ample.com"));
        assert!(!n.is_at_or_below("b.a.example.com"));
    }
}
