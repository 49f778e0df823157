//! What the node's kernel denied, for the statuses that gateways write.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tidegate_policy::denied::{Denied, Folded};
use tidegate_policy::event::{Emit, Event};
use tokio::sync::watch;

/// Different denials of a second that are kept.
const ROOM: usize = 256;
/// Of them so many are told to each gateway.
const TOLD: usize = 32;
/// How often.
const EVERY: Duration = Duration::from_secs(1);

/// The denials of the last second.
pub struct Denials {
    folded: Mutex<Folded>,
    out: watch::Sender<Arc<Vec<Denied>>>,
}

impl Denials {
    /// With what each gateway is told from time to time.
    pub fn new() -> (Arc<Self>, watch::Receiver<Arc<Vec<Denied>>>) {
        let (out, told) = watch::channel(Arc::default());
        (Arc::new(Self { folded: Mutex::new(Folded::new(ROOM)), out }), told)
    }

    /// Tells them, once a second, for ever.
    pub async fn tell(self: Arc<Self>) {
        loop {
            tokio::time::sleep(EVERY).await;
            let batch = {
                let mut folded = self.folded.lock().unwrap_or_else(PoisonError::into_inner);
                // The audit log and the counters have all of them.
                folded.take_lost();
                folded.take(TOLD)
            };
            if !batch.is_empty() {
                self.out.send_replace(Arc::new(batch));
            }
        }
    }
}

/// Hands events on to the audit log, and notes denials.
pub struct Tee {
    /// The audit log.
    pub log: Arc<dyn Emit>,
    /// What is noted.
    pub denials: Arc<Denials>,
}

impl Emit for Tee {
    fn emit(&self, event: Event) {
        if event.who.is_some()
            && let Some(denied) = Denied::of(&event)
        {
            // Gateways say themselves whose address it is.
            let denied = Denied { who: None, ..denied };
            self.denials.folded.lock().unwrap_or_else(PoisonError::into_inner).add(denied);
        }
        self.log.emit(event);
    }
}
