//! `--signal`: which process gets which signal.

use std::fs;
use std::io;
use std::path::PathBuf;

/// Who gets what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Receiver {
    process: Process,
    signal: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Process {
    Pid(i32),
    /// A file that holds the number, read each time.
    File(PathBuf),
}

const SIGNALS: [(&str, i32); 8] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("TERM", libc::SIGTERM),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("WINCH", libc::SIGWINCH),
    ("CONT", libc::SIGCONT),
];

impl Receiver {
    /// Reads `PID`, `PIDFILE`, or one of them with `:SIGNAL` behind it; without that it is SIGHUP.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let named = text.rsplit_once(':').and_then(|(process, signal)| {
            let signal = signal.strip_prefix("SIG").unwrap_or(signal);
            let (_, number) = SIGNALS.into_iter().find(|(name, _)| *name == signal)?;
            Some((process, number))
        });
        let (process, signal) = named.unwrap_or((text, libc::SIGHUP));
        if process.is_empty() {
            return Err("give a process number or the file that holds it".into());
        }
        let process = if process.bytes().all(|b| b.is_ascii_digit()) {
            Process::Pid(pid(process).ok_or("no process can have that number")?)
        } else {
            Process::File(process.into())
        };
        Ok(Receiver { process, signal })
    }

    /// Sends it.
    pub(super) fn send(&self) -> Result<(), String> {
        let pid = match &self.process {
            Process::Pid(pid) => *pid,
            Process::File(file) => fs::read_to_string(file)
                .map_err(|error| {
                    format!(
                        "cannot read the process number in {}: {error}; does the process run?",
                        file.display()
                    )
                })
                .and_then(|text| {
                    pid(text.trim()).ok_or_else(|| {
                        format!(
                            "cannot read the process number in {}: it holds none",
                            file.display()
                        )
                    })
                })?,
        };
        // SAFETY: kill takes no pointers; the number is positive, so it names one process.
        if unsafe { libc::kill(pid, self.signal) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(format!("cannot signal process {pid}: {error}"))
    }
}

/// The number of one process that is not the first of all.
fn pid(text: &str) -> Option<i32> {
    text.parse().ok().filter(|pid| *pid > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_what_is_read() {
        let file = |path: &str, signal| Receiver {
            process: Process::File(path.into()),
            signal,
        };
        for (text, expected) in [
            ("/run/nginx.pid", file("/run/nginx.pid", libc::SIGHUP)),
            ("/run/n.pid:USR2", file("/run/n.pid", libc::SIGUSR2)),
            ("/run/n.pid:SIGTERM", file("/run/n.pid", libc::SIGTERM)),
            ("/run/a:b", file("/run/a:b", libc::SIGHUP)),
        ] {
            assert_eq!(Receiver::parse(text).unwrap(), expected, "{text}");
        }
        let own = Receiver::parse("4711:WINCH").unwrap();
        assert_eq!(own.process, Process::Pid(4711));
        for bad in ["", ":HUP", "0", "1", "99999999999"] {
            assert!(Receiver::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_signal_goes_to_the_process_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        // Ignored unless somebody handles it.
        let receiver = Receiver::parse(&format!("{}:WINCH", file.display())).unwrap();
        assert!(
            receiver
                .send()
                .unwrap_err()
                .contains("does the process run")
        );
        fs::write(&file, "none\n").unwrap();
        assert!(receiver.send().unwrap_err().contains("holds none"));
        fs::write(&file, format!("{}\n", std::process::id())).unwrap();
        receiver.send().unwrap();
    }
}
