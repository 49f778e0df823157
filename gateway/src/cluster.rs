//! What the DNS service is told of the cluster while it runs.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tidegate_api::index::ExternalNames;
use tidegate_dns::ClusterServers;
use tidegate_policy::Name;

/// ExternalName Services, and the servers of the cluster's DNS. Read for each query to a name of the cluster.
#[derive(Default)]
pub struct ClusterNames {
    external: ArcSwap<ExternalNames>,
    /// The cluster's own suffixes, canonical.
    suffixes: Vec<String>,
    /// Who is asked for names of the cluster.
    pub servers: ClusterServers,
}

impl ClusterNames {
    /// With what the configuration says.
    pub fn new(suffixes: Vec<String>, servers: Vec<std::net::SocketAddr>) -> Self {
        Self { external: ArcSwap::default(), suffixes, servers: ClusterServers::new(servers) }
    }

    /// Takes what the cluster says now.
    pub fn set(&self, external: &Arc<ExternalNames>, servers: Vec<std::net::SocketAddr>) {
        if !Arc::ptr_eq(&self.external.load(), external) {
            self.external.store(external.clone());
        }
        self.servers.set(servers);
    }

    /// Where a canonical name leads to, if it is that of an ExternalName Service.
    pub fn target(&self, name: &str) -> Option<Name> {
        let external = self.external.load();
        if external.is_empty() {
            return None;
        }
        let fit = |s: &String| name.strip_suffix(s.as_str())?.strip_suffix(".svc.");
        let (service, namespace) = self.suffixes.iter().find_map(fit)?.split_once('.')?;
        external.get(&(namespace.to_owned(), service.to_owned())).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_services_lead_out() {
        let names = ClusterNames::new(vec!["cluster.local".into()], Vec::new());
        assert_eq!(names.target("db.shop.svc.cluster.local"), None);
        let target = Name::parse("db.example.com").unwrap();
        names.set(&Arc::new([(("shop".to_owned(), "db".to_owned()), target.clone())].into()), Vec::new());
        assert_eq!(names.target("db.shop.svc.cluster.local"), Some(target));
        for other in
            ["db.bank.svc.cluster.local", "x.db.shop.svc.cluster.local", "db.shop.svc", "shop.svc.cluster.local"]
        {
            assert_eq!(names.target(other), None, "{other}");
        }
    }
}
