//! Generates the messages and the service of `proto/lifecycle.proto`, and the messages of
//! `proto/cri.proto`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/lifecycle.proto");
    println!("cargo:rerun-if-changed=proto/cri.proto");
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .input("proto/lifecycle.proto")
        .input("proto/cri.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generator lists the messages only.
    std::fs::write(
        format!("{out}/mod.rs"),
        "pub mod cri;\npub mod lifecycle;\npub mod lifecycle_ttrpc;\n",
    )?;
    Ok(())
}
