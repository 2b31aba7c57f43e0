//! Ordinary programs on the tree of `ctlfs dev --sample`, with odd names and values added: they end
//! with status 0, say nothing on standard error, and what they copy or print is what is there.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod common {
    pub mod daemon;
    pub mod ledger;
}

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::daemon::{Daemon, Place, ctlfs, wait_until};
use common::ledger::{Ledger, shown};

/// Rows with names and values that trip programs up.
const ODD: &[&str] = &[
    r#"CREATE TABLE odd___names ("name" VARCHAR(191), "value" BLOB, "note" TEXT, PRIMARY KEY("name"));"#,
    "REPLACE INTO odd___names (name, value, note) VALUES('two words', x'00', NULL)",
    "REPLACE INTO odd___names (name, value, note) VALUES(' edges ', x'', '')",
    "REPLACE INTO odd___names (name, value, note) VALUES('-rf', x'0a0a', 'no newline')",
    "REPLACE INTO odd___names (name, value, note) VALUES('*', x'ff00fe', 'glob')",
    "REPLACE INTO odd___names (name, value, note) VALUES('a''b\"c\\d$HOME`', NULL, 'quotes')",
    "REPLACE INTO odd___names (name, value, note) VALUES('größe 🦀', NULL, 'grüße')",
    "REPLACE INTO odd___names (name, value, note) VALUES('line' || char(10) || 'two', NULL, 'x')",
    "REPLACE INTO odd___names (name, value, note) VALUES('..', NULL, 'up')",
    "REPLACE INTO odd___names (name, value, note) VALUES('', NULL, 'empty')",
    "REPLACE INTO odd___names (name, value, note) VALUES(CAST(x'ff61' AS TEXT), NULL, 'not UTF-8')",
    "REPLACE INTO odd___names (name, value, note) VALUES(replace(hex(zeroblob(150)), '0', 'n'), x'01', 'long')",
    "REPLACE INTO odd___names (name, value, note) VALUES('big', zeroblob(3000000), 'needle in here')",
    r#"CREATE TABLE odd___empty ("id" INTEGER, PRIMARY KEY("id"));"#,
];

/// A tree, and a directory to work in. Programs are given the tree without `.ctlfs`, whose files
/// change by the clock, unless they say otherwise.
struct Tools {
    daemon: Daemon,
    place: Place,
}

impl Tools {
    fn new() -> Self {
        let place = Place::new();
        let mut command = ctlfs();
        command
            .args(["dev", "--sample", "--poll-interval", "10ms", "--state"])
            .arg(place.state())
            .arg(place.mountpoint())
            .stdout(Stdio::null());
        let daemon = Daemon::start(command, &place.mountpoint());
        let seq = Ledger::open(&place.state().join("ledger.db")).append(ODD);
        wait_until("the odd rows are shown", || {
            let status = daemon.status();
            assert!(status["problem"].is_null(), "{}", status["problem"]);
            shown(daemon.mountpoint()) >= seq
        });
        fs::create_dir(place.root().join("work")).unwrap();
        Tools { daemon, place }
    }

    fn tree(&self) -> &Path {
        self.daemon.mountpoint()
    }

    fn work(&self) -> PathBuf {
        self.place.root().join("work")
    }

    /// Runs a shell script with `$T` for the tree, in the work directory; what it printed.
    #[track_caller]
    fn sh(&self, script: &str) -> Vec<u8> {
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", script])
            .env("T", self.tree())
            .env("LC_ALL", "C.UTF-8")
            .current_dir(self.work())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && error.is_empty(),
            "{script}: {}: {error}",
            output.status
        );
        output.stdout
    }

    #[track_caller]
    fn text(&self, script: &str) -> String {
        String::from_utf8(self.sh(script)).unwrap()
    }

    /// Every path of the tree but `.ctlfs`, as our own walk sees it.
    fn paths(&self) -> BTreeMap<OsString, Entry> {
        walk(self.tree())
    }
}

#[derive(Debug, PartialEq)]
struct Entry {
    /// `None` for directories.
    content: Option<Vec<u8>>,
    mode: u32,
    time: (i64, i64),
}

/// Everything below a directory but `.ctlfs`.
fn walk(root: &Path) -> BTreeMap<OsString, Entry> {
    let mut all = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with(".ctlfs") {
                continue;
            }
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                pending.push(path.clone());
            }
            let entry = Entry {
                content: meta.is_file().then(|| fs::read(&path).unwrap()),
                mode: meta.mode() & 0o7777,
                time: (meta.mtime(), meta.mtime_nsec()),
            };
            if let Some(content) = &entry.content {
                assert_eq!(content.len() as u64, meta.len(), "{}", path.display());
            }
            let name = path.strip_prefix(root).unwrap().as_os_str().to_owned();
            all.insert(name, entry);
        }
    }
    all
}

/// `copy` holds the same files with the same bytes; with `exact`, also modes and times.
#[track_caller]
fn assert_same(tree: &BTreeMap<OsString, Entry>, copy: &Path, exact: bool) {
    let copy = walk(copy);
    let names: Vec<_> = tree.keys().collect();
    assert_eq!(names, copy.keys().collect::<Vec<_>>());
    for (name, entry) in tree {
        let copied = &copy[name];
        assert!(entry.content == copied.content, "{name:?} differs");
        if exact {
            assert_eq!(
                (entry.mode, entry.time),
                (copied.mode, copied.time),
                "{name:?}"
            );
        }
    }
}

#[test]
fn the_tree_has_what_the_test_means_to_show() {
    let tools = Tools::new();
    let paths = tools.paths();
    for name in [
        "two words",
        " edges ",
        "-rf",
        "*",
        "a'b\"c\\d$HOME`",
        "größe 🦀",
        "line%0Atwo",
        "%2E.",
        "%",
        "big",
    ] {
        let path = OsString::from(format!("odd/names/{name}/row.json"));
        assert!(paths.contains_key(&path), "{path:?}");
    }
    let long = format!("odd/names/{}~", "n".repeat(200));
    assert!(
        paths
            .keys()
            .any(|p| p.as_bytes().starts_with(long.as_bytes()))
    );
    assert!(paths.contains_key(OsStr::from_bytes(b"odd/names/\xffa/note")));
    assert!(paths.contains_key(OsStr::new("edge/routes/eu/%2Fapi%2Fv2%2Forders/backend")));
}

#[test]
fn programs_that_list_see_everything() {
    let tools = Tools::new();
    let paths = tools.paths();
    // All of the tree, .ctlfs too.
    let long = tools.text("cd \"$T\"; ls -la; ls -la app/flags/new-checkout; ls -l edge/routes/eu");
    assert!(
        long.contains("dr-xr-xr-x") && long.contains("-r--r--r--"),
        "{long}"
    );
    assert!(
        long.contains(" .ctlfs\n") && long.contains(" row.json\n"),
        "{long}"
    );
    let recursive = tools.sh("ls -lR --show-control-chars \"$T\"");
    assert!(recursive.windows(9).any(|w| w == b"two words"));

    let found = tools.sh("cd \"$T\"; find . -path ./.ctlfs -prune -o -print0");
    let mut found: Vec<&[u8]> = found
        .split(|b| *b == 0)
        .filter(|p| !p.is_empty() && *p != b".")
        .collect();
    found.sort_unstable();
    let mut expected: Vec<Vec<u8>> = paths
        .keys()
        .map(|p| [b"./", p.as_bytes()].concat())
        .collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
    let files = paths
        .values()
        .filter(|entry| entry.content.is_some())
        .count();
    let count = tools.text("find \"$T\" -path '*/.ctlfs' -prune -o -type f -printf x | wc -c");
    assert_eq!(count.trim(), files.to_string());
    // Without a look at each inode too: listings have the types.
    let directories =
        tools.text("cd \"$T\"; find . -type d ! -path './.ctlfs*' -printf 'x' | wc -c");
    assert_eq!(directories.trim(), (paths.len() - files + 1).to_string());
    tools.sh("find \"$T\"; find \"$T\" -newermt 2001-01-01 -ls; ls -f \"$T/odd/names\"; ls -i \"$T/app/flags\"");

    let sizes = tools.text("cd \"$T\"; du -s --apparent-size -B1 odd/names/big; du -sk .; stat -c %s odd/names/big/value");
    let size: u64 = sizes.split_whitespace().next().unwrap().parse().unwrap();
    assert!(size >= 3_000_000, "{sizes}");
    assert!(sizes.ends_with("\n3000000\n"), "{sizes}");
    let filesystem =
        tools.text("stat -f -c '%T %l' \"$T\"; df \"$T\"; df -i \"$T\"; df --output=source \"$T\"");
    assert!(
        filesystem.starts_with("fuseblk 255\n") || filesystem.starts_with("fuse 255\n"),
        "{filesystem}"
    );
    assert!(
        filesystem.ends_with("\nctlfs\n") && !filesystem.contains("100%"),
        "{filesystem}"
    );
}

#[test]
fn copies_are_exact() {
    let tools = Tools::new();
    let paths = tools.paths();
    let work = tools.work();
    for (number, (script, exact)) in [
        ("cp -r \"$T\"/[!.]* $D/", false),
        ("cp -a \"$T\"/[!.]* $D/", true),
        ("cp -r --sparse=always --reflink=auto \"$T\"/[!.]* $D/", false),
        ("tar -C \"$T\" --exclude=./.ctlfs -cf - . | tar -C $D -xpf -", false),
        ("tar -C \"$T\" --exclude=./.ctlfs --format=pax -czf t.gz . && tar -C $D -xpzf t.gz", true),
        // By default rsync takes times within one second for the same, and leaves a directory that
        // it made in the second of its original with the time of the copy.
        ("rsync -a --modify-window=-1 --exclude=/.ctlfs \"$T\"/ $D/", true),
        ("(cd \"$T\" && find . -path ./.ctlfs -prune -o -type f -print0) | \
          (cd $D && while IFS= read -r -d '' f; do mkdir -p -- \"${f%/*}\"; cat < \"$T/$f\" > \"$f\"; done; \
          mkdir -p odd/empty)", false),
    ]
    .into_iter()
    .enumerate()
    {
        let copy = work.join(format!("copy{number}"));
        fs::create_dir(&copy).unwrap();
        tools.sh(&format!("D=copy{number}; {script}"));
        println!("compares what this copied: {script}");
        assert_same(&paths, &copy, exact);
        tools.sh(&format!("diff -r --exclude=.ctlfs \"$T\" copy{number}"));
    }
    // What rsync copied it does not copy again; the names of what it would are printed by -i.
    let again = tools.text("rsync -ai --exclude=/.ctlfs \"$T\"/ copy5/");
    assert_eq!(again, "");
    let checked = tools.text("rsync -aic --exclude=/.ctlfs \"$T\"/ copy5/");
    assert_eq!(checked, "");
    tools.sh("cmp \"$T/odd/names/big/value\" copy1/odd/names/big/value");
}

#[test]
fn the_whole_mount_can_be_copied() {
    let tools = Tools::new();
    let paths = tools.paths();
    for (number, script) in [
        "cp -r \"$T\" $D",
        "cp -a \"$T\"/. $D/",
        "tar -C \"$T\" -cf - . | tar -C $D -xf -",
        "rsync -a \"$T\"/ $D/",
    ]
    .into_iter()
    .enumerate()
    {
        let copy = tools.work().join(format!("whole{number}"));
        if number > 0 {
            fs::create_dir(&copy).unwrap();
        }
        for _ in 0..3 {
            tools.sh(&format!("D=whole{number}; rm -rf $D/* $D/.ctlfs; [ -d $D ] && [ {number} = 0 ] && rmdir $D; {script}"));
        }
        let status = fs::read(copy.join(".ctlfs/status.json")).unwrap();
        let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
        assert_eq!(status["health"], "ok");
        assert!(copy.join(".ctlfs/ready").exists());
        fs::remove_dir_all(copy.join(".ctlfs")).unwrap();
        assert_same(&paths, &copy, false);
    }
}

#[test]
fn programs_that_read_find_what_is_there() {
    let tools = Tools::new();
    let found = tools.text("cd \"$T\"; grep -r --exclude-dir=.ctlfs -l 'half of the EU' . | sort");
    assert_eq!(
        found,
        "./app/flags/new-checkout/note\n./app/flags/new-checkout/row.json\n"
    );
    assert_eq!(
        tools.text("grep -rc needle \"$T/odd/names/big/note\""),
        "1\n"
    );
    assert_eq!(
        tools.text("wc -c < \"$T/odd/names/big/value\""),
        "3000000\n"
    );
    assert_eq!(
        tools.text("wc -l < \"$T/app/flags/new-checkout/row.json\""),
        "1\n"
    );
    assert_eq!(tools.text("cat \"$T\"/app/flags/*/enabled"), "1110");
    assert_eq!(
        tools.text("head -c 3 \"$T/tls/certs/www.example.com/certificate\""),
        "---"
    );
    assert_eq!(
        tools.text("tail -c 4 \"$T/app/flags/new-checkout/note\""),
        "e EU"
    );
    assert_eq!(
        tools.text("dd if=\"$T/tls/certs/www.example.com/fingerprint\" bs=1 skip=1 count=2 status=none | od -An -tx1"),
        " ad be\n"
    );
    // NULL has no file; an empty value has one.
    tools.sh(
        "cd \"$T/odd/names\"; [ ! -e 'two words/note' ]; [ -e ' edges /note' ]; [ ! -s ' edges /note' ]; \
         [ -s ./-rf/note ]; [ -f ./-rf/note ]; [ -d ./-rf ]; [ ! -w ./-rf/note ] || [ \"$(id -u)\" = 0 ]",
    );
    // Shell loops, with every name as one word.
    let looped = tools.text(
        "cd \"$T/odd/names\"; n=0; for d in *; do [ -d \"$d\" ]; [ -f \"$d/row.json\" ]; n=$((n+1)); done; echo $n; ls | wc -l",
    );
    let counts: Vec<&str> = looped.split_whitespace().collect();
    assert_eq!(counts, ["12", "12"]);
    let totals =
        tools.text("cd \"$T\"; find odd app -type f -print0 | xargs -0 -n 3 -P 4 cat | wc -c");
    let expected: usize = tools
        .paths()
        .iter()
        .filter(|(path, _)| {
            path.as_bytes().starts_with(b"odd") || path.as_bytes().starts_with(b"app")
        })
        .filter_map(|(_, entry)| entry.content.as_ref().map(Vec::len))
        .sum();
    assert_eq!(totals.trim(), expected.to_string());
    tools.sh("cmp \"$T/app/flags/dark-mode/note\" <(printf everybody)");
    tools.sh("sha256sum \"$T\"/odd/names/*/row.json; file=\"$T/app/flags/dark-mode/note\"; [ \"$(<\"$file\")\" = everybody ]");
    tools.sh("cat \"$T/.ctlfs/status.json\" \"$T/.ctlfs/seq\" \"$T/.ctlfs/ready\"");
}

#[test]
fn extended_attributes_are_shown() {
    let tools = Tools::new();
    let shown = tools.text("cd \"$T\"; getfattr -d -m - app/flags/new-checkout/rollout app/flags/new-checkout/row.json app/flags/new-checkout app/flags");
    let blocks: Vec<&str> = shown.trim_end().split("\n\n").collect();
    assert_eq!(blocks.len(), 4, "{shown}");
    assert!(blocks[0].contains("user.ctlfs.type=\"decimal\""), "{shown}");
    assert!(blocks[1].contains("user.ctlfs.type=\"json\""), "{shown}");
    assert!(
        !blocks[2].contains("type") && !blocks[3].contains("type"),
        "{shown}"
    );
    for block in blocks {
        let seq = block
            .split("user.ctlfs.seq=\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        assert!(seq.unwrap().parse::<u64>().unwrap() > 0, "{shown}");
    }
    assert_eq!(
        tools.text(
            "getfattr --absolute-names --only-values -n user.ctlfs.type \"$T/odd/names/big/value\""
        ),
        "binary"
    );
    tools.sh("getfattr -R -d --absolute-names -m - \"$T/odd\" \"$T/app\" > /dev/null");
}

#[test]
fn python_reads_the_tree() {
    let tools = Tools::new();
    let script = tools.work().join("walk.py");
    fs::write(
        &script,
        "import os, sys, json\n\
         root = os.fsencode(sys.argv[1])\n\
         for base, dirs, files in os.walk(root):\n\
         \x20   if base == root: dirs.remove(b'.ctlfs')\n\
         \x20   for name in files:\n\
         \x20       path = os.path.join(base, name)\n\
         \x20       with open(path, 'rb') as f: data = f.read()\n\
         \x20       assert len(data) == os.stat(path).st_size == os.path.getsize(path), path\n\
         \x20       if name == b'row.json': json.loads(data)\n\
         \x20       sys.stdout.buffer.write(os.path.relpath(path, root) + b'\\0')\n",
    )
    .unwrap();
    let read = tools.sh("python3 walk.py \"$T\"");
    let mut read: Vec<OsString> = read
        .split(|b| *b == 0)
        .filter(|p| !p.is_empty())
        .map(|p| OsString::from_vec(p.to_vec()))
        .collect();
    read.sort();
    let files: Vec<OsString> = tools
        .paths()
        .into_iter()
        .filter_map(|(path, entry)| entry.content.map(|_| path))
        .collect();
    assert_eq!(read, files);
}
