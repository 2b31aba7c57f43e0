//! Where the log goes. Statements, values and passwords never reach it: nothing that holds them
//! can be formatted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

use super::background;

/// A log this large is set aside at the next start.
const ROTATE_AT: u64 = 8 << 20;
/// What the libraries may say that write through `log`.
const LIBRARIES: &str = "fuser=warn,mysql_async=warn,rustls=warn,tokio=warn,mio=warn";

/// Logs to `file`, or to standard error. `level` is a level or a filter of `tracing`'s.
///
/// With a file, standard error goes there as well when `take_stderr`: a panic's message has no
/// other way out of a daemon.
pub(crate) fn init(file: Option<&Path>, level: &str, take_stderr: bool) -> io::Result<()> {
    let filter = EnvFilter::try_new(format!("{LIBRARIES},{level}"))
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
        let _ = tracing_log::LogTracer::builder()
            .with_max_level(tracing_log::log::LevelFilter::Warn)
            .init();
    }
    Ok(())
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
