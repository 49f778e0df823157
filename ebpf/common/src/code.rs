//! Hooks, outcomes and reasons as the kernel writes them into counters and events.

macro_rules! codes {
    ($(#[$enum_doc:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident,)* }) => {
        $(#[$enum_doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// Every value, in order of its number.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// The value with this number.
            pub fn from_u8(n: u8) -> Option<Self> {
                Self::ALL.get(n as usize).copied()
            }
        }
    };
}

codes! {
    /// A kernel program, and so the place where something was decided.
    Hook {
        /// Host-side veth ingress: what a pod sends.
        PodEgress,
        /// Host-side veth egress: what a pod receives.
        PodIngress,
        /// Uplink egress: nothing leaves un-steered.
        NodeGuard,
        /// Tunnel device ingress.
        TunnelIngress,
        /// Node side of the gateway's pod-facing veth, ingress: replies to pods.
        GatewayReturn,
        /// Node side of the gateway's uplink-facing veth, ingress: out with an egress address.
        UplinkEgress,
        /// Uplink ingress: packets for held egress addresses.
        UplinkIngress,
        /// The gateway's end of the pod-facing veth, ingress.
        GatewayIngress,
    }
}

codes! {
    /// What happened to a packet.
    Outcome {
        /// It goes on un-steered.
        Pass,
        /// It goes to a gateway, or inside a gateway to its carrier.
        Steer,
        /// It is dropped.
        Drop,
        /// It goes on un-steered because its group is audited; enforcement would drop it.
        Audit,
    }
}

codes! {
    /// Why; the host maps each to one published reason.
    Code {
        /// A rule, or the step that passes it, allows it.
        Allowed,
        /// Nothing allows it.
        NotAllowed,
        /// A deny rule matches it.
        DeniedByPolicy,
        /// Its fact has expired and it starts a new flow.
        BindingExpired,
        /// Encrypted DNS.
        EncryptedDns,
        /// Link-local or metadata.
        Metadata,
        /// The source is not the endpoint's address, or the outer source not its node.
        SpoofedSource,
        /// To the tunnel port.
        TunnelPort,
        /// A pod that is not known.
        UnknownPod,
        /// An IP protocol that is a way out of inspection.
        Protocol,
        /// A later fragment that does not go to the cluster.
        Fragment,
        /// Headers that cannot be parsed, or that could mean two things.
        Malformed,
        /// No gateway serves the scope.
        NoGateway,
        /// Too large for the tunnel with don't-fragment set; the sender was told.
        TooBig,
        /// The endpoint's flow budget is used up.
        Quota,
        /// A checksum is yet to be written into what was judged.
        Checksum,
    }
}

/// Codes per outcome in the counter array; a power of two so that the verifier sees the bound.
pub const CODES: u32 = 16;
/// Outcomes per hook in the counter array.
pub const OUTCOMES: u32 = 4;
/// Entries of the counter array.
pub const COUNTERS: u32 = 8 * OUTCOMES * CODES;

/// Index of a counter.
#[inline(always)]
pub const fn counter_index(hook: Hook, outcome: Outcome, code: Code) -> u32 {
    (hook as u32 * OUTCOMES + outcome as u32) * CODES + code as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_a_place_each() {
        assert!(Code::ALL.len() <= CODES as usize);
        assert_eq!(Outcome::ALL.len(), OUTCOMES as usize);
        let mut seen = [false; COUNTERS as usize];
        for &h in Hook::ALL {
            for &o in Outcome::ALL {
                for &c in Code::ALL {
                    let i = counter_index(h, o, c) as usize;
                    assert!(!core::mem::replace(&mut seen[i], true));
                }
            }
        }
        assert_eq!(Code::from_u8(Code::Quota as u8), Some(Code::Quota));
        assert_eq!(Code::from_u8(16), None);
    }
}
