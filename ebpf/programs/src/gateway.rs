//! The gateway's own program, on its end of the pod-facing veth.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use tidegate_ebpf_common::layout::via;
use tidegate_ebpf_common::{Action, Code, Decision, Hook, Outcome, Packet, verdict};

use crate::skb::{OK, SHOT, Skb};
use crate::tables::{self, Kernel, count, dropped, get, report};

/// The verdict again, over the gateway's own maps: what it steers goes on with the carry and the
/// egress pair as its mark and the scope as its priority, everything else ends here.
#[classifier]
pub fn gateway_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let Some(config) = tables::config() else { return SHOT };
    let t = Kernel::<true>::new(config);
    let mut p = Packet::default();
    let mut d = Decision::default();
    // Between virtual machines, and over a veth, it may come as the pod sent it.
    match skb.parse_lasting(&mut p) {
        Some(parsed) => verdict(parsed, &p, skb.ifindex(), &t, &mut d),
        None => d.drop(Code::Checksum),
    }
    if d.action != Action::Steer {
        count(Hook::GatewayIngress, Outcome::Drop, d.code);
        if d.report {
            report(&skb, Hook::GatewayIngress, Outcome::Drop, d.code, &p);
        }
        return SHOT;
    }
    let pair = match get!(SCOPES, &d.scope) {
        Some(scope) => scope.pair & 0xff,
        None if d.via == via::DNS || d.via == via::BLOCK => 0,
        // Without its pair it would leave with another source than its pool's.
        None => return dropped(&skb, Hook::GatewayIngress, Code::NoGateway, &p),
    };
    count(Hook::GatewayIngress, Outcome::Steer, d.code);
    if d.report && d.via == via::FORWARD {
        report(&skb, Hook::GatewayIngress, Outcome::Steer, d.code, &p);
    }
    skb.set_mark(u32::from(d.via) | pair << 8);
    skb.set_priority(d.scope);
    OK
}
