//! Messages of the contract between gateways and agents, and among gateways.

use prost::Message;
use tidegate_policy::state::NodeState;
use tidegate_proto::{FactsBatch, FactsUp, Joiner, PeerMessage, StateBatch, Up, wire};

/// Octets of one message; the first one says of which kind. What is taken means the same when it is sent on.
pub fn message(data: &[u8]) -> bool {
    let Some((&kind, octets)) = data.split_first() else { return false };
    match kind % 5 {
        0 => {
            let Ok(Ok(mut batch)) = wire::StateUpdate::decode(octets).map(StateBatch::try_from) else { return false };
            batch.more = false;
            let mut state = NodeState::default();
            batch.set.iter().for_each(|e| state.set(e.clone()));
            batch.delete.iter().for_each(|k| state.delete(k));
            let (set, gone) = NodeState::default().diff(&state);
            let mut copy = NodeState::default();
            set.into_iter().for_each(|e| copy.set(e));
            gone.iter().for_each(|k| copy.delete(k));
            assert_eq!(copy, state, "a difference applied");
            let (set, gone) = state.diff(&NodeState::default());
            set.into_iter().for_each(|e| copy.set(e));
            gone.iter().for_each(|k| copy.delete(k));
            assert_eq!(copy, NodeState::default(), "and taken back");
            let sent = batch.clone().into_messages();
            assert_eq!(join(&sent, StateBatch::try_from), batch);
        }
        1 => {
            let Ok(Ok(mut batch)) = wire::FactsUpdate::decode(octets).map(FactsBatch::try_from) else { return false };
            batch.more = false;
            let sent = batch.clone().into_messages();
            assert_eq!(join(&sent, FactsBatch::try_from), batch);
        }
        2 => {
            let Ok(Ok(up)) = wire::StateAck::decode(octets).map(Up::try_from) else { return false };
            assert_eq!(Up::try_from(wire::StateAck::from(up.clone())), Ok(up));
        }
        3 => {
            let Ok(Ok(up)) = wire::FactsAck::decode(octets).map(FactsUp::try_from) else { return false };
            let sent = match up.clone() {
                FactsUp::Up(up) => wire::FactsAck::from(up),
                FactsUp::Seen(seen) => wire::FactsAck::from(seen),
                FactsUp::Denied(denied) => tidegate_proto::denials(&denied),
                FactsUp::Started(pods) => tidegate_proto::started(&pods),
            };
            assert_eq!(FactsUp::try_from(sent), Ok(up));
        }
        _ => {
            let Ok(Ok(taken)) = wire::PeerUpdate::decode(octets).map(PeerMessage::try_from) else { return false };
            let mut facts = Vec::new();
            for m in taken.clone().into_messages() {
                let again = wire::PeerUpdate::decode(m.encode_to_vec().as_slice()).expect("our own octets");
                facts.extend(PeerMessage::try_from(again).expect("what was taken is taken again").facts);
            }
            assert_eq!(facts, taken.facts);
        }
    }
    true
}

/// Over the octets and together again.
fn join<M, B>(sent: &[M], take: impl Fn(M) -> Result<B, tidegate_proto::WireError>) -> B
where
    M: Message + Default,
    B: tidegate_proto::convert::Part,
{
    let mut joiner = Joiner::default();
    let mut whole = None;
    for m in sent {
        let m = M::decode(m.encode_to_vec().as_slice()).expect("our own octets");
        whole = joiner.push(take(m).expect("what was taken is taken again")).expect("parts in order");
    }
    whole.expect("the last part ends it")
}
