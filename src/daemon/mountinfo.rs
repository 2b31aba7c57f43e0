//! What the kernel says is mounted where: `/proc/self/mountinfo`, read and understood.
//!
//! Nothing here touches a mount point itself, so a hung or dead file system cannot hang it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The source that every ctlfs mount names.
pub(crate) const SOURCE: &str = "ctlfs";

/// Which mount it is. The kernel gives the number of a mount that is gone to the next one, so the
/// device counts as well; that is its own while anything holds the file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MountId {
    number: u64,
    /// Major and minor.
    device: (u32, u32),
}

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Which mount it is.
    pub(crate) id: MountId,
    /// Where it is mounted.
    pub(crate) target: PathBuf,
    /// `fuse`, `ext4`, …
    pub(crate) kind: String,
    /// What was mounted: for ctlfs, its name.
    pub(crate) source: String,
    /// For FUSE, the user who mounted it.
    pub(crate) user: Option<u32>,
}

impl Mount {
    /// Whether this is a ctlfs mount. A direct mount shows as type `fuse`, one made by
    /// fusermount3 as `fuse.ctlfs`; both name `ctlfs` as their source.
    pub(crate) fn is_ctlfs(&self) -> bool {
        self.kind == "fuse.ctlfs" || (self.kind == "fuse" && self.source == SOURCE)
    }
}

/// Every mount of this process's namespace, in the order of the kernel's list.
pub(crate) fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// The mount on top of the directory `path`, which must be absolute and free of links.
pub(crate) fn at(path: &Path) -> io::Result<Option<Mount>> {
    Ok(top(read()?, path))
}

/// Whether this mount is still there.
pub(crate) fn is_mounted(id: MountId) -> bool {
    read().is_ok_and(|mounts| mounts.iter().any(|m| m.id == id))
}

/// Waits until this mount is gone. Returns at once if the kernel's list cannot be
/// watched.
pub(crate) fn wait_gone(id: MountId) -> io::Result<()> {
    let list = fs::File::open("/proc/self/mountinfo")?;
    let mut polled = libc::pollfd {
        fd: list.as_raw_fd(),
        events: libc::POLLPRI,
        revents: 0,
    };
    // The descriptor was opened first: what changes after this look wakes the poll below.
    while is_mounted(id) {
        // SAFETY: `polled` is one valid entry, and its descriptor is open.
        if unsafe { libc::poll(&raw mut polled, 1, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn top(mounts: Vec<Mount>, path: &Path) -> Option<Mount> {
    // Later mounts cover earlier ones, and the kernel lists them in that order.
    mounts.into_iter().rfind(|m| m.target == path)
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw`: the optional fields before the
/// dash vary in number.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ').filter(|w| !w.is_empty());
    let number = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    let device = std::str::from_utf8(words.nth(1)?).ok()?.split_once(':')?;
    let device = (device.0.parse().ok()?, device.1.parse().ok()?);
    let target = unescape(words.nth(1)?);
    let mut rest = words.skip_while(|w| *w != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = rest.next().map(unescape).unwrap_or_default();
    let user = rest
        .next()
        .and_then(|options| std::str::from_utf8(options).ok())
        .and_then(|options| options.split(',').find_map(|o| o.strip_prefix("user_id=")))
        .and_then(|user| user.parse().ok());
    Some(Mount {
        id: MountId { number, device },
        target: PathBuf::from(target),
        kind,
        source: source.to_string_lossy().into_owned(),
        user,
    })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let value = digits.and_then(|d| {
            d.iter().try_fold(0u8, |value, digit| {
                let digit = digit.checked_sub(b'0').filter(|d| *d < 8)?;
                value.checked_mul(8)?.checked_add(digit)
            })
        });
        if let Some(byte) = value {
            out.push(byte);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

/// The absolute, link-free form of `path`, found without touching what is mounted on it: a dead
/// mount there must not keep us from naming it.
pub(crate) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let whole = path.canonicalize();
    match (&whole, path.file_name()) {
        (Err(error), Some(name)) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            let parent = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            Ok(parent.canonicalize()?.join(name))
        }
        _ => whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
        90 27 0:50 / /srv/with\\040space\\134x rw,nosuid shared:7 master:2 - fuse ctlfs rw,user_id=7,group_id=0\n\
        91 27 0:51 / /ctl rw - ext4 /dev/sda1 rw\n\
        92 91 0:52 / /ctl rw - fuse.ctlfs ctlfs rw\n\
        93 27 0:53 / /s3 rw - fuse s3fs rw\n\
        94 27 0:54 / /empty rw - tmpfs  rw\n\
        broken line\n";

    #[test]
    fn lines_are_read_with_their_escapes() {
        let mounts = parse(SAMPLE);
        assert_eq!(mounts.len(), 6);
        let odd = &mounts[1];
        assert_eq!(odd.target, Path::new("/srv/with space\\x"));
        assert_eq!((odd.id.number, odd.kind.as_str()), (90, "fuse"));
        assert_eq!(odd.id.device, (0, 50));
        assert!(odd.is_ctlfs());
        assert_eq!((odd.user, mounts[0].user), (Some(7), None));
        assert!(!mounts[4].is_ctlfs());
    }

    #[test]
    fn the_last_mount_on_a_directory_is_on_top() {
        let mounts = parse(SAMPLE);
        assert_eq!(
            top(mounts.clone(), Path::new("/ctl")).unwrap().id.number,
            92
        );
        assert!(top(mounts, Path::new("/none")).is_none());
    }

    #[test]
    fn a_backslash_that_is_no_escape_stays() {
        assert_eq!(unescape(br"a\9b\04"), r"a\9b\04");
        assert_eq!(unescape(br"\777"), r"\777");
    }

    #[test]
    fn this_process_has_a_proc() {
        let proc = at(Path::new("/proc")).unwrap().unwrap();
        assert_eq!(proc.kind, "proc");
        assert!(is_mounted(proc.id));
    }
}
