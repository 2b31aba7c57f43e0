//! What is remembered of a change log beside it, in the state directory: up to which entry of the
//! ledger it is written, and the number of its last line. In one write, so that a killed process
//! leaves the old or the new.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::model::Seq;

/// The file, open.
#[derive(Debug)]
pub(super) struct Progress {
    file: File,
    /// What it said when it was opened; `None` if it was new, or is damaged.
    pub(super) found: Option<(Seq, u64)>,
}

impl Progress {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let mut text = String::new();
        let found = match file.read_to_string(&mut text) {
            Ok(_) => parse(&text),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
            Err(error) => return Err(error),
        };
        Ok(Progress { file, found })
    }

    pub(super) fn store(&self, ledger: Seq, number: u64) -> io::Result<()> {
        let text = format!("{:020} {number:020}\n", ledger.get());
        self.file.write_all_at(text.as_bytes(), 0)
    }
}

fn parse(text: &str) -> Option<(Seq, u64)> {
    let (ledger, number) = text.strip_suffix('\n')?.split_once(' ')?;
    Some((Seq::new(ledger.parse().ok()?), number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("changelog");
        let progress = Progress::open(&path).unwrap();
        assert_eq!(progress.found, None);
        for (seq, number) in [(7, 9), (u64::MAX, 0), (1, u64::MAX)] {
            progress.store(Seq::new(seq), number).unwrap();
            let again = Progress::open(&path).unwrap();
            assert_eq!(again.found, Some((Seq::new(seq), number)));
        }
        std::fs::write(&path, b"0001\xff").unwrap();
        assert_eq!(Progress::open(&path).unwrap().found, None);
    }
}
