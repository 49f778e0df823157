//! What UDP and TCP share: the first look at a query, and the slow path.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ahash::RandomState;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tidegate_dns_core::budget::Budget;
use tidegate_dns_core::serve::{self, Decision, Outcome, Route, Rules, Scratch, Served, decide, plan, refuse, render};
use tidegate_dns_core::view::{BindRequest, Binder, View};
use tidegate_dns_core::wire::{Parsed, Query, parse};
use tidegate_dns_core::{Asker, MAX_ADDRESSES, Store, Stored, reply};
use tidegate_policy::event::Verdict;
use tidegate_policy::{Reason, ScopeKey};
use tokio::sync::OnceCell;

use crate::clock::Clock;
use crate::config::DnsConfig;
use crate::quota::{Permit, Quota};
use crate::record::{Decided, Recorder, Repeats};
use crate::upstream::Upstream;

/// How often a query starts over because the policy changed under it.
const ROUNDS: usize = 4;
/// Failures that are remembered, all scopes together.
const FAILURES: u64 = 16_384;

/// Who asked whom, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flow {
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Whether replies are bounded by what the client takes over UDP.
    pub udp: bool,
}

/// What the first look at a query came to.
pub(crate) enum Step {
    /// The reply is in the scratch.
    Reply,
    /// The slow path must go on, holding the permit.
    Slow(Permit),
    /// No reply.
    Nothing,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct FlightKey {
    scope: ScopeKey,
    cluster: bool,
    key: Box<[u8]>,
}

type Flight = Arc<OnceCell<Result<Stored, Reason>>>;

pub(crate) struct Engine<V, B> {
    view: Arc<ArcSwap<V>>,
    binder: Arc<B>,
    pub store: Store,
    rules: Rules,
    upstream: Upstream,
    flights: Mutex<HashMap<FlightKey, Flight, RandomState>>,
    failures: moka::sync::Cache<FlightKey, Reason, RandomState>,
    budget: Mutex<Budget>,
    pub in_flight: Arc<Quota>,
    pub connections: Arc<Quota>,
    pub recorder: Recorder,
    clock: Clock,
}

impl<V: View, B: Binder> Engine<V, B> {
    pub fn new(config: &DnsConfig, view: Arc<ArcSwap<V>>, binder: Arc<B>, recorder: Recorder) -> Self {
        let clock = Clock::start();
        let suffixes = config.cluster.suffixes.iter().map(|s| s.as_str().into()).collect();
        Self {
            view,
            binder,
            store: Store::new(config.store, rand::random()),
            rules: Rules { cluster_suffixes: suffixes, addresses: config.addresses_per_name.clamp(1, MAX_ADDRESSES) },
            upstream: Upstream::new(config, clock),
            flights: Mutex::new(HashMap::with_hasher(RandomState::new())),
            failures: moka::sync::Cache::builder()
                .max_capacity(FAILURES)
                .time_to_live(config.failure_ttl)
                .build_with_hasher(RandomState::new()),
            budget: Mutex::new(Budget::new(config.budget, rand::random())),
            in_flight: Quota::new(config.in_flight_per_namespace, config.in_flight),
            connections: Quota::new(config.connections_per_namespace, config.connections),
            recorder,
            clock,
        }
    }

    /// The policy of now.
    pub fn view(&self) -> arc_swap::Guard<Arc<V>> {
        self.view.load()
    }

    /// Drops what has expired.
    pub fn sweep(&self) {
        let now = self.clock.now();
        self.store.sweep(now);
        self.budget.lock().sweep(now);
    }

    #[expect(clippy::too_many_arguments, reason = "borrowed parts of one event")]
    fn record(
        &self,
        flow: Flow,
        view: &V,
        query: Option<&Query<'_>>,
        asker: Option<&Asker>,
        outcome: &Outcome,
        cached: bool,
        scratch: &Scratch,
        repeats: Option<&mut Repeats>,
    ) {
        let decided = Decided {
            who: asker.map(|a| &a.who),
            client: flow.client.ip(),
            server: flow.server,
            name: query.map_or("", |q| q.name()),
            qtype: query.map_or(0, |q| q.qtype),
            outcome,
            sent: &scratch.sent,
            cached,
            generation: view.generation(),
        };
        match repeats {
            Some(r) => r.record(&self.recorder, &decided),
            None => self.recorder.now(&decided),
        }
    }

    /// The time `at` on the clock of the store, in milliseconds.
    pub fn millis(&self, at: Instant) -> u64 {
        self.clock.at(at)
    }

    /// The hit path. `now` is in milliseconds.
    pub fn first(
        &self,
        request: &[u8],
        flow: Flow,
        view: &V,
        now: u64,
        scratch: &mut Scratch,
        mut repeats: Option<&mut Repeats>,
    ) -> Step {
        let asker = view.asker(flow.client.ip());
        let query = match parse(request) {
            Parsed::Query(q) => q,
            Parsed::Refuse { rcode, edns, question } => {
                reply::error(request, rcode, edns, question, &mut scratch.out);
                scratch.sent.clear();
                let reason = Reason::DnsMalformed;
                let outcome = Outcome { verdict: Verdict::Deny, reason, rule: None, rcode };
                self.record(flow, view, None, asker, &outcome, false, scratch, repeats);
                return Step::Reply;
            }
            Parsed::Drop => {
                self.recorder.metrics.dropped("not-a-query");
                return Step::Nothing;
            }
        };
        let fail = |reason, scratch: &mut Scratch, repeats: Option<&mut Repeats>| {
            let outcome = serve::failure(reason, None);
            refuse(&query, &outcome, scratch);
            self.record(flow, view, Some(&query), asker, &outcome, false, scratch, repeats);
            Step::Reply
        };
        if let Some(reason) = view.closed() {
            return fail(reason, scratch, repeats);
        }
        let Some(asker) = asker else {
            return fail(Reason::UnknownPod, scratch, repeats);
        };
        let limit = if flow.udp { query.udp_limit() } else { usize::from(u16::MAX) };
        match serve::serve(&query, asker, view, &*self.binder, &self.store, &self.rules, now, limit, scratch) {
            Served::Reply { outcome, cached } => {
                self.record(flow, view, Some(&query), Some(asker), &outcome, cached, scratch, repeats);
                Step::Reply
            }
            Served::Miss => match self.in_flight.take(&asker.who.namespace) {
                Some(permit) => Step::Slow(permit),
                None => fail(Reason::Quota, scratch, repeats.take()),
            },
        }
    }

    /// The slow path: fetches, binds, and leaves the reply in the scratch.
    pub async fn resolve(&self, request: &[u8], flow: Flow, scratch: &mut Scratch) {
        let started = Instant::now();
        let Parsed::Query(query) = parse(request) else { return };
        let limit = if flow.udp { query.udp_limit() } else { usize::from(u16::MAX) };
        let mut fetched = None;
        for round in 0..ROUNDS {
            let view = self.view.load_full();
            let last = round + 1 == ROUNDS;
            let asker = view.asker(flow.client.ip()).cloned();
            let outcome = match &asker {
                _ if view.closed().is_some() => view.closed().map(|reason| serve::failure(reason, None)),
                Some(asker) => self.round(&query, asker, &view, limit, last, &mut fetched, scratch).await,
                None => Some(serve::failure(Reason::UnknownPod, None)),
            };
            let Some(outcome) = outcome else { continue };
            // What fails has no reply yet; what was rendered has.
            if outcome.verdict == Verdict::Deny {
                refuse(&query, &outcome, scratch);
            }
            self.record(flow, &view, Some(&query), asker.as_ref(), &outcome, false, scratch, None);
            break;
        }
        self.recorder.metrics.miss.record(started.elapsed().as_secs_f64());
    }

    /// One round under one view. `None` means that another round is due: an
    /// answer came, or the policy changed while an answer was being bound.
    #[expect(clippy::too_many_arguments, reason = "one caller; the state of a query that is under way")]
    async fn round(
        &self,
        query: &Query<'_>,
        asker: &Asker,
        view: &V,
        limit: usize,
        last: bool,
        fetched: &mut Option<(ScopeKey, Route, Stored)>,
        scratch: &mut Scratch,
    ) -> Option<Outcome> {
        let go = match decide(query.name(), query.qtype, asker, view, &self.rules) {
            Decision::Deny(outcome) => return Some(outcome),
            Decision::Go(go) => go,
        };
        // An answer belongs to the scope that fetched it: a pod address that moved starts with nothing.
        let own = fetched.as_ref().filter(|(s, r, _)| *s == asker.scope && *r == go.route).map(|f| f.2.clone());
        let Some(stored) = own.or_else(|| self.store.get(asker.scope, query.key(), self.clock.now())) else {
            if last {
                return Some(serve::failure(Reason::DnsUpstream, None));
            }
            if go.budget && !self.budget.lock().take(asker.scope, query.wire_name(), self.clock.now()) {
                return Some(serve::failure(Reason::DnsBudget, None));
            }
            return match self.fetch(asker.scope, go.route, query).await {
                Ok(stored) => {
                    *fetched = Some((asker.scope, go.route, stored));
                    None
                }
                Err(reason) => Some(serve::failure(reason, None)),
            };
        };
        let plan = match plan(go, query, &stored, asker, view, &self.rules, scratch) {
            Ok(plan) => plan,
            Err(outcome) => return Some(outcome),
        };
        let ttl = stored.ttl_or_zero(self.clock.now());
        let name = plan.bind_name(query, scratch);
        if plan.bind && !self.binder.standing(asker, name, &scratch.bind, ttl) {
            let request = BindRequest {
                asker: asker.clone(),
                name: name.into(),
                ips: scratch.bind.clone(),
                ttl_secs: ttl,
                min_binding_secs: plan.min_binding_secs,
            };
            match self.binder.bind(request).await {
                Ok(bound) if bound.is_empty() && !plan.lenient => {
                    return Some(serve::failure(Reason::Quota, plan.outcome.rule));
                }
                Ok(bound) => scratch.bind.retain(|ip| bound.contains(ip)),
                Err(_) if plan.lenient => {}
                Err(reason) => return Some(serve::failure(reason, plan.outcome.rule)),
            }
            if self.view.load().generation() != view.generation() && !last {
                return None;
            }
        }
        let ttl = stored.ttl_or_zero(self.clock.now());
        Some(render(query, &stored, plan, ttl, limit, scratch))
    }

    /// Asks upstream, once for all that ask the same at the same time.
    async fn fetch(&self, scope: ScopeKey, route: Route, query: &Query<'_>) -> Result<Stored, Reason> {
        let key = FlightKey { scope, cluster: route == Route::Cluster, key: query.key().into() };
        if let Some(reason) = self.failures.get(&key) {
            return Err(reason);
        }
        let flight = Arc::clone(self.flights.lock().entry(key.clone()).or_default());
        let result = flight
            .get_or_init(|| async {
                match self.upstream.query(route, query.name(), query.key()).await {
                    Ok(stored) => {
                        self.store.insert(scope, &stored, self.clock.now());
                        Ok(stored)
                    }
                    Err(error) => {
                        tracing::debug!(name = query.name(), qtype = query.qtype, %error, "no upstream answer");
                        self.failures.insert(key.clone(), Reason::DnsUpstream);
                        Err(Reason::DnsUpstream)
                    }
                }
            })
            .await
            .clone();
        let mut flights = self.flights.lock();
        if flights.get(&key).is_some_and(|f| Arc::ptr_eq(f, &flight)) {
            flights.remove(&key);
        }
        result
    }
}
