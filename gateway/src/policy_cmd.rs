//! `tidegate policy`: tools for people who write policy. They need no cluster.

use std::io::{self, Write};
use std::path::PathBuf;

use tidegate_api::Severity;
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
    Check {
        /// A file, or a directory with *.yaml, *.yml and *.json files; may be given several times.
        #[arg(short = 'f', long = "filename", required = true)]
        paths: Vec<PathBuf>,
    },
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
pub fn run(command: &PolicyCommand, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    match command {
        PolicyCommand::Match { pattern, name } => matches(pattern, name, out, err),
        PolicyCommand::Check { paths } => check(paths, out, err),
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

fn check(paths: &[PathBuf], out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    let mut code = OK;
    let (mut problems, mut warnings) = (0usize, 0usize);
    for path in paths {
        let found = match tidegate_api::check(path) {
            Ok(found) => found,
            Err(e) => {
                writeln!(err, "cannot read {}: {e}", path.display())?;
                code = USAGE;
                continue;
            }
        };
        for p in found {
            writeln!(out, "{}: {p}", p.severity.as_str())?;
            match p.severity {
                Severity::Error | Severity::Refused => problems += 1,
                Severity::Warning => warnings += 1,
                Severity::Note => {}
            }
        }
    }
    if problems + warnings > 0 {
        writeln!(err, "problems: {problems}, warnings: {warnings}")?;
    }
    if code == OK && problems > 0 {
        code = PROBLEMS;
    }
    Ok(code)
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
        let cli = Cli::try_parse_from([&["policy"], args].concat()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run(&cli.command, &mut out, &mut err).unwrap();
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
}
