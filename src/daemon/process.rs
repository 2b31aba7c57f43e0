//! A daemon as other processes find it: by its number, and by what tells it from a stranger that has
//! the same number later or in another PID namespace.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value as Json;

/// What status.json says to make a process's number mean something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The process, as its own PID namespace numbers it.
    pub(crate) pid: u32,
    /// The inode of that namespace.
    pub(crate) namespace: Option<u64>,
    /// When it started, in the kernel's ticks.
    pub(crate) started: Option<u64>,
}

impl Identity {
    /// This process.
    pub(crate) fn own() -> Self {
        Identity {
            pid: std::process::id(),
            namespace: namespace(),
            started: started("self"),
        }
    }

    /// The daemon that rendered this status.
    pub(crate) fn of(status: &Json) -> Option<Self> {
        let number = |name| status.get(name).and_then(Json::as_u64);
        Some(Identity {
            pid: number("pid")?.try_into().ok()?,
            namespace: number("pid_namespace"),
            started: number("pid_started"),
        })
    }

    /// The process, if it is alive, in our PID namespace, and `user`'s. All of the identity comes
    /// from the mount, and whoever serves that must not be able to name somebody else's process.
    pub(crate) fn find(self, user: u32) -> Option<Process> {
        let process = Process {
            pid: self.pid,
            started: self.started?,
        };
        let owner = fs::metadata(format!("/proc/{}", self.pid)).ok()?.uid();
        let here = self.namespace.is_some() && self.namespace == namespace();
        (here && owner == user && process.lives()).then_some(process)
    }
}

/// A process of our PID namespace.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its number.
    pub(crate) pid: u32,
    started: u64,
}

impl Process {
    /// Whether it has not ended.
    pub(crate) fn lives(&self) -> bool {
        started(&self.pid.to_string()) == Some(self.started)
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        if let Ok(pid) = libc::pid_t::try_from(self.pid)
            && self.lives()
        {
            // SAFETY: kill takes no pointers; the process was seen to be ours a moment ago.
            unsafe {
                libc::kill(pid, libc::SIGTERM);
            }
        }
    }
}

/// The inode of our PID namespace.
fn namespace() -> Option<u64> {
    Some(fs::metadata("/proc/self/ns/pid").ok()?.ino())
}

/// When the process started, in the kernel's ticks; `None` when there is none, or only a zombie.
fn started(pid: &str) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, can hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut words = rest.split(' ');
    if matches!(words.next()?, "Z" | "X") {
        return None;
    }
    // Field 22; the state is field 3.
    words.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_process_is_told_from_a_stranger_with_its_number() {
        // SAFETY: geteuid has no preconditions and cannot fail.
        let user = unsafe { libc::geteuid() };
        let own = Identity::own();
        assert!(own.find(user).unwrap().lives());
        assert!(own.find(user + 1).is_none(), "somebody else's");
        let later = Identity {
            started: own.started.map(|ticks| ticks + 1),
            ..own
        };
        let elsewhere = Identity {
            namespace: own.namespace.map(|inode| inode + 1),
            ..own
        };
        let vague = Identity {
            namespace: None,
            started: None,
            ..own
        };
        for stranger in [later, elsewhere, vague] {
            assert!(stranger.find(user).is_none(), "{stranger:?}");
        }
        assert_eq!(started("4294967295"), None);
    }

    #[test]
    fn it_is_read_from_a_status() {
        let status = json!({"pid": 7, "pid_namespace": 8, "pid_started": 9});
        let expected = Identity {
            pid: 7,
            namespace: Some(8),
            started: Some(9),
        };
        assert_eq!(Identity::of(&status), Some(expected));
        assert_eq!(Identity::of(&json!({})), None);
    }
}
