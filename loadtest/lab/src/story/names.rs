//! Points about names.

use anyhow::Result;

use super::{Story, named};
use crate::probe;

/// 2: not allowed, whatever server the pod asks.
pub fn denied(s: &mut Story<'_>) -> Result<()> {
    let reasons = &["name-not-allowed", "not-allowed"];
    let asked = s.lab.internet_queries()?.len();
    for family in s.families() {
        let kind = family.record();
        s.denied("shop/web", "other.example.org", kind, &[], reasons)?;
        s.denied("shop/web", "other.example.org", kind, &["+tcp"], reasons)?;
        let public = format!("@{}", family.pick("198.51.100.153", "2001:db8:100::153"));
        s.denied("shop/web", "other.example.org", kind, &[&public], reasons)?;
        s.denied("shop/web", "other.example.org", kind, &[&public, "+tcp"], reasons)?;
        // A server that does not exist answers too, for what is allowed.
        let nobody = format!("@{}", family.pick("192.0.2.254", "2001:db8:200::254"));
        let seen = probe::dig(&s.place("shop/web")?, "api.example.com", kind, &[&nobody]);
        let want = named(family, 10, 0).ip().to_string();
        s.check(
            "shop/web",
            &format!("dig api.example.com {kind} {nobody}"),
            &want,
            seen.text(),
            seen.answers == [want.clone()],
        );
    }
    for (name, kind) in
        [("many.example.net", "A"), ("example.com", "AAAA"), ("api.example.com", "MX"), ("api.example.com", "TXT")]
    {
        for more in [&[][..], &["+tcp"]] {
            let seen = probe::dig(&s.place("shop/web")?, name, kind, more);
            s.check(
                "shop/web",
                &format!("dig {name} {kind} {}", more.join(" ")),
                "NODATA with SOA",
                seen.text(),
                seen.is_no_data() && seen.soa,
            );
        }
    }
    let seen = probe::dig(&s.place("shop/web")?, "other.example.org", "A", &["+noedns"]);
    s.check(
        "shop/web",
        "dig other.example.org A +noedns",
        "NXDOMAIN without EDE",
        seen.text(),
        seen.status == "NXDOMAIN" && seen.ede.is_none(),
    );
    for family in s.families() {
        let kind = family.record();
        let seen = probe::dig(&s.place("shop/web")?, "rebind.example.com", kind, &[]);
        let tried = format!("dig rebind.example.com {kind}");
        s.check("shop/web", &tried, "NODATA, its address is the cluster's", seen.text(), seen.is_no_data());
    }
    // Nothing that was denied went to the internet's servers, nor anything to the server that the pod chose.
    let own = s.families().into_iter().map(|f| Ok(s.outside("shop/web", f)?.to_string()));
    let own = own.collect::<Result<Vec<_>>>()?;
    let new: Vec<_> = s.lab.internet_queries()?.into_iter().skip(asked).collect();
    let stray = new.iter().find(|q| {
        let public = q["server"] == "198.51.100.153" || q["server"] == "2001:db8:100::153";
        let source = q["client"].as_str().unwrap_or_default();
        public && own.iter().any(|ip| ip == source)
    });
    s.check("internet", "the public resolver's log", "no query of shop/web", format!("{stray:?}"), stray.is_none());
    let leaked = new.iter().find(|q| q["name"] == "other.example.org");
    s.check(
        "internet",
        "the log of every server",
        "no query for other.example.org",
        format!("{leaked:?}"),
        leaked.is_none(),
    );
    Ok(())
}

/// 5: another SNI than the address's.
pub fn other_sni(s: &mut Story<'_>) -> Result<()> {
    for family in s.families() {
        for name in ["api.example.com", "www.example.com"] {
            s.resolve("shop/web", family, name)?;
        }
        let to = named(family, 10, 443).ip();
        // Not allowed at all, and allowed at another address; both are served there.
        for sni in ["neighbour.example.com", "www.example.com"] {
            let why = s.at_gateways(&["sni-mismatch", "name-not-allowed"], sni);
            let pinned = format!("{sni}:443:{}", family.pick(to.to_string(), format!("[{to}]")));
            let url = format!("https://{sni}/");
            let seen = probe::curl(&s.place("shop/web")?, family, &url, &["--resolve", &pinned]);
            let tried = format!("curl --resolve {pinned} {url}");
            s.check_why("shop/web", &tried, "a reset", seen.text(), matches!(seen.exit, 35 | 56), &why);
        }
    }
    for family in s.families() {
        let to = named(family, 10, 443).ip();
        let why = s.at_gateways(&["sni-missing", "sni-is-ip"], to.to_string());
        let url = format!("https://{}/", family.pick(to.to_string(), format!("[{to}]")));
        let seen = probe::curl(&s.place("shop/web")?, family, &url, &["-k"]);
        s.check_why("shop/web", &format!("curl -k {url}"), "a reset", seen.text(), matches!(seen.exit, 35 | 56), &why);
    }
    Ok(())
}
