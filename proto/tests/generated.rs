//! The committed code is what the contract gives.

use std::path::Path;

#[test]
fn the_generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let set = protox::compile(["tidegate.proto"], [root]).expect("the contract compiles");
    let out = tempfile::tempdir().expect("a temporary folder");
    tonic_prost_build::configure().out_dir(out.path()).compile_fds(set).expect("the contract generates");
    let fresh = std::fs::read_to_string(out.path().join("tidegate.v1.rs")).expect("one file per package");
    let path = root.join("src/generated.rs");
    if std::env::var_os("UPDATE_PROTO").is_some_and(|v| v == "1") {
        std::fs::write(&path, &fresh).expect("the tree is writable");
    }
    let committed = std::fs::read_to_string(&path).expect("the generated code is committed");
    assert!(
        committed == fresh,
        "src/generated.rs is not what tidegate.proto gives; run UPDATE_PROTO=1 cargo test -p tidegate-proto --test generated"
    );
}
