//! The first flight of a TLS client, and the turns that follow.

use tidegate_sni_core::{Gate, Peek, Progress};

/// A client's stream. The first octet says how it is cut; bit 7 asks for a gate behind the hello: what follows are then
/// turns of (who, length, octets).
pub fn tls(data: &[u8]) -> bool {
    let Some((&first, rest)) = data.split_first() else { return false };
    let step = usize::from(first & 0x7f) + 1;
    let mut whole = Peek::new();
    let progress = whole.push(rest);
    let mut peek = Peek::new();
    let mut last = Progress::NeedMore;
    for cut in rest.chunks(step) {
        let next = peek.push(cut);
        assert!(last == Progress::NeedMore || next == last, "an answer is kept");
        last = next;
    }
    assert_eq!(last, progress, "cuts of {step} change what is read");
    let (bytes, hello) = peek.into_bytes();
    assert_eq!(bytes, rest, "the bytes are kept as they came");
    assert!(hello <= rest.len());
    let Progress::Hello(said) = progress else { return false };
    assert_eq!(Peek::new().push(&rest[..hello]), Progress::Hello(said.clone()), "the hello stands alone");
    if first & 0x80 == 0 {
        return true;
    }
    let mut gate = Gate::new(said);
    let (mut turns, mut client, mut out) = (&rest[hello..], Vec::new(), Vec::new());
    while let Some(([who, len], more)) = turns.split_first_chunk() {
        let (piece, next) = more.split_at(usize::from(*len).min(more.len()));
        turns = next;
        if who & 1 == 0 {
            gate.server(piece);
            continue;
        }
        client.extend_from_slice(piece);
        let open = gate.is_open();
        if gate.client(piece, &mut out).is_err() {
            assert!(!open, "an open gate refuses nothing");
            return true;
        }
        assert!(client.starts_with(&out), "what passes is what was sent, in order");
        assert!(!gate.is_open() || out.len() == client.len(), "an open gate holds nothing back");
    }
    true
}
