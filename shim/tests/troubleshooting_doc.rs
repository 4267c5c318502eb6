//! docs/troubleshooting.md quotes error texts. A text that is quoted is one that the code prints.

use std::fs;
use std::path::Path;

/// Texts and commands of other programs, not ours.
const OF_OTHERS: [&str; 3] = [
    "didn't match Pod's node affinity/selector",
    "can't get final child's PID from pipe: EOF",
    "kubectl ",
];

#[test]
fn every_quoted_text_is_in_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut code = String::new();
    for room in ["runtime-handler", "shim", "hack"] {
        read_all(&root.join(room), &mut code);
    }
    let page = fs::read_to_string(root.join("docs/troubleshooting.md")).unwrap();
    let mut quoted = 0;
    for row in page.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let symptom = row.split(" | ").next().unwrap_or_default();
        for text in symptom.split('`').skip(1).step_by(2) {
            if OF_OTHERS.iter().any(|other| text.contains(other)) {
                continue;
            }
            for part in text.split('…').map(str::trim).filter(|part| part.len() > 3) {
                quoted += 1;
                assert!(
                    code.contains(part),
                    "docs/troubleshooting.md quotes {text:?}; no source has {part:?}"
                );
            }
        }
    }
    assert!(quoted > 10, "only {quoted} quoted texts were found");
}

/// Adds every source below `dir`, each on one line where a string literal goes on in the next.
fn read_all(dir: &Path, code: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                read_all(&path, code);
            }
            continue;
        }
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            match line.strip_suffix('\\') {
                Some(start) => {
                    code.push_str(start);
                    if let Some(next) = lines.peek_mut() {
                        *next = next.trim_start();
                    }
                }
                None => {
                    code.push_str(line);
                    code.push('\n');
                }
            }
        }
    }
}
