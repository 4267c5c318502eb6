//! Trees that go from one end of a connection to the other.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, mknodat};

use super::super::wire::{CHUNK, Message, Place, Wire};
use super::send::stamp;
use super::*;

fn place() -> Place {
    Place::Layer {
        container: "c".into(),
    }
}

/// One pass from `from` to `to`; how many bytes of files went.
async fn pass(from: &Path, to: &Path, sent: &mut Sent) -> Result<u64> {
    let (a, b) = tokio::io::duplex(64 << 10);
    let (mut a, mut b) = (Wire::new(a), Wire::new(b));
    tokio::try_join!(send(&mut a, place(), from, sent, |_| {}), async {
        assert_eq!(b.receive().await?, Message::Tree { place: place() });
        Receiver::new(to)?.receive(&mut b, |_| {}).await
    })?;
    Ok(a.data_bytes)
}

fn listing(root: &Path) -> Vec<String> {
    scan(root)
        .unwrap()
        .iter()
        .map(|(path, metadata)| {
            let content = match metadata.is_file() {
                true => fs::read(root.join(path)).unwrap().len(),
                false => 0,
            };
            format!(
                "{} {:o} {}:{} {}.{} {} {} {:?}",
                path.display(),
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.rdev(),
                content,
                metadata.is_file().then(|| metadata.nlink())
            )
        })
        .collect()
}

pub(super) fn needs_root() {
    assert!(nix::unistd::geteuid().is_root(), "makes device files");
}

#[tokio::test]
async fn a_tree_is_made_again_and_then_only_what_changed_goes() {
    needs_root();
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("a"), temp.path().join("b"));
    fs::create_dir_all(from.join("d/e")).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("d/big"), vec![7; 3 * CHUNK + 5]).unwrap();
    File::create(from.join("sparse"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    fs::write(from.join("empty"), "").unwrap();
    fs::hard_link(from.join("d/big"), from.join("hard")).unwrap();
    symlink("/etc/shadow", from.join("link")).unwrap();
    let odd = OsStr::from_bytes(b"odd%\xff name");
    fs::write(from.join(odd), "x").unwrap();
    fs::set_permissions(from.join(odd), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(from.join("d/e"), Some(1000), Some(1001)).unwrap();
    mknodat(
        AT_FDCWD,
        &from.join("gone"),
        SFlag::S_IFCHR,
        Mode::empty(),
        0,
    )
    .unwrap();
    nix::unistd::mkfifo(&from.join("fifo"), Mode::S_IRUSR).unwrap();
    xattr::set(from.join("d/e"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(from.join("d/e"), "trusted.overlay.origin", b"here").unwrap();

    let mut sent = Sent::default();
    pass(&from, &to, &mut sent).await.unwrap();
    assert_eq!(listing(&to), listing(&from));
    let opaque = xattr::get(to.join("d/e"), "trusted.overlay.opaque").unwrap();
    assert_eq!(opaque.as_deref(), Some(&b"y"[..]));
    assert_eq!(
        xattr::get(to.join("d/e"), "trusted.overlay.origin").unwrap(),
        None
    );
    assert_eq!(fs::metadata(to.join("sparse")).unwrap().blocks(), 0);

    // As if those were older than a moment.
    for (path, metadata) in scan(&from).unwrap() {
        sent.0.insert(path, Some(stamp(&metadata)));
    }
    fs::write(from.join("d/new"), "12345").unwrap();
    fs::remove_dir_all(from.join("d/e")).unwrap();
    fs::remove_file(from.join("link")).unwrap();
    fs::create_dir(from.join("link")).unwrap();
    fs::remove_file(from.join("fifo")).unwrap();
    assert_eq!(pass(&from, &to, &mut sent).await.unwrap(), 5);
    assert_eq!(listing(&to), listing(&from));

    sent.distrust();
    let all = pass(&from, &to, &mut sent).await.unwrap();
    assert!(all > 3 * CHUNK as u64, "{all}");
    assert_eq!(listing(&to), listing(&from));
}

/// A container may do this while the source, which is root, reads its files.
#[tokio::test]
async fn a_directory_swapped_for_a_link_never_makes_another_ones_files_go() {
    needs_root();
    /// Also where an assertion fails.
    struct Stop(
        std::sync::Arc<AtomicBool>,
        Option<std::thread::JoinHandle<()>>,
    );
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
            self.1.take().map(std::thread::JoinHandle::join);
        }
    }
    let temp = tempfile::tempdir().unwrap();
    let (from, secrets) = (temp.path().join("a"), temp.path().join("secrets"));
    fs::create_dir_all(from.join("d")).unwrap();
    fs::create_dir(&secrets).unwrap();
    for number in 0..200 {
        fs::write(from.join(format!("d/{number}")), "own").unwrap();
        fs::write(secrets.join(number.to_string()), "the host's").unwrap();
    }
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    symlink(&secrets, from.join("link")).unwrap();
    let (dir, link, told) = (from.join("d"), from.join("link"), stop.clone());
    let swapper = std::thread::spawn(move || {
        let exchange = || {
            let flags = RenameFlags::RENAME_EXCHANGE;
            renameat2(AT_FDCWD, &dir, AT_FDCWD, &link, flags).unwrap();
        };
        while !told.load(Ordering::Relaxed) {
            exchange();
            exchange();
        }
    });
    let stop = Stop(stop, Some(swapper));
    // Links are copied as links: what they lead to is not read here.
    let contents = |root: &Path| -> Vec<_> {
        let files = scan(root).unwrap().into_iter();
        files
            .filter(|(_, metadata)| metadata.is_file())
            .map(|(path, _)| (fs::read(root.join(&path)).unwrap(), path))
            .collect()
    };
    let mut sent = Sent::default();
    let to = temp.path().join("b");
    fs::create_dir(&to).unwrap();
    for _ in 0..20 {
        // A receiver may refuse what fits together no more; then the pod stays.
        if pass(&from, &to, &mut sent).await.is_err() {
            sent = Sent::default();
            fs::remove_dir_all(&to).unwrap();
            fs::create_dir(&to).unwrap();
        }
        for (content, path) in contents(&to) {
            assert_eq!(content, b"own", "{}", path.display());
        }
    }
    // The container is frozen: what is sent now is whole.
    drop(stop);
    pass(&from, &to, &mut sent).await.unwrap();
    assert_eq!(contents(&to), contents(&from));
    assert_eq!(contents(&to).len(), 200);
}

#[test]
fn any_bytes_survive_as_text() {
    for bytes in [
        &b""[..],
        b"a b",
        b"%",
        b"\xff\xfe%41",
        "ü\n\"".as_bytes(),
        b"\0x",
    ] {
        let text = escape(bytes);
        assert_eq!(unescape(&text).unwrap().as_bytes(), bytes, "{text}");
    }
    for text in ["%", "%4", "%zz", "a%+1", "%é"] {
        assert!(unescape(text).is_err(), "{text}");
    }
}

#[test]
fn paths_that_leave_the_tree_are_refused() {
    for path in [
        "",
        "/",
        "/etc",
        "..",
        "a/../b",
        "../x",
        "./..",
        "a%00b",
        "a/./../..",
        "%2e%2e/x",
    ] {
        assert!(below(path).is_err(), "{path}");
    }
    for path in ["a", "a/b", "..a", "a..", " "] {
        assert!(below(path).is_ok(), "{path}");
    }
}
