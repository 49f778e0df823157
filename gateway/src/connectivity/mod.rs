//! `tidegate connectivity-test`: tries, in a cluster that is in use, what Tidegate promises.
//!
//! Two namespaces of its own have a pod on each node: one with a policy, one that nothing selects. Both try the same, and
//! what the second one reaches shows that a denial of the first one is Tidegate's.

mod checks;
mod play;
mod report;
mod stage;

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tidegate_kubernetes::Connection;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::overview::{self, Api, Format};
use checks::Outside;
use report::Row;
use stage::{Side, Stage};

const GROUP: &str = "/apis/tidegate.dev/v1alpha1";
/// Names of Kubernetes are this long at most.
const NAME: usize = 63;

/// What is tried, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// A name outside with HTTPS, which the test's policy allows.
    #[arg(long, default_value = "kubernetes.io")]
    pub allow: String,
    /// Another one with HTTPS at other addresses, which the policy does not allow.
    #[arg(long, default_value = "example.com")]
    pub deny: String,
    /// An https URL that answers with the address that it saw, as text or somewhere in JSON: the egress IP is the same from every node.
    #[arg(long)]
    pub egress_url: Option<String>,
    /// An address that traffic may leave with; may be repeated. Those of a static --pool count without it.
    #[arg(long, requires = "egress_url")]
    pub egress_ip: Vec<IpAddr>,
    /// The EgressPool that the test's pods leave with. It must admit the test's namespace: see --label.
    #[arg(long)]
    pub pool: Option<String>,
    /// A label for the test's namespaces (KEY=VALUE), such as a pool or an admission policy wants; may be repeated.
    #[arg(long)]
    pub label: Vec<String>,
    /// Nodes to be tried from; may be repeated. Absent: --nodes of them.
    #[arg(long)]
    pub node: Vec<String>,
    /// How many of the nodes that are ready, 1 to 100.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub nodes: u16,
    /// The namespace that is made for the test; a second one has `-free` behind that.
    #[arg(long, default_value = "tidegate-connectivity-test")]
    pub test_namespace: String,
    /// What the test's pods run, with `tidegate` and `sleep` in it. Absent: the image of the agents.
    #[arg(long)]
    pub image: Option<String>,
    /// A Secret of the test's namespace to fetch the image with, if something makes it there; may be repeated.
    #[arg(long)]
    pub pull_secret: Vec<String>,
    /// How long all of it may take, in seconds, 10 to 3600; cleaning up comes on top.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..=3600))]
    pub timeout: u64,
    /// Only remove what a run that was killed left behind.
    #[arg(long)]
    pub cleanup: bool,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// The test's namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    managed: String,
    free: String,
}

impl Names {
    fn new(name: &str) -> Result<Self> {
        let free = format!("{name}-free");
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let good = free.len() <= NAME && name.chars().all(plain) && !name.starts_with('-') && !name.is_empty();
        ensure!(good, "--test-namespace {name:?} is no name of a namespace, or longer than {} octets", NAME - 5);
        Ok(Self { managed: name.to_owned(), free })
    }

    fn both(&self) -> [&str; 2] {
        [&self.managed, &self.free]
    }

    fn of(&self, side: Side) -> &str {
        match side {
            Side::Managed => &self.managed,
            Side::Free => &self.free,
        }
    }
}

impl Options {
    fn outside(&self) -> Result<Outside> {
        for name in [&self.allow, &self.deny] {
            tidegate_policy::Name::parse(name).map_err(|e| anyhow::anyhow!("{name:?} is no name: {e}"))?;
        }
        ensure!(!self.allow.eq_ignore_ascii_case(&self.deny), "--allow and --deny are the same name");
        let echo = self.egress_url.as_deref().map(url).transpose()?;
        if let Some((host, _)) = &echo {
            ensure!(!host.eq_ignore_ascii_case(&self.deny), "the name of --egress-url is the one of --deny");
        }
        Ok(Outside { allowed: self.allow.clone(), denied: self.deny.clone(), echo })
    }

    fn labels(&self) -> Result<Vec<(&str, &str)>> {
        let split = |l| str::split_once(l, '=').with_context(|| format!("--label {l} is not KEY=VALUE"));
        self.label.iter().map(|l| split(l.as_str())).collect()
    }
}

/// Host and path of an https URL.
fn url(text: &str) -> Result<(String, String)> {
    let rest =
        text.strip_prefix("https://").with_context(|| format!("--egress-url {text} does not begin with https://"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = host.strip_suffix(":443").unwrap_or(host);
    tidegate_policy::Name::parse(host)
        .map_err(|e| anyhow::anyhow!("--egress-url {text}: {host:?} is no name ({e}), and the port is always 443"))?;
    ensure!(!path.chars().any(|c| c.is_control() || c == ' '), "--egress-url {text:?} has blanks");
    Ok((host.to_owned(), format!("/{path}")))
}

/// What ends the test before its time.
struct Stop([Signal; 3]);

impl Stop {
    fn new() -> Result<Self> {
        let of = |kind| signal(kind).context("cannot wait for signals");
        Ok(Self([of(SignalKind::interrupt())?, of(SignalKind::terminate())?, of(SignalKind::hangup())?]))
    }

    async fn wait(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! { _ = a.recv() => {}, _ = b.recv() => {}, _ = c.recv() => {} }
    }
}

/// Runs the test. Exit code 0: every promise is kept; 1: one is not.
///
/// # Errors
/// It could not be run: the caller's exit code is 2.
pub fn run(api: Api, options: &Options) -> Result<u8> {
    let (names, outside) = (Names::new(&options.test_namespace)?, options.outside()?);
    options.labels()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot make a runtime")?;
    runtime.block_on(async {
        let connection = overview::connect(api).await?;
        let mut stop = Stop::new()?;
        let left = tokio::select! {
            left = stage::sweep(&connection, &names) => left?,
            () = stop.wait() => bail!("interrupted; nothing was begun"),
        };
        for name in left {
            eprintln!("removed the namespace {name}, which an earlier run had left behind");
        }
        if options.cleanup {
            return Ok(0);
        }
        test(&connection, options, names, &outside, &mut stop).await
    })
}

async fn test(
    connection: &Connection,
    options: &Options,
    names: Names,
    outside: &Outside,
    stop: &mut Stop,
) -> Result<u8> {
    let mut stage = Stage::new(connection, names.clone());
    let mut rows = Vec::new();
    let ended = tokio::select! {
        ended = tokio::time::timeout(Duration::from_secs(options.timeout), play::play(connection, &mut stage, options, outside, &mut rows)) => {
            ended.unwrap_or_else(|_| Err(anyhow::anyhow!("not done within {} s (--timeout)", options.timeout)))
        }
        () = stop.wait() => Err(anyhow::anyhow!("interrupted")),
    };
    print(options.output, &rows, ended.as_ref().err())?;
    eprintln!("removing the namespaces {} and {}", names.managed, names.free);
    let left = || format!("{} and {} may be left: run it again with --cleanup", names.managed, names.free);
    let cleared = tokio::select! {
        cleared = stage.clear() => cleared.with_context(left),
        () = stop.wait() => Err(anyhow::anyhow!("interrupted again")).with_context(left),
    };
    // A promise that is broken says more than what came after it.
    if report::is_broken(&rows) {
        for error in [ended.err(), cleared.err()].into_iter().flatten() {
            eprintln!("tidegate: {error:#}");
        }
        return Ok(1);
    }
    if let (Err(_), Err(error)) = (&ended, &cleared) {
        eprintln!("tidegate: {error:#}");
    }
    ended.and(cleared).map(|()| 0)
}

fn print(format: Format, rows: &[Row], error: Option<&anyhow::Error>) -> Result<()> {
    match format {
        Format::Table if rows.is_empty() => {}
        Format::Table => print!("{}", report::render(rows)),
        Format::Json => {
            let kept = error.is_none() && !report::is_broken(rows);
            let error = error.map(|e| format!("{e:#}"));
            let all = serde_json::json!({"kept": kept, "error": error, "checks": rows});
            println!("{}", serde_json::to_string_pretty(&all)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_of_https() {
        let of = |text| url(text).ok();
        assert_eq!(of("https://echo.example.com"), Some(("echo.example.com".into(), "/".into())));
        assert_eq!(of("https://echo.example.com:443/ip?x"), Some(("echo.example.com".into(), "/ip?x".into())));
        for bad in ["http://echo.example.com/", "https://echo.example.com:8443/", "https:///x", "https://a.b/c d"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn namespaces_have_names() {
        assert_eq!(Names::new("test").unwrap().both(), ["test", "test-free"]);
        for bad in ["", "-x", "Test", "a/b", &"x".repeat(59)] {
            assert!(Names::new(bad).is_err(), "{bad}");
        }
    }
}
