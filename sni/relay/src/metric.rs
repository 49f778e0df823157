//! Metrics of the relay. Names are part of the published interface.

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use tidegate_policy::Reason;

/// Connections decided, by `reason`.
pub const CONNECTIONS: &str = "tidegate_relay_connections_total";
/// Bytes moved, by `direction`: `sent` by pods, `received` by pods.
pub const BYTES: &str = "tidegate_relay_bytes_total";
/// Seconds from accept to a complete hello.
pub const HELLO: &str = "tidegate_relay_hello_seconds";
/// Connections that live now, those without a hello included.
pub const LIVE: &str = "tidegate_relay_live";
/// Relayed connections that ended, by `end`: `clean`, `reset`, `idle`, `cut` (revoked or drained), `refused` (second hello).
pub const ENDS: &str = "tidegate_relay_ends_total";
/// Accepts that failed because of a local limit.
pub const ACCEPT_ERRORS: &str = "tidegate_relay_accept_errors_total";
/// Reads that wanted a pipe and went through the buffer instead.
pub const NO_PIPE: &str = "tidegate_relay_no_pipe_total";

/// Handles, made once per relay; the recorder must be installed before.
pub(crate) struct Metrics {
    connections: Vec<Counter>,
    pub sent: Counter,
    pub received: Counter,
    pub hello: Histogram,
    pub live: Gauge,
    pub clean: Counter,
    pub reset: Counter,
    pub idle: Counter,
    pub cut: Counter,
    pub refused: Counter,
    pub accept_errors: Counter,
    pub no_pipe: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        describe_counter!(CONNECTIONS, "Connections to the TLS relay by reason of the decision");
        describe_counter!(BYTES, "Bytes relayed by direction, seen from the pod");
        describe_histogram!(HELLO, metrics::Unit::Seconds, "Time from accept to a complete ClientHello");
        describe_gauge!(LIVE, "Connections of the TLS relay that live now");
        describe_counter!(ENDS, "Relayed connections that ended by kind of end");
        describe_counter!(ACCEPT_ERRORS, "Accepts that failed because of a local limit");
        describe_counter!(NO_PIPE, "Reads that went through the buffer because no pipe could be had");
        Self {
            connections: Reason::ALL.iter().map(|r| counter!(CONNECTIONS, "reason" => r.as_str())).collect(),
            sent: counter!(BYTES, "direction" => "sent"),
            received: counter!(BYTES, "direction" => "received"),
            hello: histogram!(HELLO),
            live: gauge!(LIVE),
            clean: counter!(ENDS, "end" => "clean"),
            reset: counter!(ENDS, "end" => "reset"),
            idle: counter!(ENDS, "end" => "idle"),
            cut: counter!(ENDS, "end" => "cut"),
            refused: counter!(ENDS, "end" => "refused"),
            accept_errors: counter!(ACCEPT_ERRORS),
            no_pipe: counter!(NO_PIPE),
        }
    }

    pub fn decided(&self, reason: Reason) {
        // `Reason::ALL` holds every reason at its own discriminant.
        self.connections[reason as usize].increment(1);
    }
}
