//! The disk with the guest kernel's modules, which its agent loads on demand.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::config::MachineConfig;
use dyad_runtime_handler::error::{Context, Result};

use crate::domain::ModulesDisk;

/// What `hack/guest` writes beside the initramfs.
const FILE: &str = "modules.erofs";
/// For people who look at the guest's disks.
const SERIAL_PREFIX: &str = "modules-";
/// A SCSI serial has 36 characters.
const SERIAL_UUID_BYTES: usize = 12;
/// `EROFS_SUPER_OFFSET`, `EROFS_SUPER_MAGIC_V1` and the place of the UUID in the superblock
/// (fs/erofs/erofs_fs.h).
const SUPERBLOCK: u64 = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
const UUID: std::ops::Range<usize> = 48..64;

/// The disk, where there is one.
///
/// # Errors
/// `InvalidArgument`: the configuration names a file that is none.
pub fn disk(config: &MachineConfig) -> Result<Option<ModulesDisk>> {
    match &config.modules {
        Some(file) => read(file).map(Some),
        None => {
            let file = config.initramfs.with_file_name(FILE);
            if file.exists() {
                read(&file).map(Some)
            } else {
                Ok(None)
            }
        }
    }
}

/// The serial is the image's UUID, which is made from its content: a machine that moves finds
/// what it has mounted.
fn read(file: &Path) -> Result<ModulesDisk> {
    let mut block = [0; UUID.end];
    let opened =
        File::open(file).context(|| format!("machine.modules: open {}", file.display()))?;
    match opened.read_exact_at(&mut block, SUPERBLOCK) {
        Ok(()) if block[..MAGIC.len()] == MAGIC => {}
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => {
            return Err(error).context(|| format!("machine.modules: read {}", file.display()));
        }
        Ok(()) | Err(_) => {
            return Err(Error::InvalidArgument(format!(
                "machine.modules {}: is no EROFS image; build it with hack/guest",
                file.display()
            )));
        }
    }
    let uuid = &block[UUID][..SERIAL_UUID_BYTES];
    let digits: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(ModulesDisk {
        file: PathBuf::from(file),
        serial: format!("{SERIAL_PREFIX}{digits}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path, modules: Option<PathBuf>) -> MachineConfig {
        MachineConfig {
            initramfs: folder.join("initramfs.zst"),
            modules,
            ..MachineConfig::default()
        }
    }

    #[test]
    fn it_is_beside_the_initramfs_or_where_the_configuration_says() {
        let folder = tempfile::tempdir().expect("folder");
        let folder = folder.path();
        assert_eq!(disk(&config(folder, None)).expect("none"), None);
        let named = folder.join("named.erofs");
        let missing = disk(&config(folder, Some(named.clone()))).expect_err("missing");
        assert!(
            missing.chain().contains("named.erofs"),
            "{}",
            missing.chain()
        );
        std::fs::write(&named, "short").expect("write");
        let error = disk(&config(folder, Some(named))).expect_err("refused");
        assert!(error.to_string().contains("EROFS"), "{error}");

        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&MAGIC);
        image[1024 + 48..1024 + 64].copy_from_slice(&[0xab; 16]);
        std::fs::write(folder.join(FILE), image).expect("write");
        let found = disk(&config(folder, None)).expect("found").expect("there");
        assert_eq!(found.serial, format!("modules-{}", "ab".repeat(12)));
        assert!(found.serial.len() <= 36);
    }
}
