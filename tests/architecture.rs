//! Holds the code to what docs/ARCHITECTURE.md says of it: which modules know nothing of what, how
//! files open, how long they get, and that docs/SEMANTICS.md names tests that exist.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

/// The longest a source file may get, in lines.
const MAX_LINES: usize = 600;

/// What the pure modules may not mention: IO, databases, runtimes, clocks, and the modules that
/// have to do with them.
const IMPURE: &[&str] = &[
    "fuser",
    "rusqlite",
    "mysql_async",
    "tokio",
    "tracing",
    "libc",
    "std::env",
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "SystemTime::now",
    "Instant",
    "crate::cli",
    "crate::config",
    "crate::daemon",
    "crate::executive",
    "crate::ldb",
    "crate::ledger",
    "crate::mount",
    "crate::reflector",
    "crate::status",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `dir`, in order.
fn rust_files(dir: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs = vec![root().join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("cannot list {dir:?}: {e}")) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "no Rust files below {dir}");
    files
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("cannot read {path:?}: {e}"))
}

/// The numbered lines of a file that are code, without comments at their end.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or_default()))
}

/// Whether `line` has `word` with no letter, digit or '_' around it.
fn has_word(line: &str, word: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(inside) && !after.is_some_and(inside)
    })
}

/// What stands in each `use std::{…};`.
fn grouped_std_imports(text: &str) -> Vec<String> {
    let code: String = code(text).map(|(_, line)| line).collect();
    code.split("use std::{")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once(';')?.0.to_owned()))
        .collect()
}

#[test]
fn imports_are_found_however_they_are_written() {
    assert!(has_word("use std::fs;", "std::fs"));
    assert!(has_word("let t = Instant::now();", "Instant"));
    assert!(!has_word("let InstantNoodles = 1;", "Instant"));
    let grouped = grouped_std_imports("use std::{\n    fmt,\n    fs::File,\n};\n");
    assert_eq!(grouped.len(), 1);
    assert!(has_word(&grouped[0], "fs"));
    assert!(code("let a = 1; // std::fs").all(|(_, line)| !has_word(line, "std::fs")));
}

#[test]
fn pure_modules_do_no_io_and_read_no_clock() {
    let mut found = Vec::new();
    for dir in ["src/model", "src/tree"] {
        for path in rust_files(dir) {
            for (number, line) in code(&read(&path)) {
                for word in IMPURE.iter().filter(|w| has_word(line, w)) {
                    found.push(format!("{}:{number}: {word}", path.display()));
                }
            }
        }
    }
    for path in ["src/model", "src/tree"].into_iter().flat_map(rust_files) {
        for import in grouped_std_imports(&read(&path)) {
            for module in ["env", "fs", "net", "os", "process", "thread"] {
                if has_word(&import, module) {
                    found.push(format!("{}: std::{module}", path.display()));
                }
            }
        }
    }
    assert!(
        found.is_empty(),
        "model and tree are pure; these lines are not:\n{}",
        found.join("\n")
    );
}

#[test]
fn model_depends_on_no_other_module() {
    let mut found = Vec::new();
    for path in rust_files("src/model") {
        for (number, line) in code(&read(&path)) {
            if line.contains("crate::") && !line.contains("crate::model") {
                found.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_file_says_what_it_owns() {
    for dir in ["src", "tests"] {
        for path in rust_files(dir) {
            assert!(
                read(&path).starts_with("//! "),
                "{} does not open with '//!'",
                path.display()
            );
        }
    }
}

#[test]
fn no_file_outgrows_a_reader() {
    for path in rust_files("src") {
        let lines = read(&path).lines().count();
        assert!(
            lines < MAX_LINES,
            "{} has {lines} lines; split it before {MAX_LINES}",
            path.display()
        );
    }
}

/// docs/SEMANTICS.md gives the tests of each promise in a line that starts with "Tests: ".
#[test]
fn tests_that_the_semantics_name_exist() {
    let semantics = read(&root().join("docs/SEMANTICS.md"));
    let sources: String = ["src", "tests"]
        .iter()
        .flat_map(|dir| rust_files(dir))
        .map(|path| read(&path))
        .collect();
    let mut named = 0;
    let mut missing = Vec::new();
    for line in semantics.lines().filter(|l| l.starts_with("Tests: ")) {
        for name in line.split('`').skip(1).step_by(2) {
            named += 1;
            if !sources.contains(&format!("fn {name}(")) {
                missing.push(name);
            }
        }
    }
    assert!(named > 0, "docs/SEMANTICS.md names no test");
    assert!(
        missing.is_empty(),
        "docs/SEMANTICS.md names tests that do not exist: {}",
        missing.join(", ")
    );
}
