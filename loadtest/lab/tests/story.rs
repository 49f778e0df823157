//! The fourteen points, held by the whole product: real kernel programs, processes, packets and clients.
//!
//! One lab serves all tests of this file, one after another; a guard process takes it down when this one ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use tidegate_lab::{Lab, Options, Scenario, story};

static LAB: Mutex<Option<Lab>> = Mutex::new(None);

/// Holds one point.
fn hold(point: u8) {
    let mut shared: MutexGuard<'static, Option<Lab>> = LAB.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = shared.get_or_insert_with(|| {
        let scenario = Scenario::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/demo.yaml").as_ref()).unwrap();
        let options = Options { lab: Some(env!("CARGO_BIN_EXE_tidegate-lab").into()), ..Options::unique("story") };
        Lab::up_guarded(scenario, &options).unwrap()
    });
    story::hold(lab, point).unwrap();
}

macro_rules! points {
    ($($name:ident = $point:literal,)*) => { $(
        #[test]
        fn $name() {
            hold($point);
        }
    )* };
}

points! {
    p01_allowed_name_at_first_try = 1,
    p02_denied_names = 2,
    p03_never_resolved = 3,
    p04_resolved_by_another_namespace = 4,
    p05_other_sni = 5,
    p06_port_without_rule = 6,
    p07_forwarded_tcp_and_udp = 7,
    p08_policies = 8,
    p09_audit_and_flip = 9,
    p10_untouched_and_guarded = 10,
    p11_in_cluster_and_inbound = 11,
    p12_expiry_and_edits = 12,
    p13_ways_round = 13,
    p14_two_gateways = 14,
}
