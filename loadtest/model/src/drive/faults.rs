//! Streams, time, and everything that can break.

use std::time::Duration;

use super::{Drive, OLD_FLOW, RESTLESS};
use crate::bytes::Bytes;
use crate::desired::Desired;
use crate::gateway::Gateway;
use crate::kernel::Kernel;
use crate::node::SILENCE;
use crate::objects::{GATEWAYS, NODES, START};

/// While something is new, time goes in such steps: gateways beat, decide and reconnect so often.
const STEP: u64 = 200;
/// How long a gateway that is told to end waits at most until others have its pairs.
const LEAVE: u64 = 4_000;
/// How long everything takes at most to be well again.
const WELL: u64 = 20_000;

impl Drive {
    /// Something with each gateway that does something.
    pub(super) fn each_up(&mut self, what: impl Fn(&mut Gateway, Duration)) {
        let now = self.time();
        for g in 0..GATEWAYS.len() {
            if let Some(gateway) = self.seats[g].up_mut() {
                what(gateway, now);
                self.done(g);
            }
        }
    }

    // --- streams ---

    pub(super) fn deliver_state(&mut self, node: usize, g: usize) -> bool {
        let Some(gateway) = self.seats[g].up_mut() else { return false };
        let Some(m) = gateway.next_state(NODES[node]) else { return false };
        self.tell(|| format!("{} takes a state of {}", NODES[node], GATEWAYS[g].0));
        let local = self.local(node);
        self.nodes[node].take_state(g, &m, &local);
        self.blank[node] &= !self.nodes[node].ready();
        true
    }

    pub(super) fn deliver_facts(&mut self, node: usize, g: usize) -> bool {
        let Some(gateway) = self.seats[g].up_mut() else { return false };
        let Some(m) = gateway.next_facts(NODES[node]) else { return false };
        self.tell(|| format!("{} takes facts of {}", NODES[node], GATEWAYS[g].0));
        let local = self.local(node);
        self.nodes[node].take_facts(g, &m, &local);
        true
    }

    pub(super) fn ack(&mut self, node: usize, g: usize) {
        let now = self.time();
        let (state, facts) = (self.nodes[node].state_applied(g), self.nodes[node].applied(g));
        let link = self.links[node][g];
        let Some(gateway) = self.seats[g].up_mut() else { return };
        if let Some((boot, seq)) = state.filter(|_| link.state) {
            gateway.state_ack(NODES[node], boot, seq, now);
        }
        if let Some((boot, seq)) = facts.filter(|_| link.facts) {
            gateway.ack(NODES[node], boot, seq, now);
        }
        self.done(g);
    }

    pub(super) fn cut(&mut self, node: usize, g: usize, b: &mut Bytes<'_>) {
        let which = b.below(3);
        if which != 0 {
            self.cut_facts(node, g);
        }
        if which != 1 {
            self.cut_state(node, g);
        }
    }

    /// A stream ends. A gateway that hangs notices when it goes on.
    fn cut_state(&mut self, node: usize, g: usize) {
        if !std::mem::take(&mut self.links[node][g].state) {
            return;
        }
        self.tell(|| format!("{} loses its State stream of {}", NODES[node], GATEWAYS[g].0));
        let (now, local) = (self.time(), self.local(node));
        if let Some(gateway) = self.seats[g].up_mut() {
            gateway.state_down(NODES[node], now);
        }
        self.nodes[node].state_away(g, &local);
        self.blank[node] &= !self.nodes[node].ready();
        self.done(g);
        self.restless = self.now + RESTLESS;
    }

    fn cut_facts(&mut self, node: usize, g: usize) {
        if !std::mem::take(&mut self.links[node][g].facts) {
            return;
        }
        self.tell(|| format!("{} loses its Facts stream of {}", NODES[node], GATEWAYS[g].0));
        let (now, local) = (self.time(), self.local(node));
        if let Some(gateway) = self.seats[g].up_mut() {
            gateway.facts_down(NODES[node], now);
        }
        self.nodes[node].facts_away(g, &local);
        self.done(g);
        self.restless = self.now + RESTLESS;
    }

    pub(super) fn up(&mut self, node: usize, g: usize) {
        let (now, agent) = (self.time(), self.nodes[node].agent);
        let link = &mut self.links[node][g];
        let Some(gateway) = self.seats[g].up_mut() else { return };
        if !std::mem::replace(&mut link.state, true) {
            gateway.state_up(NODES[node]);
        }
        if !std::mem::replace(&mut link.facts, true) {
            gateway.facts_up(NODES[node], agent, now);
            self.nodes[node].opened(g);
        }
        self.done(g);
    }

    /// Gateways that hear nothing of each other connect.
    fn connect_peers(&mut self) {
        let now = self.time();
        for (from, to) in pairs() {
            if self.seats[to].up().is_none() || self.apart.contains(&(from, to)) {
                continue;
            }
            if let Some(gateway) = self.seats[from].up_mut().filter(|g| !g.tells(GATEWAYS[to].0)) {
                gateway.peer_up(GATEWAYS[to].0, now);
                self.heard[from][to] = self.now;
            }
        }
    }

    fn deliver_peer(&mut self, from: usize, to: usize) -> bool {
        let now = self.time();
        if self.apart.contains(&(from, to)) || self.seats[to].up().is_none() {
            return false;
        }
        let Some(m) = self.seats[from].up_mut().and_then(|g| g.next_for(GATEWAYS[to].0)) else { return false };
        self.heard[from][to] = self.now;
        if let Some(gateway) = self.seats[to].up_mut() {
            gateway.peer(GATEWAYS[from].0, &m, now);
        }
        self.done(to);
        true
    }

    /// Gateways hear what others say.
    fn deliver_peers(&mut self) -> bool {
        let mut any = false;
        for (from, to) in pairs() {
            while self.deliver_peer(from, to) {
                any = true;
            }
        }
        any
    }

    /// What gateways learnt goes to the others, and some of it arrives.
    pub(super) fn talk(&mut self, b: &mut Bytes<'_>) {
        self.each_up(Gateway::spread);
        for (from, to) in pairs() {
            if !b.one_in(3) {
                while self.deliver_peer(from, to) {}
            }
        }
    }

    /// A gateway hears of edits late, or at last.
    pub(super) fn tidings(&mut self, g: usize, b: &mut Bytes<'_>) {
        self.seats[g].lags = b.one_in(2);
        if !self.seats[g].lags {
            // Of a flood only the last is compiled.
            let skip = if b.one_in(2) { self.seats[g].edits.len().saturating_sub(1) } else { 0 };
            self.seats[g].edits.drain(..skip);
            while self.hear_edit(g) {}
        } else if b.one_in(2) {
            self.hear_edit(g);
        }
    }

    // --- time ---

    /// Lets time pass, stopping where anything is due.
    pub(super) fn pass(&mut self, by: u64) {
        let end = self.now + by;
        self.tell(|| format!("{by} ms pass"));
        while self.now < end {
            let millis = |d: Duration| d.as_millis() as u64;
            let up = || self.seats.iter().filter_map(|s| s.up());
            let due = up().filter_map(Gateway::deadline).map(millis).min().unwrap_or(end);
            let change = up().filter_map(|g| g.world().next_change());
            let change = change.map(|c| ((c.0 - START) as u64 + 1_000_000) * 1000).min().unwrap_or(end);
            // What is on its way between gateways arrives soon or never: in it are lives, which go on meanwhile.
            let busy = self.now < self.restless || up().any(Gateway::has_for_peers);
            let next = if busy { due.min(self.now + STEP) } else { due };
            // What is due now is done in the next tenth of a second, so that time goes on.
            self.advance(next.min(change).max(self.now + 100).min(end));
        }
    }

    /// It is `to` now: everybody does what comes again and again.
    fn advance(&mut self, to: u64) {
        self.now = to;
        let now = self.time();
        self.nodes.iter_mut().for_each(|n| n.kernel.now = now);
        for g in 0..GATEWAYS.len() {
            if self.seats[g].up().is_some() {
                self.sweep(g);
            }
        }
        self.flows.retain(|f| f.since + OLD_FLOW > to);
        self.show_flows();
        self.each_up(Gateway::tick);
        self.each_up(|gateway, now| {
            gateway.spread(now);
            gateway.beat_peers();
        });
        self.connect_peers();
        self.deliver_peers();
        for (from, to) in pairs() {
            if self.now - self.heard[from][to] >= SILENCE.as_millis() as u64
                && let Some(gateway) = self.seats[from].up_mut()
            {
                gateway.peer_down(GATEWAYS[to].0);
            }
        }
        for (node, name) in NODES.into_iter().enumerate() {
            for g in 0..GATEWAYS.len() {
                let speaks = self.seats[g].up().is_some_and(|gateway| !gateway.has_facts_for(name));
                if self.links[node][g].facts && speaks {
                    self.nodes[node].sign(g);
                }
                if self.links[node][g].facts && self.nodes[node].stalled(g) {
                    self.cut_facts(node, g);
                    if self.seats[g].up().is_none() {
                        self.cut_state(node, g);
                    }
                }
            }
            self.say_seen(node);
        }
        let wall = self.wall();
        for g in 0..GATEWAYS.len() {
            let Some(gateway) = self.seats[g].up_mut() else { continue };
            let held = gateway.owners().into_values().filter(|(_, held)| *held).count();
            gateway.decide(now);
            let more = gateway.owners().into_values().filter(|(_, held)| *held).count();
            if more != held || !gateway.in_place() {
                self.restless = self.restless.max(to + RESTLESS);
            }
            self.stats.moves += more.saturating_sub(held) as u64;
            if let Some((objects, _)) = gateway.version.clone()
                && gateway.world().next_change().is_some_and(|c| c <= wall)
            {
                gateway.edit(&objects, wall, now);
                self.versions.push((objects, wall));
            }
            self.done(g);
            let seat = &self.seats[g];
            if let (Some(gateway), Some(since)) = (seat.up(), seat.leaving)
                && (gateway.left(now) || since + LEAVE <= to)
            {
                self.kill(g);
            }
        }
    }

    /// A node tells gateways what it sees.
    fn say_seen(&mut self, node: usize) {
        let (now, local) = (self.time(), self.local(node));
        let seen = self.nodes[node].listen(&local);
        self.blank[node] &= !self.nodes[node].ready();
        for g in 0..GATEWAYS.len() {
            if let Some(gateway) = self.seats[g].up_mut().filter(|_| self.links[node][g].facts) {
                gateway.seen(NODES[node], seen.clone(), now);
            }
            self.done(g);
        }
    }

    /// The ledger's sweep of what expired a day ago.
    fn sweep(&mut self, g: usize) {
        let now = self.now;
        self.end_facts(g, |_, f| f.expires + 24 * 3600 * 1000 <= now);
    }

    // --- faults ---

    pub(super) fn fault(&mut self, node: usize, g: usize, b: &mut Bytes<'_>) {
        self.restless = self.now + RESTLESS;
        match b.below(14) {
            0 | 1 => self.restart_agent(node),
            2 => self.reboot(node),
            3 | 4 => {
                // At once, so that it keeps what it held.
                self.kill(g);
                self.start(g, true);
            }
            5 | 6 => self.kill(g),
            7 => self.start(g, !b.one_in(3)),
            8 => {
                self.tell(|| format!("{} hangs", GATEWAYS[g].0));
                self.seats[g].hung.get_or_insert(self.now);
            }
            9 => self.go_on(g),
            10 => {
                let to = (g + 1 + b.below(2)) % GATEWAYS.len();
                self.tell(|| format!("{} does not hear {}", GATEWAYS[to].0, GATEWAYS[g].0));
                self.apart.insert((g, to));
            }
            11 => {
                self.tell(|| "gateways hear each other".into());
                self.apart.clear();
            }
            12 => {
                self.tell(|| format!("{} is told to end", GATEWAYS[g].0));
                if let Some(gateway) = self.seats[g].up_mut() {
                    gateway.leave();
                    let now = self.now;
                    self.seats[g].leaving.get_or_insert(now);
                }
            }
            _ => {
                let now = self.time();
                if let Some(gateway) = self.seats[g].up_mut() {
                    gateway.placing = Duration::from_millis(b.pick(&[0, 300, 1500]));
                    gateway.compact(now);
                }
            }
        }
    }

    /// A gateway's process starts, after its last one has ended.
    pub(super) fn start(&mut self, g: usize, journal: bool) {
        if self.seats[g].core.is_some() {
            return;
        }
        self.tell(|| format!("{} starts, {} journal", GATEWAYS[g].0, if journal { "with its" } else { "without a" }));
        let (now, wall) = (self.time(), self.wall());
        let seat = &mut self.seats[g];
        let (kernel, left) = seat.left.take().unwrap_or_else(|| (Kernel::new(now), Default::default()));
        seat.boot += 1;
        seat.edits.clear();
        let mut core = Gateway::start(g, seat.boot, now, kernel, if journal { left } else { Default::default() });
        core.edit(&self.objects, wall, now);
        seat.core = Some(core);
        self.versions.push((self.objects.clone(), wall));
        self.restless = self.now + RESTLESS;
        self.show_flows();
        self.done(g);
    }

    /// A gateway's process ends; its kernel goes on. Nobody hears of questions that waited.
    fn kill(&mut self, g: usize) {
        self.go_on(g);
        let Some(core) = self.seats[g].core.take() else { return };
        self.tell(|| format!("{} ends", GATEWAYS[g].0));
        self.seats[g].left = Some((core.kernel, core.journal));
        self.seats[g].leaving = None;
        self.asked.retain(|_, p| p.gateway != g);
        for node in 0..NODES.len() {
            self.cut_state(node, g);
            self.cut_facts(node, g);
        }
        for seat in &mut self.seats {
            if let Some(core) = &mut seat.core {
                core.peer_down(GATEWAYS[g].0);
            }
        }
        self.remember(g);
        self.end_facts(g, |_, _| true);
        self.restless = self.now + RESTLESS;
    }

    /// A gateway that hung goes on: first it does what was due long ago, then it sees which streams have ended.
    fn go_on(&mut self, g: usize) {
        if self.seats[g].hung.take().is_none() {
            return;
        }
        self.tell(|| format!("{} goes on", GATEWAYS[g].0));
        let now = self.time();
        self.sweep(g);
        let Some(gateway) = self.seats[g].up_mut() else { return };
        gateway.tick(now);
        gateway.decide(now);
        self.done(g);
        for (node, name) in NODES.into_iter().enumerate() {
            let link = self.links[node][g];
            let Some(gateway) = self.seats[g].up_mut() else { return };
            if !link.state {
                gateway.state_down(name, now);
            }
            if !link.facts {
                gateway.facts_down(name, now);
            }
            self.done(g);
        }
        self.restless = self.now + RESTLESS;
        if !self.seats[g].lags {
            while self.hear_edit(g) {}
        }
    }

    fn restart_agent(&mut self, node: usize) {
        self.tell(|| format!("the agent of {} restarts", NODES[node]));
        for g in 0..GATEWAYS.len() {
            self.cut_state(node, g);
            self.cut_facts(node, g);
            self.remember(g);
        }
        self.nodes[node].restart(false);
        self.restless = self.now + RESTLESS;
    }

    /// From now on a node may keep what a gateway knows now, and what is on its way.
    fn remember(&mut self, g: usize) {
        self.stale.extend(self.had.iter().map(|(k, at)| (k.clone(), *at)));
        self.stale.extend(self.seats[g].facts.iter().map(|(k, f)| (k.clone(), f.expires)));
    }

    fn reboot(&mut self, node: usize) {
        self.tell(|| format!("{} reboots", NODES[node]));
        self.restart_agent(node);
        self.nodes[node].restart(true);
        self.blank[node] = true;
        self.flows.retain(|f| f.node != NODES[node]);
        self.show_flows();
    }

    // --- all is well ---

    /// Everybody runs and hears everybody, and everything is delivered and acked.
    fn deliver_all(&mut self) {
        self.connect_peers();
        for node in 0..NODES.len() {
            (0..GATEWAYS.len()).for_each(|g| self.up(node, g));
        }
        loop {
            let mut any = false;
            for node in 0..NODES.len() {
                for g in 0..GATEWAYS.len() {
                    while self.deliver_facts(node, g) | self.deliver_state(node, g) {
                        any = true;
                    }
                    // An ack may bring more.
                    self.ack(node, g);
                }
            }
            self.each_up(Gateway::spread);
            any |= self.deliver_peers();
            if !any {
                (0..NODES.len()).for_each(|node| self.say_seen(node));
                if !self.seats.iter().filter_map(|s| s.up()).any(|g| NODES.iter().any(|n| g.has_facts_for(n))) {
                    break;
                }
            }
        }
    }

    /// Whether every pair has one holder, whom all follow.
    fn is_well(&self) -> bool {
        let all: Option<Vec<&Gateway>> = self.seats.iter().map(|s| s.up()).collect();
        let Some(all) = all else { return false };
        if all.iter().any(|g| g.version.is_none() || !g.in_place()) || self.nodes.iter().any(|n| !n.is_well()) {
            return false;
        }
        let owners: Vec<_> = all.iter().map(|g| g.owners()).collect();
        for (pair, (known, _)) in &owners[0] {
            let Some(known) = known else { return false };
            let views = || owners.iter().filter_map(|o| o.get(pair));
            let holders = owners.iter().zip(&all).filter(|(o, _)| o.get(pair).is_some_and(|(_, held)| *held));
            let holders: Vec<&str> = holders.map(|(_, g)| g.name).collect();
            if holders != [known.owner.as_str()] || views().any(|(k, _)| k.as_ref() != Some(known)) {
                return false;
            }
        }
        let world = all[0].world();
        let follows = |key, s: &tidegate_policy::state::Scope| {
            let Some(pair) = world.scope(key).and_then(|s| Desired::pair(s)) else { return true };
            let known = owners[0].get(&pair).and_then(|(k, _)| k.as_ref());
            known.is_some_and(|k| k.owner == s.owner && k.epoch == s.epoch)
        };
        self.nodes.iter().all(|n| n.merged().scopes.iter().all(|(k, s)| follows(*k, s)))
    }

    /// Ends all faults, delivers and acks everything, then compares everything.
    pub(super) fn settle(&mut self) {
        self.tell(|| "everything is delivered".into());
        self.apart.clear();
        for g in 0..GATEWAYS.len() {
            self.seats[g].lags = false;
            if self.seats[g].leaving.is_some() {
                self.kill(g);
            }
            self.go_on(g);
            self.start(g, true);
            while self.hear_edit(g) {}
        }
        self.deliver_all();
        let until = self.now + WELL;
        while !self.is_well() {
            assert!(self.now < until, "after {WELL} ms without a fault not all is well: {}", self.state());
            self.advance(self.now + STEP);
            self.deliver_all();
        }
        self.versions = vec![(self.objects.clone(), self.wall())];
        self.had.clear();
        assert!(self.asked.is_empty(), "everything is acked, and {} replies wait", self.asked.len());
        self.check();
        self.each_up(|gateway, _| gateway.full_pass());
        self.deliver_all();
        self.check_nodes();
    }

    /// Who holds and follows whom.
    fn state(&self) -> String {
        let seat = |s: &super::Seat| s.up().map(|g| (g.name, g.version.is_some(), g.in_place(), g.owners()));
        let gateways: Vec<_> = self.seats.iter().map(seat).collect();
        let nodes: Vec<_> = self.nodes.iter().map(|n| (n.name, n.is_well(), &n.merged().scopes)).collect();
        format!("{gateways:?} {nodes:?}")
    }

    /// Everything ends, and nothing is left.
    pub(super) fn end(&mut self) {
        self.settle();
        self.flows.clear();
        self.show_flows();
        self.pass(2 * 3600 * 1000);
        self.settle();
        self.pass(25 * 3600 * 1000);
        self.settle();
        for seat in &self.seats {
            assert!(seat.facts.is_empty(), "facts outlive a day without flows");
            let Some(core) = &seat.core else { panic!("a gateway is gone") };
            let c = core.ledger().counts();
            assert_eq!((c.scopes, c.names, c.addresses, c.facts, c.held), (0, 0, 0, 0, 0), "{c:?}");
            assert_eq!(core.kernel.held().count(), 0);
        }
        assert!(self.nodes.iter().all(|n| n.kernel.held().next().is_none()), "a node's kernel holds a fact");
    }
}

/// Each gateway with each other one.
fn pairs() -> impl Iterator<Item = (usize, usize)> {
    (0..GATEWAYS.len()).flat_map(|from| (0..GATEWAYS.len()).map(move |to| (from, to))).filter(|(from, to)| from != to)
}
