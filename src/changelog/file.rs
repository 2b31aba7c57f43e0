//! The file of a change log: whole lines only, a bounded size, and one older generation, for those
//! who have not read to its end when a new one is begun.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use super::line::number_of;

/// Lines are longer than this only if keys are.
const TAIL: u64 = 64 << 10;

/// The file, open for appending.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    max_size: u64,
    file: File,
    size: u64,
    /// The number of the last line when it was opened; of the older generation's if it is empty.
    pub(super) last_number: Option<u64>,
}

impl LogFile {
    /// Opens the file, or creates it for its owner only. What follows the last newline is cut off:
    /// a crash has kept that line from being finished.
    pub(super) fn open(path: &Path, max_size: u64) -> io::Result<Self> {
        let mut file = options(0o600).create(true).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let tail = Tail::of(&mut file)?;
        if tail.whole < tail.size {
            file.set_len(tail.whole)?;
        }
        let older = || {
            let mut file = options(0o600).open(older(path)).ok()?;
            file.metadata().ok().filter(fs::Metadata::is_file)?;
            Tail::of(&mut file).ok()?.number
        };
        Ok(LogFile {
            path: path.to_owned(),
            max_size,
            file,
            size: tail.whole,
            last_number: tail.number.or_else(older),
        })
    }

    /// Whether a line of so many bytes, newline included, is still for this file.
    pub(super) fn has_room(&self, written: usize, line: usize) -> bool {
        // ctlstore does not count the newline.
        let end = self.size + bytes(written) + bytes(line).saturating_sub(1);
        self.size + bytes(written) == 0 || end <= self.max_size
    }

    /// Appends whole lines, or nothing.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        self.follow()?;
        match self.file.write_all(lines) {
            Ok(()) => {
                self.size += bytes(lines.len());
                Ok(())
            }
            Err(error) => {
                // What fitted on a full disk may end within a line.
                self.file.set_len(self.size)?;
                Err(error)
            }
        }
    }

    /// Sets the file aside and begins a new one, with the same mode and owner. Readers see it
    /// created, as ctlstore's readers expect, and can finish the old one.
    pub(super) fn rotate(&mut self) -> io::Result<()> {
        // An earlier attempt may have got as far as setting the file aside.
        self.follow()?;
        if self.size == 0 {
            return Ok(());
        }
        let old = self.file.metadata()?;
        fs::rename(&self.path, older(&self.path))?;
        let file = options(old.mode() & 0o7777)
            .create_new(true)
            .open(&self.path)?;
        // The umask may have taken some of it, and not everybody can give files away.
        let _ = fchown(&file, Some(old.uid()), Some(old.gid()));
        let _ = file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777));
        self.size = file.metadata()?.len();
        self.file = file;
        Ok(())
    }

    /// Should somebody else have removed or replaced the file, goes on in the one that is there.
    fn follow(&mut self) -> io::Result<()> {
        let own = self.file.metadata()?;
        let there = fs::symlink_metadata(&self.path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())) {
            return Ok(());
        }
        let again = LogFile::open(&self.path, self.max_size)?;
        self.size = again.size;
        self.file = again.file;
        Ok(())
    }
}

/// `PATH.1`.
fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Reading and appending. Symbolic links are not followed: who may write the directory could let
/// the daemon write anywhere.
fn options(mode: u32) -> OpenOptions {
    let mut options = OpenOptions::new();
    // A FIFO would wait for a reader.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    options
        .read(true)
        .append(true)
        .mode(mode)
        .custom_flags(flags);
    options
}

fn bytes(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// How a file ends.
struct Tail {
    size: u64,
    /// Up to behind the last newline.
    whole: u64,
    number: Option<u64>,
}

impl Tail {
    fn of(file: &mut File) -> io::Result<Self> {
        let size = file.seek(SeekFrom::End(0))?;
        let mut length = TAIL.min(size);
        loop {
            file.seek(SeekFrom::Start(size - length))?;
            let mut tail = Vec::new();
            Read::by_ref(file).take(length).read_to_end(&mut tail)?;
            let end = tail
                .iter()
                .rposition(|b| *b == b'\n')
                .map_or(0, |at| at + 1);
            let lines = tail.get(..end).unwrap_or_default();
            let line = lines.strip_suffix(b"\n").unwrap_or_default();
            let start = line.iter().rposition(|b| *b == b'\n').map(|at| at + 1);
            if start.is_none() && length < size {
                length = length.saturating_mul(4).min(size);
                continue;
            }
            let last = line.get(start.unwrap_or(0)..).unwrap_or_default();
            return Ok(Tail {
                size,
                whole: size - length + bytes(end),
                number: number_of(last),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] = b"{\"seq\":41}\n{\"seq\":42}\n";

    #[test]
    fn a_line_that_was_cut_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for (text, left, number) in [
            (&b""[..], &b""[..], None),
            (LINE, LINE, Some(42)),
            (b"{\"seq\":41}\n{\"seq\":4", b"{\"seq\":41}\n", Some(41)),
            (b"{\"seq\":4", b"", None),
        ] {
            fs::write(&path, text).unwrap();
            let mut log = LogFile::open(&path, 100).unwrap();
            assert_eq!(log.last_number, number);
            assert_eq!(fs::read(&path).unwrap(), left);
            log.append(b"{}\n").unwrap();
            assert_eq!(fs::read(&path).unwrap(), [left, b"{}\n"].concat());
        }
        // Longer than what is read at once.
        let long = format!("{{\"seq\":7,\"x\":\"{}\"}}\n", "y".repeat(200_000));
        fs::write(&path, format!("{long}{{\"cut")).unwrap();
        assert_eq!(LogFile::open(&path, 100).unwrap().last_number, Some(7));
        assert_eq!(fs::read(&path).unwrap().len(), long.len());
    }

    #[test]
    fn a_new_file_is_private_and_one_that_is_there_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
        let mut log = LogFile::open(&path, 100).unwrap();
        assert_eq!(mode(), 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        log.append(LINE).unwrap();
        log.rotate().unwrap();
        assert_eq!(mode(), 0o664);
        assert_eq!(fs::read(older(&path)).unwrap(), LINE);
        assert_eq!(LogFile::open(&path, 100).unwrap().last_number, Some(42));
    }

    #[test]
    fn a_file_that_somebody_else_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path, 100).unwrap();
        log.append(LINE).unwrap();
        fs::rename(&path, dir.path().join("away")).unwrap();
        log.append(b"{\"seq\":43}\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{\"seq\":43}\n");
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(LogFile::open(dir.path(), 100).is_err());
        assert!(LogFile::open(Path::new("/dev/null"), 100).is_err());
        let (link, aim) = (dir.path().join("link"), dir.path().join("aim"));
        std::os::unix::fs::symlink(&aim, &link).unwrap();
        assert!(LogFile::open(&link, 100).is_err());
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path, 100).unwrap();
        log.append(LINE).unwrap();
        fs::rename(&link, &path).unwrap();
        assert!(log.append(LINE).is_err() && log.rotate().is_err());
        assert!(!aim.exists());
    }
}
