//! A certificate with its key and the authorities that its holder trusts.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::sync::watch;

use crate::{Error, Files, H2, JOIN, Role, name_of, unusable, validity};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The certificates of a PEM file.
///
/// # Errors
/// When it is no PEM, or holds no certificate.
pub fn authorities_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    certificates("the authorities", pem)
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|e| Error::Unusable { what, why: e.to_string() })?;
    if all.is_empty() {
        return Err(Error::Unusable { what, why: "there is no certificate in the file".into() });
    }
    Ok(all)
}

fn roots(authorities: Vec<CertificateDer<'static>>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority).map_err(unusable("an authority"))?;
    }
    Ok(Arc::new(roots))
}

/// Who somebody is and whom he trusts. Sessions are never resumed: a certificate that has ended would go on with them.
pub struct Credentials {
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    server: Arc<ServerConfig>,
    joining: Arc<ServerConfig>,
    renewing: Arc<ServerConfig>,
    ends: i64,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("ends", &self.ends).finish_non_exhaustive()
    }
}

impl Credentials {
    /// A chain, leaf first, with the leaf's key.
    ///
    /// # Errors
    /// When the key is not the leaf's, or something is no certificate.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        authorities: Vec<CertificateDer<'static>>,
    ) -> Result<Self, Error> {
        let what = "the certificate";
        let (_, ends) =
            chain.first().and_then(validity).ok_or(Error::Unusable { what, why: "it cannot be read".into() })?;
        let certified = Arc::new(CertifiedKey::from_der(chain, key, &provider()).map_err(unusable(what))?);
        let roots = roots(authorities)?;
        let bad =
            |e: rustls::server::VerifierBuilderError| Error::Unusable { what: "the authorities", why: e.to_string() };
        let builder = || WebPkiClientVerifier::builder_with_provider(roots.clone(), provider());
        let clients = builder().build().map_err(bad)?;
        let strangers = builder().allow_unauthenticated().build().map_err(bad)?;
        let of = |clients, protocol| server(clients, &certified, protocol).map(Arc::new);
        let (server, joining, renewing) = (of(clients.clone(), H2)?, of(strangers, JOIN)?, of(clients.clone(), JOIN)?);
        Ok(Self { certified, roots, clients, server, joining, renewing, ends })
    }

    /// Out of PEM.
    ///
    /// # Errors
    /// As [`Credentials::new`].
    pub fn from_pem(certificate: &[u8], key: &[u8], authorities: &[u8]) -> Result<Self, Error> {
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|e| Error::Unusable { what: "the key", why: e.to_string() })?;
        Self::new(certificates("the certificate", certificate)?, key, authorities_from_pem(authorities)?)
    }

    /// For a server whose clients show certificates.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For a server whose clients want a certificate: those that have one may show it.
    pub fn joining(&self) -> Arc<ServerConfig> {
        self.joining.clone()
    }

    /// For a server whose clients want a new certificate, and must show the one that they have.
    pub fn renewing(&self) -> Arc<ServerConfig> {
        self.renewing.clone()
    }

    /// For a server whose clients show no certificate, and speak HTTP.
    ///
    /// # Errors
    /// When the provider lacks a protocol version.
    pub fn plain_server(&self) -> Result<ServerConfig, Error> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(unusable("TLS"))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        Ok(config)
    }

    /// For a client of the gateway of this name, or of any.
    ///
    /// # Errors
    /// When the provider lacks a protocol version.
    pub fn client(&self, gateway: Option<&str>) -> Result<ClientConfig, Error> {
        let own = Arc::new(SingleCertAndKey::from(self.certified.clone()));
        let mut config = client(self.roots.clone(), gateway)?.with_client_cert_resolver(own);
        finish(&mut config, H2);
        Ok(config)
    }

    /// When the own certificate ends, in Unix seconds.
    pub fn ends(&self) -> i64 {
        self.ends
    }

    /// The own chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// Whether the own certificate is a client's for this name, of an authority that is trusted, at a time in Unix seconds.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, role: Role, name: &str, now: u64) -> Result<(), Error> {
        let what = "the certificate";
        let (leaf, rest) = self.certified.cert.split_first().ok_or(Error::None)?;
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
        self.clients.verify_client_cert(leaf, rest, now).map_err(unusable(what))?;
        match name_of(leaf, role) {
            Some(got) if got == name => Ok(()),
            got => Err(Error::Unusable { what, why: format!("it is for {got:?}, not for {name}") }),
        }
    }
}

/// For a client that has no certificate yet, or shows the one that it has.
pub(crate) fn joining_client(
    authorities: Vec<CertificateDer<'static>>,
    gateway: Option<&str>,
    own: Option<&Credentials>,
) -> Result<ClientConfig, Error> {
    let builder = client(roots(authorities)?, gateway)?;
    let mut config = match own {
        Some(own) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own.certified.clone()))),
        None => builder.with_no_client_auth(),
    };
    finish(&mut config, JOIN);
    Ok(config)
}

fn client(
    roots: Arc<RootCertStore>,
    gateway: Option<&str>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Error> {
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|e| Error::Unusable { what: "the authorities", why: e.to_string() })?;
    let verifier = Arc::new(GatewayVerifier { inner, name: gateway.map(str::to_owned) });
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable("TLS"))?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn finish(config: &mut ClientConfig, protocol: &[u8]) {
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
}

fn server(
    clients: Arc<dyn ClientCertVerifier>,
    certified: &Arc<CertifiedKey>,
    protocol: &[u8],
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable("TLS"))?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified.clone())));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Takes a server whose certificate names a gateway: the one that is wanted, or any.
#[derive(Debug)]
struct GatewayVerifier {
    inner: Arc<WebPkiServerVerifier>,
    name: Option<String>,
}

impl ServerCertVerifier for GatewayVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _asked: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let nameless = || rustls::Error::General("the certificate names no gateway, or several".into());
        let name = match &self.name {
            Some(name) => name.clone(),
            None => name_of(end_entity, Role::Gateway).ok_or_else(nameless)?,
        };
        let name = ServerName::try_from(Role::Gateway.dns_name(&name)).map_err(|_| nameless())?;
        self.inner.verify_server_cert(end_entity, intermediates, &name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Where credentials come from. They may change at any time: whoever connects or accepts asks anew. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Source {
    /// Files, read again when they change.
    Files(Arc<Mutex<Files>>),
    /// Certificates that somebody else gets and renews.
    Issued(watch::Receiver<Option<Arc<Credentials>>>),
}

impl Source {
    /// What holds now.
    ///
    /// # Errors
    /// When there is none yet.
    pub fn now(&self) -> Result<Arc<Credentials>, Error> {
        match self {
            Self::Files(files) => files.lock().now(),
            Self::Issued(issued) => issued.borrow().clone().ok_or(Error::None),
        }
    }
}
