//! What holds and is probably not meant.

use tidegate_policy::pattern::{Lint, Pattern};
use tidegate_policy::{Proto, model};

use crate::convert::Ctx;
use crate::problem::Code;

/// Suffixes below which anyone can have a name, beside the ones that the pattern's own
/// lint knows by their shape: the clouds that egress rules meet most. Not the public suffix list: a lint, never a decision.
const SHARED_SUFFIXES: &[&str] = &[
    "amazonaws.com",
    "appspot.com",
    "azureedge.net",
    "azurefd.net",
    "azurewebsites.net",
    "blob.core.windows.net",
    "blogspot.com",
    "cloudapp.azure.com",
    "cloudapp.net",
    "cloudfront.net",
    "cloudfunctions.net",
    "core.windows.net",
    "fastly.net",
    "firebaseapp.com",
    "github.io",
    "githubusercontent.com",
    "gitlab.io",
    "herokuapp.com",
    "myshopify.com",
    "netlify.app",
    "ngrok.io",
    "ngrok.app",
    "ngrok-free.app",
    "onrender.com",
    "pages.dev",
    "r2.dev",
    "run.app",
    "s3.amazonaws.com",
    "storage.googleapis.com",
    "trycloudflare.com",
    "vercel.app",
    "web.app",
    "workers.dev",
];

/// Ports whose protocols do not start with a ClientHello.
const NOT_TLS: &[(u16, &str)] = &[
    (21, "FTP"),
    (22, "SSH"),
    (25, "SMTP"),
    (110, "POP3"),
    (143, "IMAP"),
    (389, "LDAP"),
    (587, "SMTP submission"),
    (1433, "SQL Server"),
    (3306, "MySQL"),
    (5432, "PostgreSQL"),
];

/// What is spoken on a port, where that does not start with a ClientHello.
pub fn not_tls(port: u16) -> Option<&'static str> {
    if port == 80 {
        return Some("plain HTTP");
    }
    NOT_TLS.iter().find(|(p, _)| *p == port).map(|(_, what)| *what)
}

/// Lints a pattern that is granted.
pub(crate) fn pattern(ctx: &mut Ctx, text: &str) {
    let (Ok(p), Ok(lints)) = (Pattern::parse(text), Pattern::lint_text(text)) else {
        return;
    };
    let suffix = p.literal_suffix();
    if !lints.contains(&Lint::PublicSuffix) && !p.is_exact() && SHARED_SUFFIXES.contains(&suffix) {
        ctx.warn(Code::Broad, format!("is a wildcard right below `{suffix}`, where anyone can have a name"));
    }
    for l in lints {
        ctx.warn(Code::Broad, l.to_string());
    }
}

/// Lints a rule that grants.
pub(crate) fn grant(ctx: &mut Ctx, rule: &model::Rule) {
    if rule.fqdns.is_empty() {
        return;
    }
    let covers =
        |proto: Proto, port: u16| rule.ports.iter().any(|p| p.proto == Some(proto) && (p.lo..=p.hi).contains(&port));
    if covers(Proto::Udp, 443) && !covers(Proto::Tcp, 443) {
        ctx.field("toPorts", |ctx| {
            ctx.warn(Code::NoEffect, "allows UDP 443 alone, and QUIC is blocked until it is inspected; add TCP 443");
        });
    }
    if rule.sni != model::SniMode::Required {
        return;
    }
    for (i, p) in rule.ports.iter().enumerate() {
        if p.proto != Some(Proto::Tcp) {
            continue;
        }
        let found = if (p.lo..=p.hi).contains(&80) {
            Some((80, "plain HTTP"))
        } else {
            NOT_TLS.iter().copied().find(|(port, _)| p.lo == p.hi && p.lo == *port)
        };
        if let Some((port, what)) = found {
            let until = if port == 80 { " until HTTP is inspected" } else { "" };
            ctx.field("toPorts", |ctx| {
                ctx.item(i, None, |ctx| {
                    ctx.warn(
                        Code::NotTls,
                        format!(
                            "port {port} is {what}, which is refused as not-tls{until}; \
                             put it into a rule with `sni: Unchecked` (then name, address and port are bound, not the SNI)"
                        ),
                    );
                });
            });
        }
    }
}
