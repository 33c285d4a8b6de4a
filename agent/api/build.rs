//! Generates the ttrpc types, client and service from `proto/agent.proto`; no `protoc` needed.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generated files open with inner attributes, which `include!` does not take: name them as modules.
    let modules: String = ["agent", "agent_ttrpc"]
        .map(|m| {
            format!("#[path = {:?}]\npub mod {m};\n", Path::new(&out).join(m).with_extension("rs"))
        })
        .concat();
    fs::write(Path::new(&out).join("modules.rs"), modules)
}
