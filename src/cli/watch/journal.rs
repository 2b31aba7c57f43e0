//! The end of a table's journal, read from its file: no more of it than what is behind a sequence.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// It is read from its end, in steps of this.
const TAIL: u64 = 64 << 10;

/// The end of a journal.
pub(super) struct Journal {
    /// Behind this, it is complete.
    pub(super) floor: u64,
    bytes: Vec<u8>,
    /// Where the first line begins that is behind the cursor.
    start: usize,
}

impl Journal {
    /// Reads as much from the end as it takes to get to a line at or before `cursor`. An open file
    /// never changes.
    pub(super) fn read(file: &File, cursor: u64) -> io::Result<Self> {
        let corrupt = || io::Error::new(io::ErrorKind::InvalidData, "it is no journal");
        let size = file.metadata()?.len();
        let head = read_part(file, 0, size.min(256))?;
        let header = head.split(|b| *b == b'\n').next().unwrap_or_default();
        let floor: serde_json::Value = serde_json::from_slice(header).map_err(|_| corrupt())?;
        let floor = floor["floor"].as_u64().ok_or_else(corrupt)?;
        let body = u64::try_from(header.len() + 1)
            .map_err(|_| corrupt())?
            .min(size);
        let mut length = TAIL;
        loop {
            let from = size.saturating_sub(length).max(body);
            let bytes = read_part(file, from, size - from)?;
            // Unless all was read, the first line may have been cut.
            let whole = if from == body {
                Some(0)
            } else {
                bytes.iter().position(|b| *b == b'\n').map(|at| at + 1)
            };
            if let Some(whole) = whole {
                let lines = bytes.get(whole..).unwrap_or_default();
                let reaches = line_seq(lines).is_some_and(|seq| seq <= cursor);
                if reaches || from == body {
                    let skipped: usize = lines
                        .split_inclusive(|b| *b == b'\n')
                        .take_while(|line| line_seq(line).is_some_and(|seq| seq <= cursor))
                        .map(<[u8]>::len)
                        .sum();
                    return Ok(Journal {
                        floor,
                        start: whole + skipped,
                        bytes,
                    });
                }
            }
            length = length.saturating_mul(4);
        }
    }

    /// The lines behind the cursor.
    pub(super) fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let bytes = self.bytes.get(self.start..).unwrap_or_default();
        bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty())
    }
}

fn read_part(file: &File, from: u64, length: u64) -> io::Result<Vec<u8>> {
    let too_long = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let mut bytes = vec![0; usize::try_from(length).map_err(too_long)?];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}

/// The sequence that a line of a journal begins with.
fn line_seq(line: &[u8]) -> Option<u64> {
    let digits = line.strip_prefix(b"{\"seq\":")?;
    let end = digits.iter().position(|b| !b.is_ascii_digit())?;
    number(digits.get(..end)?)
}

/// A number, as files of the tree hold it.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim_end().parse().ok()
}
