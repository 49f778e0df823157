//! What gateways are told of what this node sees.

use std::net::IpAddr;

use tidegate_policy::ScopeKey;
use tidegate_proto::{ScopeClaim, Seen};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Node, SEEN};

impl Node {
    /// What the kernel holds and no gateway that is heard stands by. While none is heard there is nobody to tell of it.
    fn orphans(&mut self) -> Vec<(ScopeKey, IpAddr)> {
        let heard = self.gateways.in_sync();
        if heard == 0 || !self.ready {
            return Vec::new();
        }
        let held = self.datapath.held_facts().map(|(scope, ip, until)| ((scope, ip), until.into()));
        self.orphans.find(held, |fact| self.told.stands(fact, heard)).to_vec()
    }

    /// Notices gateways that fell silent, and tells every gateway which ones this node sees.
    pub(super) fn listen(&mut self, told: &watch::Sender<Seen>) {
        self.stand_in();
        let spoke = |sign: Option<(Instant, bool)>| sign.is_some_and(|(at, _)| at.elapsed() < SEEN);
        let seen = Seen {
            gateways: self.gateways.iter().filter(|g| spoke(g.sign)).map(|g| g.name.to_string()).collect(),
            claims: self.merged.scopes.iter().map(|(k, s)| ScopeClaim { scope: *k, epoch: s.epoch }).collect(),
            orphans: self.orphans(),
        };
        told.send_if_modified(|old| {
            let new = *old != seen;
            if new {
                *old = seen;
            }
            new
        });
    }
}
