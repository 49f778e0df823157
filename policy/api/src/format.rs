//! Formats of names and labels, as the Kubernetes API has them.

/// Whether it is a DNS label (RFC 1123): 1 to 63 of `[-a-z0-9]`, starting and ending with a letter or digit.
pub(crate) fn is_label(text: &str) -> bool {
    let b = text.as_bytes();
    (1..=63).contains(&b.len())
        && b.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && b[0] != b'-'
        && b[b.len() - 1] != b'-'
}

/// Whether it is a DNS subdomain (RFC 1123): labels with dots, at most 253 octets.
pub(crate) fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// Whether it can name a rule: a DNS label that starts with a letter, so that it is never taken for an index.
pub(crate) fn is_rule_name(text: &str) -> bool {
    is_label(text) && text.as_bytes()[0].is_ascii_lowercase()
}

/// The part of a label key behind the prefix, and a label's value: at most 63 of `[-._a-zA-Z0-9]`, ends alphanumeric.
fn is_qualified(text: &str) -> bool {
    let b = text.as_bytes();
    (1..=63).contains(&b.len())
        && b.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && b[0].is_ascii_alphanumeric()
        && b[b.len() - 1].is_ascii_alphanumeric()
}

/// Whether it is a label key: `[prefix/]name`.
pub(crate) fn is_label_key(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_qualified(name),
        None => is_qualified(text),
    }
}

/// Whether it is a label value; it may be empty.
pub(crate) fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_qualified(text)
}

/// The longest name of a network interface in Linux, in octets.
pub(crate) const MAX_INTERFACE: usize = 15;

/// Whether it is a name of a network interface in Linux: 1 to 15 octets, no space, `/` or `:`, not `.` or `..`.
pub(crate) fn is_interface(text: &str) -> bool {
    (1..=MAX_INTERFACE).contains(&text.len())
        && text.bytes().all(|b| (0x21..0x7f).contains(&b) && b != b'/' && b != b':')
        && text != "."
        && text != ".."
}

/// Reads a time as RFC 3339 has it (`2027-01-31T00:00:00Z`) into whole seconds.
pub(crate) fn time(text: &str) -> Option<tidegate_policy::model::UnixSeconds> {
    // jiff also reads a blank in place of the T and RFC 9557 suffixes; the API server does not.
    if text.len() > 40 || text.as_bytes().get(10) != Some(&b'T') || text.contains('[') {
        return None;
    }
    let t: jiff::Timestamp = text.parse().ok()?;
    Some(tidegate_policy::model::UnixSeconds(t.as_second()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        assert!(
            is_label("a-1") && is_label("9") && !is_label("-a") && !is_label("a-") && !is_label("A") && !is_label("")
        );
        assert!(!is_label(&"a".repeat(64)));
        assert!(is_subdomain("a.b-c.9") && !is_subdomain("a..b") && !is_subdomain(".a"));
        assert!(is_rule_name("a0") && !is_rule_name("0"));
        assert!(
            is_label_key("tidegate.dev/gateway")
                && is_label_key("App_x")
                && !is_label_key("a/b/c")
                && !is_label_key("/a")
        );
        assert!(is_label_value("") && is_label_value("v1.2_3") && !is_label_value("a b") && !is_label_value("-"));
        assert!(
            is_interface("eth0.100")
                && !is_interface("a/b")
                && !is_interface("abcdefghijklmnop")
                && !is_interface("..")
        );
    }

    #[test]
    fn times_are_rfc_3339_only() {
        assert_eq!(time("1970-01-02T00:00:00Z").map(|t| t.0), Some(86_400));
        assert_eq!(time("1970-01-02T00:00:00.9+01:00").map(|t| t.0), Some(82_800));
        for bad in
            ["1970-01-02", "1970-01-02 00:00:00Z", "1970-01-02T00:00:00", "1970-01-02T00:00:00Z[UTC]", "tomorrow", ""]
        {
            assert_eq!(time(bad), None, "{bad}");
        }
    }
}
