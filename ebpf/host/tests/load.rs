//! Loading into the real kernel: layouts, adoption, the verifier's cost.

mod common;

use common::Fixture;
use tidegate_ebpf::{Error, Options, Role};

#[test]
fn both_roles_load_and_stay_cheap_to_verify() {
    for role in [Role::Node, Role::Gateway] {
        let fixture = Fixture::new(role);
        for (program, instructions) in fixture.path().verified_instructions().unwrap() {
            println!("{:16} {instructions}", program.name());
            // The kernel's limit is a million.
            assert!(
                instructions > 0 && instructions < 150_000,
                "{}: {instructions}",
                program.name()
            );
        }
    }
}

#[test]
fn one_process_at_a_time() {
    let fixture = Fixture::new(Role::Node);
    let again = tidegate_ebpf::Datapath::load(&fixture.options);
    assert!(matches!(again, Err(Error::Busy(_))));
}

#[test]
fn defaults_are_the_documented_ones() {
    let o = Options::new(Role::Node, "/x");
    assert_eq!((o.tunnel_port, o.mark, o.mark_mask), (8475, 0x0020_0000, 0x00f0_0000));
}
