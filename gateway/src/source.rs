//! Where objects come from, and the thread that compiles them: a folder of manifests, or an API server.

pub mod kubernetes;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use tidegate_api::Reader;
use tidegate_policy::model::{self, Objects, Touched, UnixSeconds};
use tidegate_policy::world::World;

use crate::admin::Guard;
use crate::config::{self, Config};
use crate::core::ToCore;
use crate::desired::Compiled;
use crate::report::{self, Surveyor};
use crate::watch::Watch;

/// Manifests are read again at least so often, whatever the watch says.
const REREAD: Duration = Duration::from_secs(10);

/// What is wrong with the objects, for the status.
pub type Problems = Arc<ArcSwap<Vec<String>>>;

/// The wall clock: what `expireTime` and `audit-until` are measured by.
pub fn now() -> UnixSeconds {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixSeconds(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// What the configuration says of policy.
pub fn settings(config: &Config) -> model::Settings {
    model::Settings {
        cluster_default: match config.cluster_default {
            config::ClusterDefault::Untouched => model::ClusterDefault::Untouched,
            config::ClusterDefault::Audit => model::ClusterDefault::Audit,
            config::ClusterDefault::Isolated => model::ClusterDefault::Isolated,
        },
        dns_filter: match config.dns_filter {
            config::DnsFilter::Strict => model::DnsFilter::Strict,
            config::DnsFilter::Open => model::DnsFilter::Open,
        },
        trust_mirror_pods: config.mirror_pods == config::MirrorPods::Trusted,
        exempt_namespaces: config.exempt_namespaces.clone(),
        cluster_prefixes: config.cluster.prefixes.clone(),
        cluster_dns: config.cluster.dns.clone(),
    }
}

/// Compiles, and tells the core.
pub struct Compiler {
    core: SyncSender<ToCore>,
    problems: Problems,
    /// Puts together what reports are made of.
    surveyor: Surveyor,
    /// Dropped after the first compile.
    waiting: Option<Guard>,
    last: Option<Arc<Compiled>>,
    /// What was said of the objects last.
    said: Vec<String>,
}

/// The core has ended.
#[derive(Debug)]
pub struct Ended;

impl Compiler {
    /// Holds readiness back by `waiting` until there is a first compile.
    pub fn new(core: SyncSender<ToCore>, problems: Problems, surveyor: Surveyor, waiting: Guard) -> Self {
        Self { core, problems, surveyor, waiting: Some(waiting), last: None, said: Vec::new() }
    }

    /// Whether there was a first compile.
    fn started(&self) -> bool {
        self.last.is_some()
    }

    /// Whether a rule or an audit has ended since the last compile.
    fn is_due(&self) -> bool {
        self.last.as_ref().is_some_and(|c| c.world.next_change().is_some_and(|t| t <= now()))
    }

    /// Compiles what was touched.
    fn compile(&mut self, objects: &Objects, touched: &Touched) -> Result<(), Ended> {
        let started = Instant::now();
        let world = Arc::new(World::compile(objects, now(), self.last.as_ref().map(|c| (&*c.world, touched))));
        tracing::info!(
            namespaces = objects.namespaces.len(),
            pods = objects.pods.len(),
            policies = objects.policies.len() + objects.cluster_policies.len(),
            scopes = world.scopes().len(),
            groups = world.groups().len(),
            micros = started.elapsed().as_micros(),
            "policy compiled"
        );
        let compiled = Arc::new(match &self.last {
            Some(last) => last.next(world, objects, touched),
            None => Compiled::new(world, objects, 1),
        });
        self.last = Some(compiled.clone());
        self.core.send(ToCore::World(compiled)).map_err(|_| Ended)?;
        self.waiting = None;
        Ok(())
    }

    /// Looks at the objects of the last compile where they changed, or where what is known of them did.
    fn survey(&mut self, objects: &Objects, records: &dyn report::Source, changed: &Touched) {
        if let Some(c) = &self.last {
            self.surveyor.look(c.number, &c.world, objects, records, changed);
        }
    }

    /// Logs problems of the objects that are new.
    fn say(&mut self, texts: Vec<String>) -> bool {
        let news = texts != self.said;
        if news {
            for text in texts.iter().filter(|t| !self.said.contains(t)) {
                tracing::warn!("{text}");
            }
            self.said = texts;
        }
        news
    }

    /// Publishes them, with what the compile found.
    fn publish(&self) {
        let issues = self.last.iter().flat_map(|c| c.world.issues()).map(ToString::to_string);
        self.problems.store(Arc::new(self.said.iter().cloned().chain(issues).collect()));
    }
}

/// Reads manifests and compiles them, until told to stop.
pub fn directory(config: &Config, mut compiler: Compiler, stop: &AtomicBool) {
    let Some(directory) = &config.directory else { return };
    let mut reader = Reader::new(directory);
    let mut watch = Watch::new(directory)
        .inspect_err(|error| tracing::warn!(%error, "no change notices: manifests are read again every 10 s"))
        .ok();
    let mut objects = Objects::default();
    while !stop.load(Ordering::Relaxed) {
        let loaded = reader.reload();
        let news = compiler.say(loaded.problems.iter().map(ToString::to_string).collect());
        let changed = loaded.changed;
        if changed {
            objects = loaded.objects;
            objects.settings = settings(config);
        }
        let compile = changed || compiler.is_due() || !compiler.started();
        // Without a change only time has touched something.
        let touched = if changed { Touched::ALL } else { &Touched::default() };
        if compile && compiler.compile(&objects, touched).is_err() {
            return;
        }
        if news || compile {
            compiler.survey(&objects, &report::records_of(&objects, &loaded.problems), Touched::ALL);
            compiler.publish();
        }
        wait(&compiler, watch.as_mut(), stop);
    }
}

/// Until a file changes, a rule ends, or it is time to read again.
fn wait(compiler: &Compiler, mut watch: Option<&mut Watch>, stop: &AtomicBool) {
    let until = Instant::now() + REREAD;
    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
        let step = Duration::from_millis(200);
        match watch.as_deref_mut() {
            Some(w) => match w.wait(step) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "the watch on the manifests failed");
                    std::thread::sleep(step);
                }
            },
            None => std::thread::sleep(step),
        }
        if compiler.is_due() {
            return;
        }
    }
}
