//! The client of every other gateway: one stream each way, over mutual TLS. What comes is checked here and handed to
//! the core; that nothing comes, or that nobody listens there any more, is for the core to judge.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tidegate_identity::{Source, connect};
use tidegate_proto::wire::PeerHello;
use tidegate_proto::wire::control_client::ControlClient;
use tidegate_proto::{MAX_MESSAGE, PeerMessage};
use tokio::sync::watch;

use crate::core::ToCore;

const CONNECT: Duration = Duration::from_secs(1);
/// A stream without a message for so long is dead: beats come every 200 ms.
const SILENCE: Duration = Duration::from_millis(1500);
/// Time between two tries. Peers are few, and a failover waits for the first word.
const AGAIN: Duration = Duration::from_millis(200);

/// Whether the other side's kernel said that no process listens. Who hangs, is overloaded or cannot be reached refuses nothing.
fn is_refused(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(tidegate_identity::Error::Connect(e)) if e.kind() == ErrorKind::ConnectionRefused)
}

/// A client of one gateway.
#[derive(Clone, Debug)]
pub struct Client {
    /// This gateway.
    pub name: String,
    /// The other one.
    pub peer: String,
    /// Its control endpoints, tried in turn; none: it is not one of the gateways any more.
    pub addresses: watch::Receiver<Vec<SocketAddr>>,
    /// This gateway's identity.
    pub identity: Source,
}

impl Client {
    /// Keeps the stream as long as the other one is a gateway, and after that until it breaks.
    pub async fn run(self, core: SyncSender<ToCore>) {
        let mut said = String::new();
        let (mut turn, mut refused) = (0, 0);
        loop {
            let all = self.addresses.borrow().clone();
            if all.is_empty() {
                return;
            }
            let mut spoke = false;
            let Err(error) = self.once(all[turn % all.len()], &core, &mut spoke).await;
            turn += usize::from(!spoke);
            refused = if is_refused(&error) { refused + 1 } else { 0 };
            if refused >= all.len() {
                // Said again with every try: one that a busy core has no room for is not missed.
                let _ = core.try_send(ToCore::PeerRefused { gateway: self.peer.clone() });
            }
            let text = format!("{error:#}");
            // The same failure again and again is one line.
            if spoke || text != said {
                tracing::warn!(peer = self.peer, error = text, "no stream from another gateway; trying again");
                said = text;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn once(
        &self,
        address: SocketAddr,
        core: &SyncSender<ToCore>,
        spoke: &mut bool,
    ) -> Result<std::convert::Infallible> {
        let own = self.identity.now()?;
        let connection = connect(address, &own, Some(&self.peer), CONNECT, |endpoint| endpoint).await?;
        let mut client = ControlClient::new(connection.channel).max_decoding_message_size(MAX_MESSAGE);
        let mut inbound = client.peer(PeerHello { gateway: self.name.clone() }).await?.into_inner();
        tracing::info!(peer = self.peer, "stream from another gateway is up");
        loop {
            let message =
                tokio::time::timeout(SILENCE, inbound.message()).await.context("nothing came for 1.5 s")??;
            let Some(message) = message else { bail!("it closed the stream") };
            let message = PeerMessage::try_from(message)?;
            *spoke = true;
            // A core that is too far behind loses facts of a peer; the stream's next snapshot has them.
            if core.try_send(ToCore::Peer { gateway: self.peer.clone(), message }).is_err() {
                bail!("this gateway is overloaded");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tidegate_identity::Error;

    use super::*;

    #[tokio::test]
    async fn only_a_kernel_that_refuses_says_that_nobody_listens() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let own = || anyhow::Error::from(Error::Slow(Duration::from_secs(1)));
        drop(listener);
        let refused = tokio::net::TcpStream::connect(address).await.unwrap_err();
        assert!(is_refused(&Error::Connect(refused).into()));
        for kind in [ErrorKind::ConnectionReset, ErrorKind::HostUnreachable, ErrorKind::InvalidData] {
            assert!(!is_refused(&Error::Connect(kind.into()).into()), "{kind}");
        }
        assert!(!is_refused(&own()) && !is_refused(&anyhow::anyhow!("it closed the stream")));
    }
}
