//! Where the log goes. Statements, values and passwords never reach it: nothing that holds them
//! can be formatted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use tracing_log::log;
use tracing_subscriber::EnvFilter;

use super::background;

/// A log this large is set aside at the next start.
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
        .with_target(false);
    let installed = match file {
        Some(path) => {
            let file = open(path)?;
            if take_stderr {
                background::redirect(&file, libc::STDERR_FILENO)?;
            }
            tracing::subscriber::set_global_default(builder.with_writer(Mutex::new(file)).finish())
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
        metadata.level() <= log::Level::Warn
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

fn open(path: &Path) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() > ROTATE_AT) {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        fs::rename(path, old)?;
    }
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

    #[test]
    fn a_large_log_is_set_aside() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("ctlfs.log");
        open(&path).unwrap().set_len(ROTATE_AT + 1).unwrap();
        let file = open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(root.path().join("ctlfs.log.1").exists());
    }
}
