//! Every rule of the policy language, one by one.

mod common;

use common::*;
use tidegate_policy::model::*;
use tidegate_policy::world::Answer;
use tidegate_policy::{Carry, Proto, Reason, Via};

const TLS: Via = Via::Allow(Carry::Tls);
const FORWARD: Via = Via::Allow(Carry::Forward);

#[test]
fn an_own_policy_isolates_and_allows_what_it_lists() {
    let g = shop().own("p", policy(vec![rule("stripe", &["*.stripe.com", "api.pay.example"], &["443", "443/udp", "53/udp"])], vec![])).group();
    assert_eq!(g.to("api.stripe.com", 443).via, TLS);
    assert_eq!(g.to("api.stripe.com", 443).rule.unwrap().rule.as_ref(), "stripe");
    assert_eq!(g.to("api.stripe.com", 80).reason, Reason::NotAllowed);
    assert_eq!(g.to("a.b.stripe.com", 443).reason, Reason::NotAllowed);
    assert_eq!(g.to_ip("192.0.2.1", 443).reason, Reason::NotAllowed);
    let udp = |p| g.connection(Some(&name("api.pay.example")), ip("192.0.2.1"), Proto::Udp, p);
    assert_eq!((udp(443).via, udp(443).reason), (Via::Allow(Carry::Block), Reason::QuicBlocked));
    assert!(!udp(443).allowed());
    assert_eq!(udp(53).via, FORWARD);
    assert_eq!(g.a("api.stripe.com"), Answer::Bind);
    assert_eq!(g.a("stripe.com"), Answer::NoData);
    assert_eq!(g.a("com"), Answer::NoData);
    assert_eq!(g.a("evil.net"), Answer::NxDomain);
    assert_eq!(g.name("evil.net", 1).reason, Reason::NameNotAllowed);
}
