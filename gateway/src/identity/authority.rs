//! The cluster's certificate authority: made, rotated, and what it signs. Pure: the clock and fresh keys are arguments.
//!
//! A rotation has four steps, and at no time is anything signed by whom somebody does not trust yet or any more:
//! 1. The next authority is made, and stands in the trust bundle. Nothing is signed with it.
//! 2. Once the bundle was published for [`Times::overlap`], it signs. The key of the former one is destroyed.
//! 3. The former one stays in the bundle until the last certificate that it may have signed has ended.
//! 4. Then it is removed.

use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use serde::{Deserialize, Serialize};
use tidegate_identity::{Role, node_uid_uri, validity};
use x509_parser::time::ASN1Time;

/// Certificates begin to hold so long before they are made, in seconds: clocks differ.
const BACKDATE: u64 = 3600;
/// The most authorities that signed once and are trusted still. Of more the oldest goes.
const MAX_OLD: usize = 8;

/// How long things last, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A certificate of a node or a gateway.
    pub certificate: u64,
    /// An authority. After two thirds of it the next one is made.
    pub authority: u64,
    /// How long the next authority is trusted before it signs: nodes see the bundle a minute or two after it is written.
    pub overlap: u64,
}

/// Why nothing is signed.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It is no PKCS #10 request, or its signature is not by its key.
    #[error("this is no request for a certificate: {0}")]
    Malformed(rcgen::Error),
    /// It wants more, or something else, than the name.
    #[error("the request must be for {0} and nothing else")]
    Other(String),
    /// The authority itself is not usable.
    #[error("the authority cannot sign: {0}")]
    Broken(String),
}

fn broken(e: impl std::fmt::Display) -> Refused {
    Refused::Broken(e.to_string())
}

/// A certificate with its key, PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signer {
    certificate: String,
    key: String,
}

/// What will sign.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Next {
    signer: Signer,
    /// Since when it stands in the published bundle, in Unix seconds.
    published: Option<u64>,
}

/// What has signed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Old {
    certificate: String,
    /// Until when it is trusted, in Unix seconds.
    until: u64,
}

/// The authority with what goes before and after it: the content of the Secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Authority {
    signer: Signer,
    next: Option<Next>,
    old: Vec<Old>,
    /// Of one that somebody else keeps.
    #[serde(skip)]
    given: Option<Given>,
}

/// What stands above an authority that is given.
#[derive(Clone, PartialEq, Eq)]
struct Given {
    /// What has to be trusted, PEM.
    roots: String,
    /// What stands between a root and a leaf, the nearest to the leaf first; empty if the authority itself is a root.
    chain: Vec<CertificateDer<'static>>,
}

/// Keys stay out of logs.
impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority(next: {}, old: {})", self.next.is_some(), self.old.len())
    }
}

fn dns(name: &str) -> Result<SanType, Refused> {
    Ok(SanType::DnsName(name.try_into().map_err(broken)?))
}

fn time(seconds: u64) -> Result<ASN1Time, Refused> {
    let seconds = i64::try_from(seconds).map_err(broken)?;
    ASN1Time::from_timestamp(seconds).map_err(broken)
}

fn der(pem: &str) -> Result<CertificateDer<'static>, Refused> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(broken)
}

fn pem_of(certificate: &CertificateDer<'_>) -> String {
    let coded = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<&str> = (0..coded.len()).step_by(64).map(|at| &coded[at..coded.len().min(at + 64)]).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

/// When a certificate begins and ends, in Unix seconds.
fn span(pem: &str) -> Result<(u64, u64), Refused> {
    let (from, to) = validity(&der(pem)?).ok_or_else(|| broken("its certificate cannot be read"))?;
    let seconds = |t| u64::try_from(t).unwrap_or(0);
    Ok((seconds(from), seconds(to)))
}

impl Signer {
    fn new(now: u64, times: &Times, key: KeyPair) -> Result<Self, Refused> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // Names differ, so that each certificate says which of them signed it.
        params.distinguished_name.push(DnType::CommonName, format!("tidegate {now}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = time(now.saturating_sub(BACKDATE))?.to_datetime();
        params.not_after = time(now + times.authority)?.to_datetime();
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(broken)?;
        Ok(Self { certificate: issuer.pem(), key: issuer.key().serialize_pem() })
    }
}

impl Authority {
    /// The first one of a cluster. It signs at once: nobody has to trust another one.
    ///
    /// # Errors
    /// When the key cannot sign.
    pub fn first(now: u64, times: &Times, key: KeyPair) -> Result<Self, Refused> {
        Ok(Self { signer: Signer::new(now, times, key)?, next: None, old: Vec::new(), given: None })
    }

    /// One that somebody else keeps, PEM, as a Secret of the type `kubernetes.io/tls` has it: its certificate, with those
    /// that are between it and a root, its key, and the roots; without roots it is one itself.
    ///
    /// # Errors
    /// When they do not fit together, or it is no authority.
    pub fn given(certificates: &str, key: &str, roots: Option<&str>) -> Result<Self, Refused> {
        let pem = |text: &str| {
            let all = CertificateDer::pem_slice_iter(text.as_bytes()).map(|c| c.map(CertificateDer::into_owned));
            all.collect::<Result<Vec<_>, _>>().map_err(broken)
        };
        let chain = pem(certificates)?;
        let own = chain.first().ok_or_else(|| broken("tls.crt has no certificate"))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(own).map_err(broken)?;
        if !parsed.is_ca() {
            return Err(broken("tls.crt is no authority's certificate"));
        }
        let key = KeyPair::from_pem(key).map_err(|e| {
            broken(format!(
                "tls.key: {e}; wanted is PKCS #8 (BEGIN PRIVATE KEY; cert-manager: privateKey.encoding: PKCS8)"
            ))
        })?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(broken("tls.key is not the key of tls.crt"));
        }
        let known = roots.map(&pem).transpose()?.unwrap_or_default();
        let certificate = pem_of(own);
        let given = if known.is_empty() {
            Given { roots: certificate.clone(), chain: Vec::new() }
        } else {
            let roots = known.iter().map(pem_of).collect();
            Given { roots, chain: chain.iter().filter(|c| !known.contains(c)).cloned().collect() }
        };
        let signer = Signer { certificate, key: key.serialize_pem() };
        Ok(Self { signer, next: None, old: Vec::new(), given: Some(given) })
    }

    /// Out of what [`Authority::to_bytes`] gave.
    ///
    /// # Errors
    /// When it is something else, or a key does not fit its certificate.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Refused> {
        let this: Self = serde_json::from_slice(bytes).map_err(broken)?;
        for signer in std::iter::once(&this.signer).chain(this.next.as_ref().map(|n| &n.signer)) {
            let key = KeyPair::from_pem(&signer.key).map_err(broken)?;
            let certificate = der(&signer.certificate)?;
            let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(broken)?;
            if parsed.public_key().raw != key.subject_public_key_info() {
                return Err(broken("a key is not its certificate's"));
            }
        }
        this.old.iter().try_for_each(|o| der(&o.certificate).map(drop))?;
        Ok(this)
    }

    /// To keep it.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Texts, numbers and lists always serialise.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What has to be trusted, PEM.
    pub fn bundle(&self) -> String {
        if let Some(given) = &self.given {
            return given.roots.clone();
        }
        let next = self.next.iter().map(|n| &n.signer.certificate);
        let all = std::iter::once(&self.signer.certificate).chain(next).chain(self.old.iter().map(|o| &o.certificate));
        all.map(String::as_str).collect()
    }

    /// What a rotation makes of it now. None if nothing changes. `key` is called for a fresh key.
    ///
    /// # Errors
    /// When its certificates cannot be read, or there is no key.
    pub fn step(
        &self,
        now: u64,
        times: &Times,
        key: impl FnOnce() -> Result<KeyPair, rcgen::Error>,
    ) -> Result<Option<Self>, Refused> {
        let mut new = self.clone();
        match &self.next {
            None => {
                let (from, to) = span(&self.signer.certificate)?;
                let from = (from + BACKDATE).min(to);
                if now >= from + (to - from) * 2 / 3 {
                    let signer = Signer::new(now, times, key().map_err(broken)?)?;
                    new.next = Some(Next { signer, published: None });
                }
            }
            Some(next) if next.published.is_some_and(|at| now >= at + times.overlap) => {
                let former = std::mem::replace(&mut new.signer, next.signer.clone());
                new.next = None;
                // Another gateway may sign with the former one until it hears of this, which may take as long again
                // if it is cut off.
                let until = now + 2 * times.certificate;
                new.old.push(Old { certificate: former.certificate, until });
            }
            Some(_) => {}
        }
        new.old.retain(|o| now < o.until);
        let many = new.old.len().saturating_sub(MAX_OLD);
        new.old.drain(..many);
        Ok((new != *self).then_some(new))
    }

    /// Notes that [`Authority::bundle`] is published. None if that was known.
    pub fn published(&self, now: u64) -> Option<Self> {
        let mut new = self.clone();
        let next = new.next.as_mut().filter(|n| n.published.is_none())?;
        next.published = Some(now);
        Some(new)
    }

    /// When [`Authority::step`] has something to do next, in Unix seconds, if that is known.
    pub fn due(&self, times: &Times) -> Option<u64> {
        if self.given.is_some() {
            return None;
        }
        let ending = self.old.iter().map(|o| o.until).min();
        let signer = match &self.next {
            None => {
                let (from, to) = span(&self.signer.certificate).ok()?;
                let from = (from + BACKDATE).min(to);
                Some(from + (to - from) * 2 / 3)
            }
            Some(next) => next.published.map(|at| at + times.overlap),
        };
        ending.into_iter().chain(signer).min()
    }

    /// A certificate for a node, out of its request, with the UID of its Node object where that is known. Of the request
    /// nothing counts but the key and that it holds it.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn node(
        &self,
        node: &str,
        uid: Option<&str>,
        request: &[u8],
        now: u64,
        times: &Times,
    ) -> Result<Issued, Refused> {
        let request = CertificateSigningRequestDer::from(request);
        let request = CertificateSigningRequestParams::from_der(&request).map_err(Refused::Malformed)?;
        let name = Role::Node.dns_name(node);
        let asked = &request.params;
        let only = matches!(&asked.subject_alt_names[..], [SanType::DnsName(n)] if n.as_str() == name);
        if !only || !matches!(asked.is_ca, IsCa::NoCa) {
            return Err(Refused::Other(name));
        }
        let mut names = vec![dns(&name)?];
        if let Some(uid) = uid {
            names.push(SanType::URI(node_uid_uri(uid).try_into().map_err(broken)?));
        }
        self.sign(names, &[ExtendedKeyUsagePurpose::ClientAuth], &request.public_key, now, times)
    }

    /// A certificate for a gateway, whose Service has the other names.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn gateway(
        &self,
        gateway: &str,
        names: &[String],
        key: &impl PublicKeyData,
        now: u64,
        times: &Times,
    ) -> Result<Issued, Refused> {
        let own = Role::Gateway.dns_name(gateway);
        let names = std::iter::once(&own).chain(names).map(|n| dns(n)).collect::<Result<_, _>>()?;
        let uses = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(names, &uses, key, now, times)
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        uses: &[ExtendedKeyUsagePurpose],
        key: &impl PublicKeyData,
        now: u64,
        times: &Times,
    ) -> Result<Issued, Refused> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.distinguished_name = DistinguishedName::new();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = uses.to_vec();
        params.use_authority_key_identifier_extension = true;
        let (_, end) = span(&self.signer.certificate)?;
        let end = end.min(now + times.certificate);
        params.not_before = time(now.saturating_sub(BACKDATE))?.to_datetime();
        params.not_after = time(end)?.to_datetime();
        let signer = KeyPair::from_pem(&self.signer.key).map_err(broken)?;
        let issuer = Issuer::from_ca_cert_pem(&self.signer.certificate, signer).map_err(broken)?;
        let certificate = params.signed_by(key, &issuer).map_err(broken)?;
        let renew = end.saturating_sub(now) * 2 / 3;
        let above = self.given.iter().flat_map(|g| g.chain.iter().cloned());
        let chain = std::iter::once(certificate.der().clone()).chain(above).collect();
        Ok(Issued { chain, renew, ends: end })
    }
}

/// A certificate that was signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate, and what stands between it and a root.
    pub chain: Vec<CertificateDer<'static>>,
    /// After how many seconds it should be renewed.
    pub renew: u64,
    /// When it ends, in Unix seconds.
    pub ends: u64,
}

#[cfg(test)]
#[path = "authority_tests.rs"]
mod tests;
