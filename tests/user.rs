//! A mount by an ordinary user, with fusermount3. It runs in namespaces of its own, where
//! `/dev/fuse` is for everybody as it is on ordinary hosts, and which end with the test.
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

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::daemon::{Place, copy_program, run, stderr, stdout};
use common::ledger::Ledger;

/// An id that no user of the host has.
const USER: u32 = 54_323;

const DOCUMENT: &str = r#"{"families": {"app": {"tables": {"flags": {
    "fields": {"name": "string", "enabled": "integer"},
    "key": ["name"],
    "rows": [{"name": "one", "enabled": 1}]
}}}}}"#;

/// What every script begins with: the device, and `as_user`.
const PROLOGUE: &str = r#"
set -eu
# Other mounts must not be held by this namespace when their owners take them away.
while read -r _ _ _ _ path rest; do
    case "$rest" in *" - fuse"*) umount -l "$path" ;; esac
done < /proc/self/mountinfo
rm -f "$DIR/fuse"
mknod -m 666 "$DIR/fuse" c 10 229
mount --bind "$DIR/fuse" /dev/fuse
# fusermount3 wants to know the user's name.
{ cat /etc/passwd; echo "ctlfs-test:x:$ID:$ID::$DIR/home:/bin/sh"; } > "$DIR/passwd"
mount --bind "$DIR/passwd" /etc/passwd
as_user() {
    setpriv --reuid="$ID" --regid="$ID" --clear-groups env -u XDG_STATE_HOME HOME="$DIR/home" "$@"
}
tree() { as_user "$DIR/ctlfs" "$@"; }
mount_tree() { tree mount --poll-interval 10ms --origin "sqlite://$DIR/home/ledger.db" "$@" "$DIR/home/ctl"; }
must_fail() { if "$@"; then echo "this should have failed: $*" >&2; return 1; fi; }
# until_ok COMMAND…: tries it again for up to 30 s.
until_ok() {
    end=$(($(date +%s) + 30))
    until "$@"; do [ "$(date +%s)" -lt "$end" ] || { echo "in vain: $*" >&2; exit 1; }; done
}
"#;

/// A user's home with a ledger, and the program where the user can reach it.
struct Home(Place);

impl Home {
    fn new() -> Self {
        let place = Place::new();
        let home = Home(place);
        fs::set_permissions(home.directory(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(home.directory().join("home/ctl")).unwrap();
        copy_program(&home.directory().join("ctlfs"));
        drop(Ledger::create(&home.0));
        let document = home.directory().join("config.json");
        fs::write(&document, DOCUMENT).unwrap();
        let applied = run([
            "apply",
            "--origin",
            &home.0.origin(),
            "-f",
            document.to_str().unwrap(),
        ]);
        assert!(applied.status.success(), "{}", stderr(&applied));
        let file = home.directory().join("home/ledger.db");
        fs::rename(home.0.ledger(), &file).unwrap();
        for path in [
            home.directory().join("home"),
            home.directory().join("home/ctl"),
            file,
        ] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }
        home
    }

    fn directory(&self) -> PathBuf {
        self.0.root()
    }

    /// Runs a script as root in the namespaces.
    fn run(&self, script: &str) -> Output {
        Command::new("unshare")
            .args([
                "--mount",
                "--propagation=slave",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["bash", "-c", &format!("{PROLOGUE}{script}")])
            .env("DIR", self.directory())
            .env("ID", USER.to_string())
            .env_remove("CTLFS_ORIGIN")
            .env_remove("CTLFS_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn succeeds(&self, script: &str) -> Output {
        let output = self.run(script);
        assert!(
            output.status.success(),
            "{}{}",
            stdout(&output),
            stderr(&output)
        );
        output
    }
}

#[test]
fn a_user_mounts_looks_and_unmounts() {
    let home = Home::new();
    home.succeeds(
        r#"
        mount_tree
        [ "$(as_user cat "$DIR/home/ctl/app/flags/one/enabled")" = 1 ]
        [ "$(as_user stat -c %u:%g:%a "$DIR/home/ctl/app/flags/one/enabled")" = "$ID:$ID:444" ]
        tree status "$DIR/home/ctl"
        # Others, root among them, are refused by the kernel.
        must_fail cat "$DIR/home/ctl/app/flags/one/enabled"
        must_fail setpriv --reuid=54999 --regid=54999 --clear-groups ls "$DIR/home/ctl"
        # The state is in the user's home and nobody else's.
        [ "$(stat -c %a "$DIR"/home/.local/state/ctlfs/*/ldb.db)" = 600 ]
        must_fail mount_tree
        # fusermount3 does not let a user write either.
        must_fail as_user touch "$DIR/home/ctl/new"
        # Changes arrive.
        tree put --origin "sqlite://$DIR/home/ledger.db" app/flags name=one enabled=2
        until_ok as_user grep -qx 2 "$DIR/home/ctl/app/flags/one/enabled"
        tree unmount "$DIR/home/ctl"
        must_fail grep " $DIR/home/ctl " /proc/self/mountinfo
        "#,
    );
}

#[test]
fn a_users_daemon_ends_with_a_signal_and_is_replaced_when_it_is_killed() {
    let home = Home::new();
    home.succeeds(
        r#"
        pid() { as_user cat "$DIR/home/ctl/.ctlfs/status.json" | sed -n 's/.*"pid": \([0-9]*\).*/\1/p'; }
        gone() { ! grep -q " $DIR/home/ctl " /proc/self/mountinfo; }
        # The lock is let go last.
        ended() { flock --nonblock "$DIR"/home/.local/state/ctlfs/*/lock true; }
        mount_tree
        as_user kill -TERM "$(pid)"
        until_ok gone
        until_ok ended
        mount_tree
        dead=$(pid)
        kill -KILL "$dead"
        until_ok must_fail as_user ls "$DIR/home/ctl"
        until_ok ended
        mount_tree
        [ "$(grep -c " $DIR/home/ctl " /proc/self/mountinfo)" = 1 ]
        [ "$(as_user cat "$DIR/home/ctl/app/flags/one/enabled")" = 1 ]
        tree unmount "$DIR/home/ctl"
        "#,
    );
}

#[test]
fn a_user_may_let_others_in_where_the_host_allows_it() {
    let home = Home::new();
    let refused = home.succeeds(
        r#"
        : > "$DIR/fuse.conf"
        mount --bind "$DIR/fuse.conf" /etc/fuse.conf
        must_fail mount_tree -o allow_other
        must_fail grep " $DIR/home/ctl " /proc/self/mountinfo
        "#,
    );
    let said = stderr(&refused);
    assert!(said.contains("user_allow_other"), "{said}");
    home.succeeds(
        r#"
        echo user_allow_other > "$DIR/fuse.conf"
        mount --bind "$DIR/fuse.conf" /etc/fuse.conf
        mount_tree -o allow_other
        [ "$(cat "$DIR/home/ctl/app/flags/one/enabled")" = 1 ]
        setpriv --reuid=54999 --regid=54999 --clear-groups ls "$DIR/home/ctl/app"
        tree unmount "$DIR/home/ctl"
        "#,
    );
}
