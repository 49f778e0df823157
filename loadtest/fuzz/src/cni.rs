//! What a container runtime writes to the CNI plugin, what the plugin writes to the agent, and the node's own network
//! configuration, which others write.

use serde_json::Value;
use tidegate_cni::conflist::{self, TYPE};
use tidegate_cni::spec::{Call, Paths};
use tidegate_cni::wire;

fn variable(name: &str) -> Option<String> {
    let value = match name {
        "CNI_COMMAND" => "ADD",
        "CNI_CONTAINERID" => "c1",
        "CNI_NETNS" => "/run/netns/x",
        "CNI_IFNAME" => "eth0",
        "CNI_ARGS" => "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
        _ => return None,
    };
    Some(value.into())
}

/// The plugins of a list but ours.
fn others(text: &str) -> Vec<Value> {
    let list: Value = serde_json::from_str(text).unwrap();
    list["plugins"].as_array().unwrap().iter().filter(|p| p["type"] != TYPE).cloned().collect()
}

/// Standard input of an ADD, a line to the agent, or a list of plugins: whatever the octets are good for.
pub fn cni(data: &[u8]) -> bool {
    let mut taken = wire::request(data).is_ok();
    match Call::read(variable, data) {
        Ok(call) => {
            let text = std::str::from_utf8(data).expect("JSON is UTF-8");
            assert!(
                text.contains(&call.result.expect("an ADD hands a result on")),
                "the result is handed on as it came"
            );
            assert!((1..=16).contains(&call.addresses.len()) && call.pod.is_some());
            taken = true;
        }
        Err(error) => assert!(!error.msg.is_empty() && error.code > 0, "{error:?}"),
    }
    let Ok(text) = std::str::from_utf8(data) else { return taken };
    let entry = conflist::entry(&Paths::default());
    if let Ok(Some(new)) = conflist::with(text, &entry) {
        assert_eq!(conflist::with(&new, &entry), Ok(None), "once is enough");
        assert_eq!(others(&new), others(text), "others' entries stay as they are");
        let back = conflist::without(&new).unwrap().expect("it was there");
        match conflist::without(text).unwrap() {
            None => assert_eq!(back, text, "nothing is left of it"),
            Some(_) => assert_eq!(others(&back), others(text)),
        }
        taken = true;
    }
    taken
}
