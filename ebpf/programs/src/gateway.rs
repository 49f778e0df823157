//! The gateway's own program, on its end of the pod-facing veth.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use tidegate_ebpf_common::{Action, Decision, Hook, Outcome, Packet, verdict};

use crate::skb::{OK, SHOT, Skb};
use crate::tables::{self, Kernel, count, get, report};

/// The verdict again, over the gateway's own maps: what it steers goes on with the carry and the
/// egress pair as its mark and the scope as its priority, everything else ends here.
#[classifier]
pub fn gateway_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let Some(config) = tables::config() else { return SHOT };
    let t = Kernel::<true> { config };
    let mut p = Packet::default();
    let mut d = Decision::default();
    let parsed = skb.parse(&mut p);
    verdict(parsed, &p, skb.ifindex(), &t, &mut d);
    if d.action != Action::Steer {
        count(Hook::GatewayIngress, Outcome::Drop, d.code);
        if d.report {
            report(&skb, Hook::GatewayIngress, Outcome::Drop, d.code, &p);
        }
        return SHOT;
    }
    count(Hook::GatewayIngress, Outcome::Steer, d.code);
    if d.report && d.via == tidegate_ebpf_common::layout::via::FORWARD {
        report(&skb, Hook::GatewayIngress, Outcome::Steer, d.code, &p);
    }
    let pair = get!(SCOPES, &d.scope).map_or(0, |s| s.pair & 0xff);
    skb.set_mark(u32::from(d.via) | pair << 8);
    skb.set_priority(d.scope);
    OK
}
