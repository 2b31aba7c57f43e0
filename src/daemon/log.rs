//! Where the log goes. Statements, values and passwords never reach it: nothing that holds them
//! can be formatted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing_log::log;
use tracing_subscriber::EnvFilter;

use super::background;

/// A log that would grow beyond this is set aside.
const ROTATE_AT: u64 = 8 << 20;
/// Libraries that write through `tracing` themselves get no further than this.
const QUIET: &str = "tokio=warn,mio=warn";

/// Logs to `file`, or to standard error. `level` is a level or a filter of `tracing`'s.
///
/// With a file, standard error goes there as well when `take_stderr`: a panic's message has no
/// other way out of a daemon.
pub(crate) fn init(file: Option<&Path>, level: &str, take_stderr: bool) -> io::Result<()> {
    let filter = EnvFilter::try_new(format!("{QUIET},{level}"))
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        // A line that cannot be written is lost. Told on standard error, which may be the same full
        // file or a pipe that nobody reads, it would be a panic.
        .log_internal_errors(false);
    let installed = match file {
        Some(path) => {
            let log = Log::open(path, take_stderr)?;
            tracing::subscriber::set_global_default(builder.with_writer(Mutex::new(log)).finish())
                .is_ok()
        }
        None => tracing::subscriber::set_global_default(builder.with_writer(io::stderr).finish())
            .is_ok(),
    };
    if installed {
        // Taken already means that it was taken by an earlier start in this process.
        if log::set_logger(&Libraries).is_ok() {
            log::set_max_level(log::LevelFilter::Warn);
        }
    }
    Ok(())
}

/// Hands on what fuser, mysql_async and others say through `log`, as one line each. Debug records
/// of theirs can hold statements, so nothing below a warning passes.
struct Libraries;

impl log::Log for Libraries {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        // fuser unmounts once more at its end and warns that there is nothing left to unmount.
        metadata.level() <= log::Level::Warn && metadata.target() != "fuser::mnt"
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if record.level() == log::Level::Error {
            tracing::error!("{}: {text}", record.target());
        } else {
            tracing::warn!("{}: {text}", record.target());
        }
    }

    fn flush(&self) {}
}

/// A log file of limited size: with the one before it, it takes no more than twice [`ROTATE_AT`].
struct Log {
    path: PathBuf,
    file: File,
    take_stderr: bool,
    /// Whether it is a file that may be renamed, not a device or a link to something.
    regular: bool,
}

impl Log {
    fn open(path: &Path, take_stderr: bool) -> io::Result<Self> {
        let file = append(path)?;
        let mut log = Log {
            path: path.to_owned(),
            file,
            take_stderr,
            regular: fs::symlink_metadata(path)?.is_file(),
        };
        log.make_room(0)?;
        log.redirect()?;
        Ok(log)
    }

    /// Sets the file aside if `more` bytes would make it too large. Asks for its size each time:
    /// what goes to standard error is in it too.
    fn make_room(&mut self, more: usize) -> io::Result<()> {
        let size = self.file.metadata()?.len();
        if !self.regular || size == 0 || size.saturating_add(more as u64) <= ROTATE_AT {
            return Ok(());
        }
        let mut old = self.path.as_os_str().to_owned();
        old.push(".1");
        let new = fs::rename(&self.path, old).and_then(|()| append(&self.path));
        match new {
            Ok(file) => {
                self.file = file;
                self.redirect()
            }
            // A full disk does more harm than a lost log.
            Err(_) => self.file.set_len(0),
        }
    }

    fn redirect(&self) -> io::Result<()> {
        if self.take_stderr {
            background::redirect(&self.file, libc::STDERR_FILENO)?;
        }
        Ok(())
    }
}

impl Write for Log {
    /// `line` is a whole one: that is how `tracing` writes.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.make_room(line.len())?;
        self.file.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Whether `level` can be used.
pub(crate) fn is_level(level: &str) -> bool {
    EnvFilter::try_new(level).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(file: &File) -> u32 {
        file.metadata().unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_large_log_is_set_aside() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("ctlfs.log");
        append(&path).unwrap().set_len(ROTATE_AT + 1).unwrap();
        let log = Log::open(&path, false).unwrap();
        assert_eq!(log.file.metadata().unwrap().len(), 0);
        assert_eq!(mode(&log.file), 0o600);
        assert!(root.path().join("ctlfs.log.1").exists());
    }

    #[test]
    fn a_log_stays_small_while_it_is_written() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("ctlfs.log");
        let mut log = Log::open(&path, false).unwrap();
        log.write_all(b"first\n").unwrap();
        log.file.set_len(ROTATE_AT - 4).unwrap();
        log.write_all(b"next\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"next\n");
        assert_eq!(mode(&log.file), 0o600);
        let old = fs::metadata(root.path().join("ctlfs.log.1")).unwrap();
        assert_eq!(old.len(), ROTATE_AT - 4);
        // The name is taken by something that cannot be replaced.
        fs::remove_file(root.path().join("ctlfs.log.1")).unwrap();
        fs::create_dir(root.path().join("ctlfs.log.1")).unwrap();
        log.file.set_len(ROTATE_AT).unwrap();
        log.write_all(b"last\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"last\n");
    }

    #[test]
    fn what_is_no_file_of_its_own_is_not_renamed() {
        let root = tempfile::tempdir().unwrap();
        let (file, link) = (root.path().join("file"), root.path().join("link"));
        append(&file).unwrap().set_len(ROTATE_AT + 1).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut log = Log::open(&link, false).unwrap();
        log.write_all(b"more\n").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().len(), ROTATE_AT + 6);
        assert!(!root.path().join("link.1").exists());
    }
}
