//! The lab's certificate authorities and what they sign.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};

/// A certificate authority with its key.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Where a certificate, its key and its authority lie.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Files {
    /// Certificate, PEM.
    pub certificate: PathBuf,
    /// Key, PEM.
    pub key: PathBuf,
    /// The authority's certificate, PEM.
    pub ca: PathBuf,
}

impl Authority {
    /// Makes a new authority.
    pub fn new(common_name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// Writes `NAME.crt` and, with `with_key`, `NAME.key`.
    pub fn write(&self, folder: &Path, name: &str, with_key: bool) -> Result<PathBuf> {
        let path = folder.join(format!("{name}.crt"));
        std::fs::write(&path, self.issuer.pem())?;
        if with_key {
            std::fs::write(folder.join(format!("{name}.key")), self.issuer.key().serialize_pem())?;
        }
        Ok(path)
    }

    /// Signs a certificate for client and server use and writes both files.
    pub fn sign(&self, folder: &Path, name: &str, ca: &Path) -> Result<Files> {
        let (certificate, key) = leaf(&self.issuer, name)?;
        let files = Files {
            certificate: folder.join(format!("{name}.crt")),
            key: folder.join(format!("{name}.key")),
            ca: ca.to_owned(),
        };
        std::fs::write(&files.certificate, certificate.pem())?;
        std::fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}

/// An authority read back from its files, for servers that sign as they go.
pub fn read_authority(certificate: &Path, key: &Path) -> Result<Issuer<'static, KeyPair>> {
    // The issuer's name must be what the certificate says; the lab's authorities have nothing but a common name.
    let key = KeyPair::from_pem(&std::fs::read_to_string(key)?)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, INTERNET_CA);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    anyhow::ensure!(certificate.exists(), "{} is missing", certificate.display());
    Ok(Issuer::new(params, key))
}

/// Common name of the authority of the internet's servers.
pub const INTERNET_CA: &str = "tidegate-lab internet";

/// A certificate for one name.
pub fn leaf(issuer: &Issuer<'_, KeyPair>, name: &str) -> Result<(rcgen::Certificate, KeyPair)> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    // A common name is bounded at 64 octets (RFC 5280, appendix A.1); the SAN says the name.
    params.distinguished_name.push(DnType::CommonName, "tidegate-lab");
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    Ok((certificate, key))
}
