//! What is tried, and what it has to come to. Nothing here speaks to anybody.

use std::net::IpAddr;

use crate::probe::{Attempt, Family, Seen, Step, Why, first_address, list};

use super::report::{Outcome, Row};

/// How long a step of what should work may take, in milliseconds.
const PATIENCE: u64 = 5_000;
/// How long is waited for an answer that should not come, in milliseconds.
const DROP: u64 = 2_000;
pub const HTTPS: u16 = 443;
/// A port that no rule has.
pub const HTTP: u16 = 80;

/// The names that are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    /// One that the policy allows.
    pub allowed: String,
    /// One that it does not.
    pub denied: String,
    /// One that answers with the address that it saw: name, and path.
    pub echo: Option<(String, String)>,
}

/// What pods that nobody touches have seen: what the managed ones are compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baseline {
    /// Addresses of the allowed name.
    pub allowed: Vec<IpAddr>,
    /// Whether the other name can be reached.
    pub denies: bool,
    /// An address of it that the allowed one has not.
    pub stranger: Option<IpAddr>,
    /// Whether the allowed name has a port that no rule has.
    pub other_port: bool,
    /// Whether the API server is reached by its name.
    pub inside: bool,
}

/// A connection over TLS to a name, as clients make it.
pub fn visit(name: &str, family: Family) -> Attempt {
    Attempt {
        family,
        name: Some(name.to_owned()),
        port: Some(HTTPS),
        sni: Some(name.to_owned()),
        patience: PATIENCE,
        ..Attempt::default()
    }
}

/// The same, and what the server says.
pub fn fetch(name: &str, path: &str, family: Family) -> Attempt {
    Attempt { path: Some(path.to_owned()), ..visit(name, family) }
}

/// A connection to an address that nobody has asked for.
pub fn knock(address: IpAddr) -> Attempt {
    Attempt {
        family: Family::of(address),
        address: Some(address),
        port: Some(HTTPS),
        patience: DROP,
        ..Attempt::default()
    }
}

/// The allowed name, at a port that no rule has.
pub fn other_port(name: &str, family: Family) -> Attempt {
    Attempt { port: Some(HTTP), sni: None, patience: DROP, ..visit(name, family) }
}

/// The allowed name's address, with another name in the hello.
pub fn other_sni(name: &str, sni: &str, family: Family) -> Attempt {
    Attempt { sni: Some(sni.to_owned()), ..visit(name, family) }
}

/// The API server, by its name inside.
pub fn inside(family: Family) -> Attempt {
    Attempt {
        family,
        name: Some("kubernetes.default.svc".into()),
        search: true,
        port: Some(HTTPS),
        patience: PATIENCE,
        ..Attempt::default()
    }
}

/// A promise is kept if all of it was done.
pub fn done(seen: &Seen) -> Outcome {
    if seen.failed.is_none() { Outcome::Kept } else { Outcome::Broken }
}

/// A name that is denied has no address; where names resolve all the same, none is connected to.
pub fn denied(seen: &Seen) -> Outcome {
    match seen.failed {
        Some((Step::Resolve, Why::Nothing)) => Outcome::Kept,
        // Nobody who answers is no denial.
        Some((Step::Resolve, _)) | None => Outcome::Broken,
        Some(_) if seen.connected.is_some() => sni(seen),
        Some(_) => Outcome::Kept,
    }
}

/// No connection came about.
pub fn unreached(seen: &Seen) -> Outcome {
    match seen.failed {
        Some((Step::Connect, _)) => Outcome::Kept,
        _ => Outcome::Broken,
    }
}

/// The hello reached nobody: even a refusal by the server would mean that it had.
pub fn sni(seen: &Seen) -> Outcome {
    match seen.failed {
        Some((Step::Hello, Why::Cut | Why::Silent | Why::Refused)) => Outcome::Kept,
        _ => Outcome::Broken,
    }
}

/// The address that a server saw.
pub fn egress(seen: &Seen) -> Option<IpAddr> {
    seen.body.as_deref().and_then(|body| first_address(body, seen.connected))
}

/// What the sources that servers saw from each node mean: one row, since it is the same from every node that counts.
pub fn stable(family: Family, seen: &[(String, IpAddr)], wanted: &[IpAddr]) -> Row {
    let mut all: Vec<IpAddr> = seen.iter().map(|(_, ip)| *ip).collect();
    all.sort_unstable();
    all.dedup();
    let wanted: Vec<IpAddr> = wanted.iter().copied().filter(|ip| Family::of(*ip) == family).collect();
    let foreign: Vec<String> = seen
        .iter()
        .filter(|(_, ip)| !wanted.is_empty() && !wanted.contains(ip))
        .map(|(node, ip)| format!("{ip} from {node}"))
        .collect();
    let (outcome, detail) = match (all.as_slice(), foreign.is_empty()) {
        ([], _) => (Outcome::Broken, "no server said whom it saw".to_owned()),
        (_, false) => (Outcome::Broken, format!("{}, and not {}", foreign.join(", "), list(&wanted))),
        ([one], _) => (Outcome::Kept, format!("{one} from {} nodes", seen.len())),
        (_, true) => {
            let each: Vec<String> = seen.iter().map(|(node, ip)| format!("{ip} from {node}")).collect();
            (Outcome::Broken, format!("differs: {}", each.join(", ")))
        }
    };
    Row::new("egress IP", Some(family), "", outcome, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(step: Step, why: Why) -> Seen {
        Seen { failed: Some((step, why)), ..Seen::default() }
    }

    #[test]
    fn silence_of_dns_is_no_denial() {
        assert_eq!(denied(&failed(Step::Resolve, Why::Nothing)), Outcome::Kept);
        assert_eq!(denied(&failed(Step::Resolve, Why::Silent)), Outcome::Broken);
        assert_eq!(denied(&failed(Step::Connect, Why::Silent)), Outcome::Kept);
        assert_eq!(denied(&Seen::default()), Outcome::Broken);
        let alert = Seen { connected: Some([192, 0, 2, 1].into()), ..failed(Step::Hello, Why::Answered) };
        assert_eq!(denied(&alert), Outcome::Broken);
    }

    #[test]
    fn a_servers_refusal_means_that_the_hello_got_there() {
        assert_eq!(sni(&failed(Step::Hello, Why::Cut)), Outcome::Kept);
        assert_eq!(sni(&failed(Step::Hello, Why::Answered)), Outcome::Broken);
        assert_eq!(sni(&failed(Step::Connect, Why::Silent)), Outcome::Broken, "nothing was tried");
        assert_eq!(sni(&Seen::default()), Outcome::Broken);
    }

    #[test]
    fn an_address_that_answers_was_reached() {
        assert_eq!(unreached(&failed(Step::Connect, Why::Silent)), Outcome::Kept);
        assert_eq!(unreached(&failed(Step::Hello, Why::Cut)), Outcome::Broken);
        assert_eq!(unreached(&Seen::default()), Outcome::Broken);
    }

    #[test]
    fn the_source_is_the_same_from_every_node_and_the_pools() {
        let (a, b): (IpAddr, IpAddr) = ([203, 0, 113, 10].into(), [203, 0, 113, 20].into());
        let seen = |x, y| [("n1".to_owned(), x), ("n2".to_owned(), y)];
        let outcome = |seen: &[(String, IpAddr)], wanted: &[IpAddr]| stable(Family::V4, seen, wanted).outcome;
        assert_eq!(outcome(&seen(a, a), &[]), Outcome::Kept);
        assert_eq!(outcome(&seen(a, b), &[]), Outcome::Broken);
        assert_eq!(outcome(&seen(a, a), &[a, b]), Outcome::Kept);
        assert_eq!(outcome(&seen(b, b), &[a]), Outcome::Broken);
        assert_eq!(outcome(&[], &[a]), Outcome::Broken);
        // Addresses of the other family say nothing of this one.
        assert_eq!(outcome(&seen(a, a), &["2001:db8::1".parse().unwrap()]), Outcome::Kept);
    }
}
