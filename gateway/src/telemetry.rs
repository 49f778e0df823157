//! Logs and metrics of the process.
//!
//! Logs go to standard error, since standard output may carry the audit log.
//! `TIDEGATE_LOG` filters them (as `info,tidegate_dns=debug`; default `info`) and
//! `TIDEGATE_LOG_FORMAT` is `text` (default) or `json`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// Environment variable with the filter of logs.
pub const LOG: &str = "TIDEGATE_LOG";
/// Environment variable with the form of logs.
pub const LOG_FORMAT: &str = "TIDEGATE_LOG_FORMAT";

/// Decisions by kind, verdict and reason; counted from the events that make the audit records.
pub const DECISIONS: &str = "tidegate_decisions_total";
/// Audit records that could not be written, by kind.
pub const AUDIT_LOST: &str = "tidegate_audit_lost_total";
/// Denials that statuses do not tell of, because there were too many.
pub const DENIALS_LOST: &str = "tidegate_denials_untold_total";
/// Time from a query to its reply, in seconds.
pub const DNS_SECONDS: &str = "tidegate_dns_seconds";
/// Time from a push of facts to the kernel's confirmation, in seconds.
pub const BARRIER_SECONDS: &str = "tidegate_barrier_seconds";
/// Journal files that were refused.
pub const JOURNAL_REFUSED: &str = "tidegate_journal_refused_total";
/// 1 while the journal cannot be written.
pub const JOURNAL_FAILING: &str = "tidegate_journal_failing";
/// Requests of nodes for certificates, by result.
pub const JOINS: &str = "tidegate_joins_total";
/// Always 1; its label is the version.
pub const BUILD_INFO: &str = "tidegate_build_info";

/// A stored answer takes microseconds, a resolver milliseconds to seconds.
const DNS_BUCKETS: &[f64] =
    &[25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// The barrier gives up after 200 ms by default.
const BARRIER_BUCKETS: &[f64] =
    &[250e-6, 500e-6, 1e-3, 2e-3, 4e-3, 8e-3, 15e-3, 30e-3, 60e-3, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0];
/// For every other `*_seconds`.
const SECONDS_BUCKETS: &[f64] =
    &[100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// How often histograms are folded, so that they stay small when nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

fn format(text: Option<&str>) -> Result<Format> {
    match text {
        None | Some("" | "text") => Ok(Format::Text),
        Some("json") => Ok(Format::Json),
        Some(other) => bail!("{LOG_FORMAT} is {other:?}; write text or json"),
    }
}

fn filter(text: Option<&str>) -> Result<EnvFilter> {
    let text = text.filter(|t| !t.is_empty()).unwrap_or("info");
    EnvFilter::try_new(text)
        .with_context(|| format!("{LOG} is {text:?}, which is not a filter such as info,tidegate_dns=debug"))
}

/// Sets up logs for the process. Once.
///
/// # Errors
/// When an environment variable has a value that is not known, or logs are set up already.
pub fn logs() -> Result<()> {
    let var = |name| std::env::var(name).ok();
    let filter = filter(var(LOG).as_deref())?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match format(var(LOG_FORMAT).as_deref())? {
        Format::Text => builder.with_ansi(false).try_init(),
        Format::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    };
    done.map_err(|e| anyhow::anyhow!("logs cannot be set up: {e}"))
}

fn builder() -> Result<PrometheusBuilder> {
    let full = |name: &str| Matcher::Full(name.to_owned());
    PrometheusBuilder::new()
        .set_buckets_for_metric(full(DNS_SECONDS), DNS_BUCKETS)
        .and_then(|b| b.set_buckets_for_metric(full(BARRIER_SECONDS), BARRIER_BUCKETS))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS_BUCKETS))
        .context("the buckets of histograms are not valid")
}

/// Describes the metrics of this package; others describe their own.
fn describe() {
    metrics::describe_counter!(DECISIONS, "Decisions by kind, verdict and reason");
    metrics::describe_counter!(JOINS, "Requests of nodes for certificates, by result");
    metrics::describe_counter!(AUDIT_LOST, "Audit records that could not be written, by kind");
    metrics::describe_counter!(
        DENIALS_LOST,
        "Denials that statuses and pod events do not tell of, because there were too many"
    );
    metrics::describe_histogram!(DNS_SECONDS, metrics::Unit::Seconds, "Time from a query to its reply");
    metrics::describe_histogram!(
        BARRIER_SECONDS,
        metrics::Unit::Seconds,
        "Time from a push of facts to the kernel's confirmation"
    );
    metrics::describe_counter!(JOURNAL_REFUSED, "Files of the journal that were damaged or not this gateway's");
    metrics::describe_gauge!(JOURNAL_FAILING, "1 while the journal cannot be written, else 0");
    metrics::describe_gauge!(BUILD_INFO, "Always 1; the label says the version");
    metrics::gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

/// Installs the metrics of the process, and keeps them folded. Once, before anything counts.
///
/// # Errors
/// When metrics are installed already, or the thread cannot be started.
pub fn install_metrics() -> Result<PrometheusHandle> {
    let handle = builder()?.install_recorder().context("metrics are installed already")?;
    describe();
    let upkeep = handle.clone();
    std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        })
        .context("the metrics thread cannot be started")?;
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_have_their_own_buckets() {
        let recorder = builder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            describe();
            metrics::histogram!(DNS_SECONDS).record(3e-5);
            metrics::histogram!(BARRIER_SECONDS).record(3e-5);
            metrics::histogram!("tidegate_other_seconds").record(20.0);
        });
        let text = handle.render();
        assert!(text.contains("tidegate_dns_seconds_bucket{le=\"0.000025\"} 0"), "{text}");
        assert!(text.contains("tidegate_dns_seconds_bucket{le=\"0.00005\"} 1"), "{text}");
        assert!(text.contains("tidegate_barrier_seconds_bucket{le=\"0.15\"} 1"), "{text}");
        assert!(text.contains("tidegate_other_seconds_bucket{le=\"30\"} 1"), "{text}");
        assert!(text.contains("# HELP tidegate_dns_seconds Time from a query to its reply"), "{text}");
        assert!(
            text.contains(&format!("tidegate_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))),
            "{text}"
        );
        assert!(!text.contains("quantile"), "no summaries: they cannot be added up over replicas");
    }

    #[test]
    fn settings_that_are_not_known_are_refused() {
        assert_eq!(format(None).unwrap(), Format::Text);
        assert_eq!(format(Some("json")).unwrap(), Format::Json);
        assert_eq!(format(Some("xml")).unwrap_err().to_string(), "TIDEGATE_LOG_FORMAT is \"xml\"; write text or json");
        assert!(filter(Some("info,tidegate_dns=debug")).is_ok());
        assert!(filter(Some("a=b=c")).unwrap_err().to_string().starts_with("TIDEGATE_LOG is \"a=b=c\""));
    }
}
