//! Generates the messages and the service of `proto/lifecycle.proto`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/lifecycle.proto");
    Codegen::new()
        .out_dir(std::env::var("OUT_DIR")?)
        .input("proto/lifecycle.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    Ok(())
}
