//! Lookups in `.ctlfs`, whose files change by the clock: each is a version of its own, frozen when
//! it is looked up, so that a reader sees one state from open to close.
//!
//! Programs that copy look a file up twice, to stat it and to open it, and refuse one that was
//! replaced in between. So a version is handed out again while its content is still right, or while
//! nobody has read it and it is young.

use std::time::{Duration, Instant, SystemTime};

use super::server::{Content, Fault, Found, Lookup, Server};
use super::state::{Entered, Version};
use crate::ldb::reader::Mark;
use crate::model::{LedgerTime, Seq};
use crate::tree::node::{ControlFile, Node};

/// For how long a version of `status.json` that nobody has read is handed out again.
const YOUNG: Duration = Duration::from_secs(1);

/// The version of a control file that was handed out last.
#[derive(Debug)]
pub(super) struct Handed {
    ino: u64,
    bytes: Vec<u8>,
    at: Instant,
    read: bool,
}

impl Server {
    /// Looks up a file of `.ctlfs`.
    pub(super) fn lookup_control(&self, file: ControlFile) -> Result<Lookup, Fault> {
        if file == ControlFile::Status
            && let Some(again) =
                self.again(file, |handed| !handed.read && handed.at.elapsed() < YOUNG)
        {
            return Ok(again);
        }
        let bytes = match file {
            ControlFile::Status => (self.status)(&self.counters()),
            ControlFile::Seq => format!("{}\n", self.state().view().seq).into_bytes(),
            ControlFile::Ready if self.board.progress().ready => Vec::new(),
            ControlFile::Ready => return Ok(Lookup::Absent(Duration::ZERO)),
        };
        if let Some(again) = self.again(file, |handed| handed.bytes == bytes) {
            return Ok(again);
        }
        let version = Version {
            bytes: Some(self.keeper.keep(bytes.clone())),
            mark: Mark {
                seq: Seq::ZERO,
                time: SystemTime::now().into(),
            },
        };
        let mut state = self.state();
        let (size, time) = (bytes.len() as u64, version.mark.time);
        let entered = state.enter_frozen(Node::ControlFile(file), version);
        let handed = Handed {
            ino: entered.ino,
            bytes,
            at: Instant::now(),
            read: false,
        };
        state.controls.insert(file, handed);
        drop(state);
        Ok(self.control_entry(file, &entered, size, time))
    }

    /// Notes that somebody has read `ino`, a version of `file`.
    pub(super) fn control_was_read(&self, file: ControlFile, ino: u64) {
        if let Some(handed) = self.state().controls.get_mut(&file)
            && handed.ino == ino
        {
            handed.read = true;
        }
    }

    /// The version that was handed out last, once more, if it will do and the kernel still has it.
    fn again(&self, file: ControlFile, will_do: impl FnOnce(&Handed) -> bool) -> Option<Lookup> {
        let mut state = self.state();
        let handed = state.controls.get(&file).filter(|handed| will_do(handed))?;
        let (ino, size) = (handed.ino, handed.bytes.len() as u64);
        let time = state.slot(ino)?.version.as_ref()?.mark.time;
        let entered = state.enter_again(ino)?;
        drop(state);
        Some(self.control_entry(file, &entered, size, time))
    }

    fn control_entry(
        &self,
        file: ControlFile,
        entered: &Entered,
        size: u64,
        time: LedgerTime,
    ) -> Lookup {
        let found = Found {
            size,
            mark: Mark {
                seq: Seq::ZERO,
                time,
            },
            content: Content::None,
        };
        Lookup::Found {
            attributes: self.attributes(&Node::ControlFile(file), entered.ino, &found, 1),
            entry_ttl: entered.entry_ttl,
            attr_ttl: entered.attr_ttl,
        }
    }
}
