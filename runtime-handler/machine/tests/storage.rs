//! Images and disks made for real: merged layers come out of the EROFS file as overlayfs
//! shows them, concurrent conversions make one file, the pod's disk stays sparse.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use dyad_machine::storage::apply::{self, QemuUser};
use dyad_machine::storage::plan::RootPlan;

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn plan(layers: &[&Path], upper: Option<&Path>) -> RootPlan {
    RootPlan {
        layers: layers.iter().map(|layer| layer.to_path_buf()).collect(),
        upper: upper.map(Path::to_path_buf),
        private: false,
    }
}

/// The names in an image, read by the tool that checks it.
fn list(image: &Path) -> String {
    let output = Command::new("dump.erofs")
        .arg("--path=/")
        .arg("--ls")
        .arg(image)
        .output()
        .expect("dump.erofs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn whiteout(path: &Path) {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    mknod(path, SFlag::S_IFCHR, Mode::empty(), makedev(0, 0)).expect("whiteout");
}

#[tokio::test]
async fn layers_are_merged_and_converted_once() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let (base, top) = (dir.path().join("1/fs"), dir.path().join("2/fs"));
    for layer in [&base, &top] {
        fs::create_dir_all(layer).expect("dir");
    }
    fs::write(base.join("kept"), "base").expect("file");
    fs::write(base.join("removed"), "base").expect("file");
    fs::write(top.join("added"), "top").expect("file");
    whiteout(&top.join("removed"));
    let upper = dir.path().join("3/fs");
    fs::create_dir_all(&upper).expect("dir");

    let (images, private) = (dir.path().join("images"), dir.path().join("private"));
    let owner = QemuUser {
        uid: 64055,
        gid: 64055,
    };
    let convert = || {
        apply::image(
            plan(&[&top, &base], Some(&upper)),
            images.clone(),
            private.clone(),
            Some(owner),
        )
    };
    let (one, two, three) = tokio::join!(convert(), convert(), convert());
    let one = one.expect("image");
    assert_eq!(one, two.expect("image"));
    assert_eq!(one, three.expect("image"));
    assert!(!one.private);
    let meta = fs::metadata(&one.file).expect("file");
    assert_eq!((meta.uid(), meta.gid()), (0, owner.gid));
    assert_eq!(meta.permissions().mode() & 0o777, 0o440);
    assert_eq!(meta.len() % 4096, 0, "whole blocks");
    let names = list(&one.file);
    assert!(names.contains("kept") && names.contains("added"), "{names}");
    assert!(!names.contains("removed"), "{names}");
    // Nothing but the image, the list of its layers and the empty mount point, and nothing
    // mounted.
    let mut left: Vec<PathBuf> = fs::read_dir(&images)
        .expect("dir")
        .map(|entry| entry.expect("entry").path())
        .collect();
    left.retain(|path| !path.ends_with(".view"));
    left.sort();
    assert_eq!(left, [one.file.clone(), one.file.with_extension("layers")]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(images.to_str().expect("utf-8")));

    // What the container's own layer holds belongs to its root, and to nobody else's.
    fs::write(upper.join("own"), "x").expect("file");
    let own = convert().await.expect("image");
    assert!(own.private && own.file.starts_with(&private));
    assert!(list(&own.file).contains("own"));
}

#[tokio::test]
async fn files_keep_their_times_and_two_unpackings_give_the_same_bytes() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    let mut made = Vec::new();
    for unpacking in ["one", "two"] {
        // The folder is made as the need arises, so its time is another each time.
        let layer = dir.path().join(unpacking).join("fs");
        fs::create_dir_all(layer.join("implied")).expect("dir");
        let stamp = fs::File::create(layer.join("implied/stamp")).expect("file");
        std::io::Write::write_all(&mut &stamp, b"x").expect("written");
        stamp.set_modified(at).expect("time");
        fs::hard_link(layer.join("implied/stamp"), layer.join("linked")).expect("link");
        let (images, private) = (
            dir.path().join(format!("{unpacking}-i")),
            dir.path().join("p"),
        );
        let image = apply::image(plan(&[&layer], None), images, private, None).await;
        made.push(image.expect("image").file);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let bytes = |file: &PathBuf| fs::read(file).expect("image");
    assert!(bytes(&made[0]) == bytes(&made[1]), "the images differ");
    let told = |path: &str| {
        let output = Command::new("dump.erofs")
            .env("TZ", "UTC")
            .arg(format!("--path={path}"))
            .arg(&made[0])
            .output()
            .expect("dump.erofs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for path in ["/implied/stamp", "/implied", "/"] {
        assert!(told(path).contains("2023-11-14 22:13:20"), "{}", told(path));
    }
    assert!(told("/linked").contains("Links: 2"), "{}", told("/linked"));
}

#[tokio::test]
async fn many_layers_fit_the_kernel_s_option_page() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let long = dir.path().join(
        "a-rather-long-name-as-snapshotters-have-them-io.containerd.snapshotter.v1.overlayfs",
    );
    let layers: Vec<PathBuf> = (0..60)
        .map(|n| long.join(format!("snapshots/{n}/fs")))
        .collect();
    for (n, layer) in layers.iter().enumerate() {
        fs::create_dir_all(layer).expect("dir");
        fs::write(layer.join(format!("file-{n}")), "x").expect("file");
    }
    let plan = RootPlan {
        layers,
        upper: None,
        private: false,
    };
    let before = std::env::current_dir().expect("cwd");
    let image = apply::image(plan, dir.path().join("images"), dir.path().join("p"), None)
        .await
        .expect("image");
    let names = list(&image.file);
    assert!(
        names.contains("file-0") && names.contains("file-59"),
        "{names}"
    );
    assert_eq!(std::env::current_dir().expect("cwd"), before);
}

#[tokio::test]
async fn a_layer_that_is_gone_is_named_and_nothing_stays() {
    let dir = tempfile::tempdir().expect("dir");
    let images = dir.path().join("images");
    let gone = dir.path().join("no-such-layer");
    let error = apply::image(plan(&[&gone], None), images.clone(), images.clone(), None)
        .await
        .expect_err("refused");
    assert!(error.chain().contains("no-such-layer"), "{}", error.chain());
    assert!(!images.exists());
}

#[tokio::test]
async fn the_pod_s_disk_is_a_sparse_filesystem_of_the_size_asked_for() {
    let dir = tempfile::tempdir().expect("dir");
    let disk = dir.path().join("disk.img");
    apply::pod_disk(disk.clone(), 10, None, true)
        .await
        .expect("disk");
    let meta = fs::metadata(&disk).expect("file");
    assert_eq!(meta.len(), 10 << 30);
    assert!(
        meta.blocks() * 512 < 16 << 20,
        "{} bytes used",
        meta.blocks() * 512
    );
    let magic = fs::File::open(&disk)
        .and_then(|file| {
            use std::os::unix::fs::FileExt;
            let mut magic = [0; 2];
            file.read_exact_at(&mut magic, 0x438)?;
            Ok(magic)
        })
        .expect("superblock");
    assert_eq!(magic, [0x53, 0xef], "ext4's magic");
}
