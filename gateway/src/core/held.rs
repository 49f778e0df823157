//! Which compile a node holds: acks name states, and a compile need not change what a node is sent.

use std::collections::VecDeque;

/// The compiles that wait for a node's acks, each with the last state that was sent for it.
#[derive(Debug, Default)]
pub struct Held {
    compile: u64,
    waiting: VecDeque<(u64, u64)>,
}

impl Held {
    /// Everything of a compile was sent, up to this sequence, of which the node has acked those up to `applied`.
    pub fn sent(&mut self, compile: u64, sequence: u64, applied: u64) {
        match self.waiting.back_mut() {
            Some((last, of)) if *last == sequence => *of = compile,
            _ => self.waiting.push_back((sequence, compile)),
        }
        self.acked(applied);
    }

    /// The node holds the states up to this one.
    pub fn acked(&mut self, applied: u64) {
        while let Some((_, compile)) = self.waiting.pop_front_if(|(sequence, _)| *sequence <= applied) {
            self.compile = compile;
        }
    }

    /// The last compile that it holds; 0 if none is known.
    pub const fn compile(&self) -> u64 {
        self.compile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compile_is_held_when_its_last_state_is_acked() {
        let mut h = Held::default();
        h.sent(1, 4, 0);
        assert_eq!(h.compile(), 0);
        // The second changes nothing for this node: it holds it with the first.
        h.sent(2, 4, 0);
        h.sent(3, 6, 0);
        h.acked(5);
        assert_eq!(h.compile(), 2);
        h.acked(6);
        assert_eq!(h.compile(), 3);
        h.sent(4, 6, 6);
        assert_eq!(h.compile(), 4);
        h.acked(9);
        assert_eq!(h.compile(), 4);
    }
}
