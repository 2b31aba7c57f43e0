//! The command line: one file per command, and what they share: help, errors and exit codes.

pub mod apply;
pub mod delete;
pub mod init;
pub mod origin;
pub mod put;

use std::fmt;

/// Why a command failed, and with which exit status.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was called wrongly: exit status 2.
    #[error("{0}")]
    Usage(String),
    /// It could not be done: exit status 1.
    #[error("{0}")]
    Failed(String),
    /// It has said so itself, and ends with this status.
    #[error("exit status {0}")]
    Exit(u8),
}

impl Error {
    /// A usage error that says `error`.
    pub fn usage(error: impl fmt::Display) -> Self {
        Error::Usage(error.to_string())
    }

    /// A failure that says `error`.
    pub fn failed(error: impl fmt::Display) -> Self {
        Error::Failed(error.to_string())
    }
}
