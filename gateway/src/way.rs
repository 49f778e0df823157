//! The thread that keeps the gateway plugged in: hands the namespace to the agent,
//! sets up the way out, has the kernel program attached, renews the lease.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use arc_swap::ArcSwap;
use crossbeam_channel::{Sender, bounded};
use tidegate_agent::events::repaired;

use crate::admin::{Guard, Readiness};
use crate::core::ToCore;
use crate::egress::nft::{HeldPair, Rules};
use crate::egress::refused::{self, Refused};
use crate::egress::{TOWARDS_PODS, TOWARDS_UPLINK, Way, load_rules, loaded_rules};
use crate::handover::{Handover, RENEW};

/// How often it is looked whether other pairs are ours: a failover waits for it.
const LOOK: Duration = Duration::from_millis(50);

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
    /// Pairs that this gateway holds now.
    pub pairs: Arc<ArcSwap<Vec<HeldPair>>>,
    /// Told which of them have their addresses and rules in place.
    pub applied: Arc<ArcSwap<Vec<HeldPair>>>,
    /// Told of each flow that the rules refused.
    pub refused: Box<dyn Fn(Refused) + Send>,
    /// The core, which attaches the program.
    pub core: Sender<ToCore>,
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
            std::thread::sleep(RENEW);
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
                pairs: self.pairs.load().as_ref().clone(),
                flows_per_scope: self.flows_per_scope,
            },
            flow_idle_seconds: self.flow_idle_seconds,
        }
    }

    async fn keep(&self, waiting: Guard) -> Result<()> {
        let mut handover = Handover::connect(&self.socket, &self.gateway, TUNNEL_MTU, &self.way(TUNNEL_MTU))?;
        let mut way = self.way(handover.mtu);
        self.tell();
        way.apply().await.context("cannot set up the way out")?;
        self.attach()?;
        self.applied.store(Arc::new(way.rules.pairs.clone()));
        tracing::info!(mtu = handover.mtu, addresses = ?way.addresses(), "plugged in");
        drop(waiting);
        let mut loaded = loaded_rules();
        let mut full = Instant::now() + self.full_pass;
        let mut renew = Instant::now() + RENEW;
        // Held while the namespace is not as it should be: what should leave may not, or not from its address.
        let mut failing = None;
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(LOOK).await;
            let wanted = self.way(handover.mtu);
            // The lease comes first: nothing that fails here may cost everybody's egress addresses. One that is ours no
            // more is let go at once, one that is new is held once the rules are there.
            if renew <= Instant::now() || wanted != way {
                renew = Instant::now() + RENEW;
                self.tell();
                let (ours, held) = (wanted.addresses(), way.addresses());
                handover.renew(&held.into_iter().filter(|a| ours.contains(a)).collect::<Vec<_>>())?;
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
                wanted.apply().await
            } else if due {
                way.repair().await.and_then(|()| self.attach())
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
                    handover.renew(&way.addresses())?;
                    self.applied.store(Arc::new(way.rules.pairs.clone()));
                    failing = None;
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

    /// Tells what the rules refused since the last time; each load of the rules comes right after it.
    fn tell(&self) {
        if let Err(error) = refused::read(&self.refused) {
            // Another program took the table away: the full pass puts it back.
            tracing::debug!(%error, "what the rules refused cannot be read");
        }
    }

    fn attach(&self) -> Result<()> {
        let (reply, answer) = bounded(1);
        self.core.send(ToCore::Attach { reply }).context("the core has ended")?;
        // Shorter than the lease, which is renewed by this thread.
        match answer.recv_timeout(Duration::from_secs(1)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => bail!("cannot attach the kernel program: {error}"),
            Err(_) => bail!("the core does not answer"),
        }
    }
}
