//! Looking at files and open directories.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use serde_json::Value as Json;

/// Opens a file or directory for reading.
pub fn open(path: &std::path::Path, is_dir: bool) -> File {
    let flags = if is_dir { libc::O_DIRECTORY } else { 0 };
    File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

/// What an open directory has under a name: nothing, a directory, or a file with these bytes.
pub fn read_at(directory: &File, name: &[u8]) -> Option<Option<Vec<u8>>> {
    let name = CString::new(name).unwrap();
    // SAFETY: the descriptor is open and `name` is a NUL-terminated string.
    let fd = unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), libc::O_RDONLY) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(
            error.raw_os_error(),
            Some(libc::ENOENT),
            "{name:?}: {error}"
        );
        return None;
    }
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    if file.metadata().unwrap().is_dir() {
        return Some(None);
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    Some(Some(bytes))
}

/// Reads a file from its start into the buffer; gives the length.
pub fn read_whole(file: &File, buffer: &mut [u8]) -> usize {
    let mut length = 0;
    while let Ok(more @ 1..) = file.read_at(&mut buffer[length..], length as u64) {
        length += more;
    }
    length
}

/// Whether a file is this JSON, its members in this order, and a newline.
pub fn is_json(bytes: &[u8], expected: &Json) -> bool {
    let Some(text) = bytes.strip_suffix(b"\n") else {
        return false;
    };
    let Ok(found) = serde_json::from_slice::<Json>(text) else {
        return false;
    };
    let members = |json: &Json| {
        json.as_object()
            .map(|o| o.keys().cloned().collect::<Vec<_>>())
    };
    found == *expected && members(&found) == members(expected)
}
