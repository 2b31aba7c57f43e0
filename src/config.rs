//! Every setting of the daemon and its default, validated into one value.
//!
//! What is in [`Daemon`] needs no further checking; whether the outside world (mount point, origin,
//! state directory) agrees is found out by the daemon itself.

use std::io;
use std::num::NonZero;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::changelog;
use crate::ledger::OriginUrl;
use crate::tree::access::AccessRules;

/// Settings of a daemon.
pub struct Daemon {
    /// Where to mount.
    pub mountpoint: PathBuf,
    /// What to follow.
    pub follow: Follow,
    /// The directory that holds the LDB, the lock, the log and spilled bytes. Absolute.
    pub state_dir: PathBuf,
    /// Modes and owners.
    pub access: AccessRules,
    /// The options of the mount itself.
    pub options: Options,
    /// Whether changes are announced to inotify watchers.
    pub announce: bool,
    /// FUSE worker threads.
    pub threads: usize,
    /// Where the log goes; `None` is the state directory's `ctlfs.log`, or standard error in the
    /// foreground.
    pub log_file: Option<PathBuf>,
    /// What is logged: a level or a `tracing` filter.
    pub log_level: String,
    /// Whether to have the origin tell of changes where it can.
    pub push: bool,
    /// After how long without contact or without catching up the tree counts as stale.
    pub stale_after: Duration,
    /// How many bytes a table may have that is shown as one file.
    pub export_max_size: u64,
    /// How long a pin may live.
    pub pin_max_age: Duration,
    /// How many bytes of the LDB's log pins may hold back.
    pub pin_max_space: u64,
    /// The change log, if there is to be one.
    pub changelog: Option<changelog::Settings>,
    /// Whether the daemon stays with the command that started it.
    pub foreground: bool,
}

/// What a daemon follows.
pub enum Follow {
    /// A ledger, reflected into an LDB of our own.
    Origin {
        /// The ledger.
        url: OriginUrl,
        /// How often it is asked when nothing happens.
        poll_interval: Duration,
    },
    /// An LDB that another process writes.
    Ldb {
        /// The file.
        file: PathBuf,
        /// How often it is looked at.
        check_interval: Duration,
    },
}

/// Default of `--poll-interval`.
pub const POLL_INTERVAL: &str = "1s";
/// Default of `--check-interval`.
pub const CHECK_INTERVAL: &str = "250ms";
/// Default of `--stale-after`.
pub const STALE_AFTER: &str = "30s";
/// Default of `--export-max-size`.
pub const EXPORT_MAX_SIZE: &str = "64MiB";
/// Default of `--pin-max-age`.
pub const PIN_MAX_AGE: &str = "10m";
/// Default of `--pin-max-space`.
pub const PIN_MAX_SPACE: &str = "1GiB";
/// Default of `--changelog-size`.
pub const CHANGELOG_SIZE: &str = "1MiB";
/// Default of `--log-level`.
pub const LOG_LEVEL: &str = "info";

/// A setting that is not acceptable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a duration.
    #[error("{0:?} is not a duration; write it like 10ms, 1s or 5m")]
    Duration(String),
    /// Durations of nothing.
    #[error("a duration of zero is not possible; write it like 10ms, 1s or 5m")]
    ZeroDuration,
    /// Longer than makes sense.
    #[error("a duration of more than a year is not possible; write it like 10ms, 1s or 5m")]
    LongDuration,
    /// Not a size.
    #[error("{0:?} is not a size; write it like 64KiB, 64MiB or 1GiB")]
    Size(String),
    /// A size out of bounds.
    #[error("a size must be from 1B to 1TiB; write it like 64KiB, 64MiB or 1GiB")]
    SizeBounds,
    /// A mount option that does not exist.
    #[error(
        "unknown mount option {0:?}; the options of -o are newline, ro, allow_other, no_allow_other"
    )]
    Option(String),
    /// The tree cannot be written.
    #[error("mount option \"rw\" is not possible: the tree is read-only")]
    ReadWrite,
    /// No directory for the state is known.
    #[error("no default for --state: neither XDG_STATE_HOME nor HOME is set; give --state DIR")]
    NoStateDir,
    /// A path that cannot be made absolute.
    #[error("cannot use the path {}: {reason}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
}

/// Times to come are computed from durations, and must not overflow.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);

/// Reads a duration such as `10ms`, `1s` or `5m`; zero and more than a year are refused.
pub fn duration(text: &str) -> Result<Duration, ConfigError> {
    let duration =
        humantime::parse_duration(text).map_err(|_| ConfigError::Duration(text.to_owned()))?;
    if duration.is_zero() {
        return Err(ConfigError::ZeroDuration);
    }
    if duration > MAX_DURATION {
        return Err(ConfigError::LongDuration);
    }
    Ok(duration)
}

/// The largest size that makes sense, and fits wherever sizes are counted.
const MAX_SIZE: u64 = 1 << 40;

/// Reads a size such as `64KiB`, `64MiB` or `1GiB`: a whole number and a unit, of 1024 for `KiB`
/// and so on, of 1000 for `kB` and so on; zero and more than 1 TiB are refused.
pub fn size(text: &str) -> Result<u64, ConfigError> {
    const UNITS: [(&str, u64); 10] = [
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    let wrong = || ConfigError::Size(text.to_owned());
    let digits = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let (number, unit) = text.split_at(text.len() - digits.len());
    let unit = unit.trim_start();
    let (_, unit) = UNITS.iter().find(|(u, _)| *u == unit).ok_or_else(wrong)?;
    if number.is_empty() {
        return Err(wrong());
    }
    // More digits than fit are too many.
    let number: u64 = number.parse().unwrap_or(u64::MAX);
    match number.checked_mul(*unit) {
        Some(size @ 1..=MAX_SIZE) => Ok(size),
        _ => Err(ConfigError::SizeBounds),
    }
}

/// The options of `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Integer, decimal and string fields end in a newline.
    pub newline: bool,
    /// Users other than the one who mounts may read, as far as the modes let them. When not said:
    /// yes for root, no for others, whom the system does not let without `user_allow_other` in
    /// `/etc/fuse.conf`.
    pub allow_other: Option<bool>,
    /// OPEN is answered in the ordinary way; the benchmark compares with this.
    pub plain_open: bool,
    /// The kernel takes the mount for read-only: no announcements, no pins.
    pub read_only: bool,
}

impl Options {
    /// Reads the values of every `-o`, each a list with commas.
    pub fn parse<'a>(lists: impl IntoIterator<Item = &'a str>) -> Result<Self, ConfigError> {
        let mut options = Options::default();
        for option in lists.into_iter().flat_map(|list| list.split(',')) {
            match option {
                "newline" => options.newline = true,
                "allow_other" => options.allow_other = Some(true),
                "no_allow_other" => options.allow_other = Some(false),
                "plain_open" => options.plain_open = true,
                // What mount tools pass along; the tree is like that anyway.
                "" | "defaults" | "nosuid" | "nodev" => {}
                "ro" => options.read_only = true,
                "rw" => return Err(ConfigError::ReadWrite),
                other => return Err(ConfigError::Option(other.to_owned())),
            }
        }
        Ok(options)
    }
}

/// The default of `--threads`: twice the number of cores, but from 4 to 8.
pub fn default_threads() -> usize {
    // Two for each processor: while one is being woken the next request finds another ready.
    std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .saturating_mul(2)
        .clamp(4, 8)
}

/// The path `path` from `/`, without asking whether it exists: a daemon in the background has
/// another directory than its caller.
pub fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|reason| ConfigError::Path {
        path: path.to_owned(),
        reason,
    })
}

/// The default of `--state` for a mount on `mountpoint`, which must be absolute.
pub fn default_state_dir(mountpoint: &Path, root: bool) -> Result<PathBuf, ConfigError> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    let base = if root {
        PathBuf::from("/var/lib")
    } else {
        set("XDG_STATE_HOME")
            .map(PathBuf::from)
            // The specification has relative ones ignored.
            .filter(|path| path.is_absolute())
            .or_else(|| Some(PathBuf::from(set("HOME")?).join(".local/state")))
            .ok_or(ConfigError::NoStateDir)?
    };
    Ok(base.join("ctlfs").join(escape(mountpoint)))
}

/// A path as one file name, as systemd-escape does it: `/srv/a-b` is `srv-a\x2db`.
fn escape(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let mut name = String::new();
    for part in bytes.split(|b| *b == b'/').filter(|part| !part.is_empty()) {
        if !name.is_empty() {
            name.push('-');
        }
        for byte in part {
            match char::from(*byte) {
                '.' if name.is_empty() => name.push_str("\\x2e"),
                c if c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '.') => name.push(c),
                _ => name.push_str(&format!("\\x{byte:02x}")),
            }
        }
    }
    if name.is_empty() {
        return "-".into();
    }
    if name.len() > 200 {
        let digest = Sha256::digest(bytes);
        name.truncate(160);
        name.push('~');
        name.extend(digest.iter().take(16).map(|b| format!("{b:02x}")));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        assert_eq!(duration("10ms").unwrap(), Duration::from_millis(10));
        assert_eq!(duration("5m").unwrap(), Duration::from_secs(300));
        for bad in [
            "",
            "1",
            "ms",
            "0s",
            "-1s",
            "1 parsec",
            "400d",
            "500000000000years",
        ] {
            assert!(duration(bad).is_err(), "{bad:?} was accepted");
        }
        for default in [POLL_INTERVAL, CHECK_INTERVAL, STALE_AFTER, PIN_MAX_AGE] {
            assert!(duration(default).is_ok());
        }
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(size("64MiB").unwrap(), 64 << 20);
        assert_eq!(size("1 GiB").unwrap(), 1 << 30);
        assert_eq!(size("5kB").unwrap(), 5_000);
        assert_eq!(size("512B").unwrap(), 512);
        assert_eq!(size(EXPORT_MAX_SIZE).unwrap(), 64 << 20);
        assert_eq!(size(PIN_MAX_SPACE).unwrap(), 1 << 30);
        assert_eq!(size(CHANGELOG_SIZE).unwrap(), 1 << 20);
        for bad in [
            "",
            "64",
            "MiB",
            "-1MiB",
            "0B",
            "1.5GiB",
            "1 parsec",
            "2TiB",
            "99999999999999999999B",
        ] {
            assert!(size(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn mount_options_are_known_or_refused() {
        let options = Options::parse(["newline,allow_other", "plain_open"]).unwrap();
        assert!(options.newline && options.plain_open);
        assert_eq!(options.allow_other, Some(true));
        assert_eq!(
            Options::parse(["defaults,nodev,", ""]).unwrap(),
            Options::default()
        );
        assert!(Options::parse(["ro"]).unwrap().read_only);
        let error = Options::parse(["newline,sync"]).unwrap_err().to_string();
        assert!(
            error.contains("\"sync\"") && error.contains("newline"),
            "{error}"
        );
        assert!(Options::parse(["rw"]).is_err());
    }

    #[test]
    fn each_mount_point_has_a_state_directory_of_its_own() {
        let of = |path: &str| escape(Path::new(path));
        assert_eq!(of("/ctl"), "ctl");
        assert_eq!(of("/srv/app/"), "srv-app");
        assert_eq!(of("/srv-app"), "srv\\x2dapp");
        assert_eq!(of("/.hidden/ü"), "\\x2ehidden-\\xc3\\xbc");
        assert_eq!(of("/"), "-");
        let (a, b) = (
            format!("/{}/a", "x".repeat(300)),
            format!("/{}/b", "x".repeat(300)),
        );
        assert_ne!(of(&a), of(&b));
        assert!(of(&a).len() < 255);
        assert_eq!(
            default_state_dir(Path::new("/ctl"), true).unwrap(),
            Path::new("/var/lib/ctlfs/ctl")
        );
    }
}
