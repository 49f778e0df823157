#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

const CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"k8s","type":"tidegate-cni","folder":"/f","prevResult":
 {"cniVersion":"1.1.0", "interfaces":[{"name":"veth1","sandbox":""}],"ips":[{"address":"10.244.1.5/24","gateway":"10.244.1.1"},{"address":"fd00::5/64"}],"dns":{}}}"#;
const ARGS: &str =
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=a-b-1";

fn variable(name: &str) -> Option<String> {
    let value = match name {
        "CNI_COMMAND" => "ADD",
        "CNI_CONTAINERID" => "abc123",
        "CNI_NETNS" => "/run/netns/x",
        "CNI_IFNAME" => "eth0",
        "CNI_ARGS" => ARGS,
        _ => return None,
    };
    Some(value.into())
}

fn but<'a>(name: &'a str, value: Option<&'a str>) -> impl Fn(&str) -> Option<String> + 'a {
    move |n| if n == name { value.map(str::to_owned) } else { variable(n) }
}

#[test]
fn a_pod_is_read() {
    let call = Call::read(variable, CONFIG.as_bytes()).unwrap();
    assert_eq!(call.command, Command::Add);
    assert_eq!(call.version, "1.1.0");
    let pod = call.pod.unwrap();
    assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str()), ("shop", "web-0", "a-b-1"));
    let ips: Vec<String> = call.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["10.244.1.5", "fd00::5"]);
    assert_eq!(call.paths, Paths { folder: "/f".into(), ..Paths::default() });
    // As it came.
    assert!(CONFIG.contains(&call.result.unwrap()));
}

#[test]
fn what_is_wrong_is_named() {
    let of = |v: &dyn Fn(&str) -> Option<String>, text: &str| {
        let e = Call::read(v, text.as_bytes()).unwrap_err();
        (e.code, e.msg)
    };
    let env = |name: &'static str| (code::ENVIRONMENT, name.to_owned());
    for (name, value) in [
        ("CNI_COMMAND", None),
        ("CNI_COMMAND", Some("PLAY")),
        ("CNI_CONTAINERID", None),
        ("CNI_CONTAINERID", Some("../x")),
        ("CNI_CONTAINERID", Some("-x")),
        ("CNI_IFNAME", Some("a/b")),
        ("CNI_IFNAME", Some("sixteen-letters-")),
        ("CNI_NETNS", None),
        ("CNI_ARGS", None),
        ("CNI_ARGS", Some("K8S_POD_NAMESPACE=shop")),
        ("CNI_ARGS", Some("K8S_POD_NAMESPACE=Shop;K8S_POD_NAME=x")),
        ("CNI_ARGS", Some("K8S_POD_NAMESPACE=a;K8S_POD_NAME=x;K8S_POD_UID=/")),
    ] {
        assert_eq!(of(&but(name, value), CONFIG), env(name), "{name}={value:?}");
    }
    let config = |from: &str, to: &str| of(&variable, &CONFIG.replacen(from, to, 1));
    assert_eq!(of(&variable, "{").0, code::DECODE);
    assert_eq!(config("1.1.0", "9.0.0"), (code::VERSION, "cniVersion".into()));
    assert_eq!(config("prevResult", "result"), (code::CONFIG, "prevResult".into()));
    assert_eq!(config("10.244.1.5/24", "10.244.1.5.6"), (code::CONFIG, "prevResult.ips.address".into()));
    assert_eq!(config("10.244.1.5/24", "127.0.0.1/8"), (code::CONFIG, "prevResult.ips.address".into()));
    assert_eq!(config("\"ips\"", "\"no\""), (code::CONFIG, "prevResult.ips".into()));
    assert_eq!(config("\"/f\"", "\"f\""), (code::CONFIG, "folder".into()));
    assert_eq!(config("\"/f\"", "7").0, code::DECODE);
    let long = vec![b' '; MAX_INPUT + 1];
    assert_eq!(Call::read(variable, &long).unwrap_err().code, code::DECODE);
}

#[test]
fn errors_are_as_the_specification_writes_them() {
    let e = Call::read(but("CNI_IFNAME", Some("")), CONFIG.replace("1.1.0", "0.4.0").as_bytes()).unwrap_err();
    let text = serde_json::to_value(&e).unwrap();
    assert_eq!((text["cniVersion"].as_str(), text["code"].as_u64()), (Some("0.4.0"), Some(4)));
    assert_eq!(text["msg"], "CNI_IFNAME");
    assert!(text["details"].is_string());
}

#[test]
fn the_other_commands_need_less() {
    let command = |c| but("CNI_COMMAND", Some(c));
    let del = Call::read(command("DEL"), br#"{"cniVersion":"0.4.0","name":"x","type":"y"}"#).unwrap();
    assert_eq!((del.command, del.pod, del.result), (Command::Del, None, None));
    let without = |n: &str| if n == "CNI_NETNS" { None } else { command("DEL")(n) };
    assert_eq!(Call::read(without, br#"{"cniVersion":"0.4.0"}"#).unwrap().netns, None);
    let gc = br#"{"cniVersion":"1.1.0","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#;
    assert_eq!(Call::read(command("GC"), gc).unwrap().left.len(), 1);
    let bad = br#"{"cniVersion":"1.1.0","cni.dev/valid-attachments":[{"containerID":"/","ifname":"eth0"}]}"#;
    assert_eq!(Call::read(command("GC"), bad).unwrap_err().msg, "cni.dev/valid-attachments");
    assert_eq!(Call::read(command("STATUS"), br#"{"cniVersion":"1.1.0"}"#).unwrap().command, Command::Status);
    let version = Call::read(command("VERSION"), br#"{"cniVersion":"0.1.0"}"#).unwrap();
    assert_eq!(version.command, Command::Version);
    assert!(versions(&version.version).contains("supportedVersions"));
}
