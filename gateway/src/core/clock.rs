//! The core's clock.

use std::time::{Duration, Instant};

/// A monotonic clock that starts with the process.
pub struct Clock {
    zero: Instant,
    /// What a test says that it shows, in milliseconds.
    #[cfg(test)]
    pub(super) set: std::sync::atomic::AtomicU64,
}

impl Clock {
    /// One that shows zero.
    pub fn start() -> Self {
        Self {
            zero: Instant::now(),
            #[cfg(test)]
            set: Default::default(),
        }
    }

    pub(super) fn now(&self) -> Duration {
        #[cfg(test)]
        if let ms @ 1.. = self.set.load(std::sync::atomic::Ordering::Relaxed) {
            return Duration::from_millis(ms);
        }
        self.zero.elapsed()
    }
}
