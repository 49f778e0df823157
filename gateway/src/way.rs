//! The thread that keeps the gateway plugged in: hands the namespace to the agent,
//! sets up the way out, has the kernel program attached, renews the lease.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tidegate_agent::events::repaired;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, sleep_until, timeout};

use crate::admin::{Guard, Readiness};
use crate::core::ToCore;
use crate::egress::live::{self, Forgotten};
use crate::egress::nft::{HeldPair, Rules};
use crate::egress::refused::{self, Refused};
use crate::egress::{TOWARDS_PODS, TOWARDS_UPLINK, Way, load_rules, loaded_rules};
use crate::handover::{Handover, RENEW};

/// How long after a failure the way out is set up again: other gateways wait for it.
const AGAIN: Duration = Duration::from_millis(50);

/// How long the core may take to attach its program. While that lasts the lease is renewed: not for longer than a core may hang.
const ATTACHED: Duration = Duration::from_secs(1);

/// MTU towards pods that is proposed to the agent: the largest, as only the agent knows its uplinks and takes what fits.
const TUNNEL_MTU: u16 = 9000;

/// What the thread needs.
pub struct Keeper {
    /// This gateway's name.
    pub gateway: String,
    /// Unix socket of the node's agent.
    pub socket: PathBuf,
    /// The pod's own device.
    pub device: String,
    /// Ports of the DNS sockets.
    pub dns_ports: Vec<u16>,
    /// Port of the relay's sockets.
    pub relay_port: u16,
    /// Idle seconds after which a flow is dead.
    pub flow_idle_seconds: u64,
    /// Forwarded flows that one scope may have at the same time.
    pub flows_per_scope: u32,
    /// Pairs that this gateway holds now. A failover waits for the thread: it is told of each change of them and of `lost`, and of
    /// `stop`.
    pub pairs: watch::Receiver<Vec<HeldPair>>,
    /// Told which of them have their rules in place, and their addresses held by the node's agent.
    pub applied: Arc<ArcSwap<Vec<HeldPair>>>,
    /// Egress addresses that went elsewhere: the kernel forgets their flows.
    pub lost: Arc<Mutex<BTreeSet<IpAddr>>>,
    /// Told of each flow that the rules refused.
    pub refused: Box<dyn Fn(Refused) + Send>,
    /// The core, which attaches the program.
    pub core: SyncSender<ToCore>,
    /// Not ready while it is not plugged in.
    pub readiness: Readiness,
    /// What other programs changed in our namespace is repaired at least so often.
    pub full_pass: Duration,
    /// Set when the gateway stops.
    pub stop: Arc<AtomicBool>,
}

impl Keeper {
    /// Runs until `stop` is set; whatever fails is tried again.
    pub fn run(self) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(r) => r,
            Err(error) => {
                tracing::error!(%error, "cannot make a runtime for the way out");
                return;
            }
        };
        let mut said = String::new();
        let mut waiting = self.readiness.guard("agent");
        while !self.stop.load(Ordering::Relaxed) {
            let result = runtime.block_on(self.keep(waiting));
            // Not ready from here on, until it is plugged in again.
            waiting = self.readiness.guard("agent");
            // Whoever holds the pairs must be able to hold their addresses. A core that has ended holds none.
            let _ = self.core.send(ToCore::Unplugged);
            self.applied.store(Arc::default());
            // The rules refuse on, and forget a flow after a while.
            self.tell();
            if let Err(error) = result {
                // The same failure every half second is one line.
                let text = format!("{error:#}");
                if text != said {
                    tracing::warn!(error = text, "not plugged in; trying again");
                    said = text;
                }
            }
            if !self.stop.load(Ordering::Relaxed) {
                std::thread::sleep(RENEW);
            }
        }
    }

    /// Closes the namespace before any packet can come: a new one may forward as the node does, and rules that an
    /// earlier process left may name other pairs by the same marks. Established flows keep their translation.
    ///
    /// # Errors
    /// nft is missing or refuses the rules.
    pub fn close(&self) -> Result<()> {
        load_rules(&Rules { pairs: Vec::new(), ..self.way(TUNNEL_MTU).rules }.render())
    }

    fn way(&self, mtu: u16) -> Way {
        Way {
            rules: Rules {
                device: self.device.clone(),
                mtu,
                dns_ports: self.dns_ports.clone(),
                relay_port: self.relay_port,
                pairs: self.pairs.borrow().clone(),
                flows_per_scope: self.flows_per_scope,
            },
            flow_idle_seconds: self.flow_idle_seconds,
        }
    }

    async fn keep(&self, waiting: Guard) -> Result<()> {
        let mut pairs = self.pairs.clone();
        let mut handover = Handover::connect(&self.socket, &self.gateway, TUNNEL_MTU, &self.way(TUNNEL_MTU))?;
        let mut way = self.way(handover.mtu);
        self.tell();
        self.holding(&mut handover, &way.addresses(), way.apply()).await?.context("cannot set up the way out")?;
        self.holding(&mut handover, &way.addresses(), self.attach()).await??;
        tracing::info!(mtu = handover.mtu, addresses = ?way.addresses(), "plugged in");
        let mut waiting = Some(waiting);
        let mut loaded = loaded_rules();
        let mut full = Instant::now() + self.full_pass;
        let mut look = Instant::now() + RENEW;
        // Held while the namespace is not as it should be: what should leave may not, or not from its address.
        let mut failing = None;
        // Whether there is something to say of what was just done, or more to do.
        let mut more = true;
        while !self.stop.load(Ordering::Relaxed) {
            // One that is ours no more is let go at once, one that is new is held once the rules are there.
            let (held, news) = (way.addresses(), handover.news());
            if !std::mem::take(&mut more) {
                let pause = async {
                    tokio::select! {
                        () = news.notified() => {}
                        () = told(&mut pairs) => {}
                        () = sleep(if failing.is_some() { AGAIN } else { RENEW }) => {}
                    }
                };
                self.holding(&mut handover, &held, pause).await?;
            }
            let wanted = self.way(handover.mtu);
            // What is new does not wait for it, but for addresses that come back: what is dead must not go on with them.
            let back = || self.lost.lock().iter().any(|ip| wanted.addresses().contains(ip));
            if wanted == way || back() {
                more = self.holding(&mut handover, &held, self.forget(&held)).await?;
            }
            if wanted == way && handover.holds(&held) {
                drop(waiting.take());
                if **self.applied.load() != way.rules.pairs {
                    self.applied.store(Arc::new(way.rules.pairs.clone()));
                }
            }
            if look <= Instant::now() {
                look = Instant::now() + RENEW;
                self.tell();
                // Only the agent can make them again, and it does so for a new handover.
                for device in [TOWARDS_PODS, TOWARDS_UPLINK] {
                    if nix::net::if_::if_nametoindex(device).is_err() {
                        repaired("device", 1);
                        bail!("another program has removed the device {device}");
                    }
                }
            }
            let due = full <= Instant::now();
            if due {
                full = Instant::now() + self.full_pass;
            }
            let damaged = due && loaded_rules() != loaded;
            let result = if wanted != way || damaged {
                tracing::info!(addresses = ?wanted.addresses(), damaged, "setting up the way out anew");
                self.tell();
                self.holding(&mut handover, &held, wanted.apply()).await?
            } else if due {
                let repair = async { way.repair().await.and(self.attach().await) };
                self.holding(&mut handover, &held, repair).await?
            } else {
                continue;
            };
            match result {
                Ok(()) => {
                    if damaged || wanted != way {
                        loaded = loaded_rules();
                        repaired("table", usize::from(damaged));
                    }
                    way = wanted;
                    (failing, more) = (None, true);
                }
                Err(error) => {
                    failing.get_or_insert_with(|| self.readiness.guard("way"));
                    tracing::error!(error = format!("{error:#}"), "cannot set up the way out; trying again");
                    full = Instant::now() + RENEW;
                }
            }
        }
        Ok(())
    }

    /// Does `work` while the lease of `addresses` is renewed, but for those that are ours no more.
    async fn holding<T>(
        &self,
        handover: &mut Handover,
        addresses: &[IpAddr],
        work: impl Future<Output = T>,
    ) -> Result<T> {
        let (mut work, mut pairs) = (pin!(work), self.pairs.clone());
        loop {
            pairs.mark_unchanged();
            handover.hold(&addresses.iter().copied().filter(|ip| self.is_ours(*ip)).collect::<Vec<_>>()).await?;
            tokio::select! {
                biased;
                () = sleep_until(handover.due()) => {}
                () = told(&mut pairs) => {}
                answer = handover.answer() => answer?,
                done = &mut work => return Ok(done),
            }
        }
    }

    /// Tells what the rules refused since the last time; each load of the rules comes right after it.
    fn tell(&self) {
        if let Err(error) = refused::read(&self.refused) {
            // Another program took the table away: the full pass puts it back.
            tracing::debug!(%error, "what the rules refused cannot be read");
        }
    }

    /// Whether the address is of a pair that this gateway holds now.
    fn is_ours(&self, ip: IpAddr) -> bool {
        self.pairs.borrow().iter().any(|p| p.addresses().any(|o| o == ip))
    }

    /// Has the kernel forget flows of addresses that went elsewhere. A client does not know that they are dead: one that gave up, and
    /// uses its port again, would leave with the address of then. Those that are `held` still wait until they are let go; of those that
    /// came back before that, flows live. Says whether there are more than it could forget at once.
    async fn forget(&self, held: &[IpAddr]) -> bool {
        let mut lost = std::mem::take(&mut *self.lost.lock());
        if lost.is_empty() {
            return false;
        }
        let later =
            lost.extract_if(.., |ip| held.contains(ip)).filter(|ip| !self.is_ours(*ip)).collect::<BTreeSet<_>>();
        self.lost.lock().extend(later);
        if lost.is_empty() {
            return false;
        }
        let asked = lost.clone();
        let result = tokio::task::spawn_blocking(move || live::forget(&asked)).await;
        let result = result.unwrap_or_else(|died| Err(std::io::Error::other(died)));
        match &result {
            Ok(Forgotten { flows: 0, .. }) => {}
            Ok(Forgotten { flows, .. }) => {
                tracing::info!(flows, addresses = ?lost, "flows of addresses that went elsewhere are forgotten");
            }
            Err(error) => {
                tracing::warn!(%error, addresses = ?lost, "flows of addresses that went elsewhere stay for now")
            }
        }
        let more = result.as_ref().is_ok_and(|f| !f.all);
        if more || result.is_err() {
            self.lost.lock().extend(lost);
        }
        more
    }

    async fn attach(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.core.send(ToCore::Attach { reply }).context("the core has ended")?;
        match timeout(ATTACHED, answer).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => bail!("cannot attach the kernel program: {error}"),
            Ok(Err(_)) | Err(_) => bail!("the core does not answer"),
        }
    }
}

/// Waits for the next change; for ever, if nobody is there any more who could make one.
async fn told(pairs: &mut watch::Receiver<Vec<HeldPair>>) {
    if pairs.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
#[path = "way_tests.rs"]
mod tests;
