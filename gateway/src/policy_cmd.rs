//! `tidegate policy`: tools for people who write policy. They need no cluster.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;
use tidegate_api::{Problem, Severity};
use tidegate_policy::Name;
use tidegate_policy::pattern::Pattern;

/// The subcommands of `tidegate policy`.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum PolicyCommand {
    /// Say whether a pattern matches a name, as DNS, SNI and HTTP Host are matched.
    ///
    /// Prints `match` or `no`. Exit code: 0 for both. 2 if the pattern or the name is not valid, with
    /// the reason on standard error; no pattern matches an invalid name, so `no` is printed for it too.
    Match {
        /// The pattern: `*` stands for characters of one label, `**.` in front for one or more labels.
        #[arg(allow_hyphen_values = true)]
        pattern: String,
        /// The name.
        #[arg(allow_hyphen_values = true)]
        name: String,
    },
    /// Check manifests: policies, pools and the annotations of namespaces.
    ///
    /// Prints one line for each problem and warning. Exit code: 0 if all is good (there may be warnings),
    /// 1 if there are problems, 2 if a path cannot be read.
    Check(Manifests),
    /// Check manifests, and let warnings fail: patterns and prefixes that cover more than their author may think,
    /// grants that a tenant can take by setting a label, rules without effect.
    ///
    /// Prints as `check` does. Exit code: 0 if there is nothing to say, 1 if there are warnings or problems, 2 if a path
    /// cannot be read.
    Lint(Manifests),
}

/// What is checked, and how it is printed.
#[derive(Clone, Debug, clap::Args)]
pub struct Manifests {
    /// A file, a directory with *.yaml, *.yml and *.json files, or - for standard input; may be given several times.
    #[arg(short = 'f', long = "filename", required = true)]
    paths: Vec<PathBuf>,
    /// How problems are printed: a line each, or one JSON document.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// How problems are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// One line each.
    #[default]
    Text,
    /// `{"problems": [...], "unreadable": [...]}`.
    Json,
}

/// A problem as JSON.
#[derive(Debug, Serialize)]
struct Row<'a> {
    severity: &'static str,
    reason: &'static str,
    file: std::borrow::Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<Object<'a>>,
    /// The field; empty when the object as a whole is meant.
    path: String,
    message: &'a str,
}

#[derive(Debug, Serialize)]
struct Object<'a> {
    kind: &'a str,
    namespace: &'a str,
    name: &'a str,
}

impl<'a> From<&'a Problem> for Row<'a> {
    fn from(p: &'a Problem) -> Self {
        Row {
            severity: p.severity.as_str(),
            reason: p.code.as_str(),
            file: p.file.to_string_lossy(),
            document: p.document,
            line: p.line,
            object: p.object.as_ref().map(|o| Object { kind: &o.kind, namespace: &o.namespace, name: &o.name }),
            path: p.path.to_string(),
            message: &p.message,
        }
    }
}

/// All is good.
pub const OK: u8 = 0;
/// The manifests have problems.
pub const PROBLEMS: u8 = 1;
/// The command cannot do what it was asked for.
pub const USAGE: u8 = 2;

/// Runs a subcommand and returns the exit code.
///
/// # Errors
/// When `out` or `err` cannot be written.
pub fn run(command: &PolicyCommand, input: &mut dyn Read, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    match command {
        PolicyCommand::Match { pattern, name } => matches(pattern, name, out, err),
        PolicyCommand::Check(manifests) => check(manifests, false, input, out, err),
        PolicyCommand::Lint(manifests) => check(manifests, true, input, out, err),
    }
}

fn matches(pattern: &str, name: &str, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    let pattern = match Pattern::parse(pattern) {
        Ok(p) => p,
        Err(e) => {
            writeln!(err, "`{}` is not a valid pattern: {e}", tidegate_api::printable(pattern))?;
            return Ok(USAGE);
        }
    };
    let name = match Name::from_user(name) {
        Ok(n) => n,
        Err(e) => {
            writeln!(out, "no")?;
            writeln!(err, "`{}` is not a valid name: {e}", tidegate_api::printable(name))?;
            return Ok(USAGE);
        }
    };
    writeln!(out, "{}", if pattern.matches(name.as_str()) { "match" } else { "no" })?;
    Ok(OK)
}

fn check(
    manifests: &Manifests,
    lint: bool,
    input: &mut dyn Read,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<u8> {
    let (mut found, mut unreadable) = (Vec::new(), Vec::new());
    for path in &manifests.paths {
        let checked = match path.to_str() {
            Some("-") => tidegate_api::check_input("-", input),
            _ => tidegate_api::check(path),
        };
        match checked {
            Ok(problems) => found.extend(problems),
            Err(e) => unreadable.push(format!("cannot read {}: {e}", path.display())),
        }
    }
    let count = |of: fn(Severity) -> bool| found.iter().filter(|p| of(p.severity)).count();
    let problems = count(|s| matches!(s, Severity::Error | Severity::Refused));
    let warnings = count(|s| s == Severity::Warning);
    match manifests.output {
        Output::Text => {
            for p in &found {
                writeln!(out, "{}: {p}", p.severity.as_str())?;
            }
            for why in &unreadable {
                writeln!(err, "{why}")?;
            }
            if problems + warnings > 0 {
                writeln!(err, "problems: {problems}, warnings: {warnings}")?;
            }
        }
        Output::Json => {
            let rows: Vec<Row> = found.iter().map(Row::from).collect();
            serde_json::to_writer_pretty(&mut *out, &json!({"problems": rows, "unreadable": unreadable}))?;
            writeln!(out)?;
        }
    }
    Ok(if !unreadable.is_empty() {
        USAGE
    } else if problems > 0 || lint && warnings > 0 {
        PROBLEMS
    } else {
        OK
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: PolicyCommand,
    }

    fn go(args: &[&str]) -> (u8, String, String) {
        go_with(args, "")
    }

    fn go_with(args: &[&str], input: &str) -> (u8, String, String) {
        let cli = Cli::try_parse_from([&["policy"], args].concat()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run(&cli.command, &mut input.as_bytes(), &mut out, &mut err).unwrap();
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn match_says_match_or_no_and_why_it_cannot() {
        assert_eq!(go(&["match", "**.example.com", "a.b.Example.com."]), (0, "match\n".into(), String::new()));
        assert_eq!(go(&["match", "**.example.com", "example.com"]), (0, "no\n".into(), String::new()));
        assert_eq!(go(&["match", "-a*.example.com", "-ab.example.com"]).1, "match\n");
        let (code, out, err) = go(&["match", "a..b", "a.example"]);
        assert_eq!((code, out.as_str()), (2, ""));
        assert_eq!(err, "`a..b` is not a valid pattern: the pattern has an empty label\n");
        let (code, out, err) = go(&["match", "*", "ex@mple.com"]);
        assert_eq!((code, out.as_str()), (2, "no\n"));
        assert!(err.starts_with("`ex@mple.com` is not a valid name: "), "{err}");
    }

    #[test]
    fn check_has_three_exit_codes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        let p = path.to_str().unwrap();
        let namespace = |allow: &str| {
            format!(
                "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  annotations:\n    tidegate.dev/allow: '{allow}'\n"
            )
        };
        std::fs::write(&path, namespace("api.example.com")).unwrap();
        assert_eq!(go(&["check", "-f", p]), (0, String::new(), String::new()));
        std::fs::write(&path, namespace("api.example.com:80")).unwrap();
        let (code, out, err) = go(&["check", "-f", p]);
        assert_eq!((code, err.as_str()), (0, "problems: 0, warnings: 1\n"));
        assert!(out.starts_with(&format!("warning: {p}:6: document 1: Namespace shop: ")), "{out}");
        std::fs::write(&path, namespace("api.example.com:x")).unwrap();
        let (code, out, _) = go(&["check", "-f", dir.path().to_str().unwrap()]);
        assert_eq!(code, 1);
        assert_eq!(
            out,
            format!(
                "refused: {p}:6: document 1: Namespace shop: metadata.annotations[tidegate.dev/allow][0]: \
                 `api.example.com:x`: `x` is not a port (1 to 65535)\n"
            )
        );
        let (code, out, err) = go(&["check", "-f", "/nonexistent/x.yaml", "-f", p]);
        assert_eq!(code, 2, "what cannot be read counts more than what is wrong");
        assert!(out.starts_with("refused: ") && err.starts_with("cannot read /nonexistent/x.yaml: "), "{out}{err}");
        assert!(Cli::try_parse_from(["policy", "check"]).is_err());
    }

    const BROAD: &str = "apiVersion: tidegate.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: a, namespace: shop}\nspec:\n  \
        podSelector: {}\n  egress: [{toFQDNs: [{matchPattern: '*x.com'}, {matchPattern: '*.co.uk'}, {matchPattern: '*'}], toPorts: [{protocol: TCP, port: 443}]}]\n";

    #[test]
    fn lint_lets_warnings_fail() {
        let (code, out, err) = go_with(&["check", "-f", "-"], BROAD);
        assert_eq!((code, err.as_str()), (0, "problems: 0, warnings: 3\n"), "{out}");
        assert!(out.lines().all(|l| l.starts_with("warning: -:")), "{out}");
        let (code, again, _) = go_with(&["lint", "-f", "-"], BROAD);
        assert_eq!((code, again), (1, out));
        let good =
            BROAD.replace("'*x.com'", "'*.x.com'").replace("'*.co.uk'", "'*.x.co.uk'").replace("'*'", "'a.*.x.com'");
        assert_eq!(go_with(&["lint", "-f", "-"], &good), (0, String::new(), String::new()));
    }

    #[test]
    fn a_grant_that_a_tenant_can_take_is_a_warning() {
        let text = "apiVersion: tidegate.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {name: a}\nspec:\n  tier: Admin\n  priority: 1\n  \
            subject: {namespaceSelector: {}, podSelector: {matchLabels: {egress: 'yes'}}}\n  egress: [{action: Accept, toCIDRs: [{cidr: 203.0.113.0/24}], \
            toPorts: [{protocol: TCP, port: 443}]}]\n";
        let (code, out, _) = go_with(&["lint", "-f", "-", "-o", "json"], text);
        let all: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, &all["problems"][0]["reason"]), (1, &json!("TenantLabel")), "{out}");
    }

    #[test]
    fn json_says_what_text_says() {
        let bad = BROAD.replace("podSelector: {}", "podSelctor: {}");
        let (code, text, _) = go_with(&["check", "-f", "-"], &bad);
        let (same, out, err) = go_with(&["check", "-f", "-", "-f", "/nonexistent", "--output", "json"], &bad);
        assert_eq!((code, same, err.as_str()), (1, 2, ""));
        let all: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert!(all["unreadable"][0].as_str().unwrap().starts_with("cannot read /nonexistent: "));
        let rows = all["problems"].as_array().unwrap();
        assert_eq!(rows.len(), text.lines().count());
        let first = rows.iter().find(|r| r["reason"] == "UnknownField").unwrap();
        assert_eq!(first["severity"], "error");
        assert_eq!(first["object"], json!({"kind": "EgressPolicy", "namespace": "shop", "name": "a"}));
        assert!(first["path"].as_str().unwrap().contains("podSelctor") && first["line"].is_u64(), "{first}");
        assert!(go_with(&["check", "-f", "-"], "\u{0}").0 != 0);
    }

    #[test]
    fn every_example_in_the_documentation_is_good() {
        let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples");
        let (code, out, _) = go(&["check", "-f", examples]);
        assert_eq!(code, 0, "{out}");
        assert!(std::fs::read_dir(examples).unwrap().count() >= 7);
    }
}
