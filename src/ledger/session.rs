//! One connection to a MySQL or MariaDB server behind blocking calls, for the origin that reads
//! the ledger and for the executive that writes it.
//!
//! Every session runs in the modes of ctlstore's protocol, so that one statement text means the
//! same in MySQL and in SQLite. Every call ends: connecting and each answer have a time limit. A
//! connection that failed is dropped, and the next call makes a new one.

use std::time::Duration;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, IoError, Opts, OptsBuilder};
use tokio::runtime::Runtime;

use super::OriginError;
use super::url::MySqlUrl;

/// How long connecting and logging in may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server may stay silent in an answer.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Following the ledger.
    Read,
    /// Writing: values that a column cannot hold are errors, never cut.
    Write,
}

/// Why a call on a session failed.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// What the driver or server said.
    Database(Error),
    /// Nothing within [`ANSWER_TIMEOUT`].
    Silent,
    /// The connection that the call relies on is gone.
    Gone,
}

impl From<Error> for SessionError {
    fn from(error: Error) -> Self {
        SessionError::Database(error)
    }
}

impl SessionError {
    /// The server's error number, if it was the server that said no.
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            SessionError::Database(Error::Server(e)) => Some(e.code),
            _ => None,
        }
    }

    /// Whether it was the server that said no, and to the statement: not to a connection or query
    /// that it was ending meanwhile.
    pub(crate) fn is_refusal(&self) -> bool {
        self.code().is_some_and(|c| c != 1317 && !hangs_up(c))
    }

    /// Whether the connection cannot be used any more.
    fn is_fatal(&self) -> bool {
        match self {
            SessionError::Database(e) => e.is_fatal() || self.code().is_some_and(hangs_up),
            SessionError::Silent | SessionError::Gone => true,
        }
    }

    /// The error as whoever follows or fills the ledger sees it.
    pub(crate) fn into_origin(self, origin: String) -> OriginError {
        let error = match self {
            SessionError::Silent => {
                return OriginError::Unreachable {
                    origin,
                    reason: format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
                };
            }
            SessionError::Gone => {
                return OriginError::Unreachable {
                    origin,
                    reason: "the connection broke".into(),
                };
            }
            SessionError::Database(error) => error,
        };
        match error {
            Error::Io(IoError::Io(e)) => OriginError::Unreachable {
                origin,
                reason: match e.kind() {
                    std::io::ErrorKind::ConnectionRefused => {
                        format!("{e}; check the host and port, and that the server runs")
                    }
                    _ => e.to_string(),
                },
            },
            Error::Io(IoError::Tls(e)) => OriginError::Failed {
                origin,
                reason: format!("TLS: {e}"),
            },
            Error::Server(e) => {
                let reason = if holds_no_value(e.code) {
                    format!("{} (error {})", e.message, e.code)
                } else {
                    format!("error {} ({})", e.code, e.state)
                };
                match e.code {
                    // Too many connections, server shutting down, connection killed.
                    1040 | 1053 | 1152 | 1203 | 1226 | 1927 | 4031 => {
                        OriginError::Unreachable { origin, reason }
                    }
                    1045 | 1130 | 1251 | 1698 | 1820 | 1862 | 4151 => {
                        OriginError::Denied { origin, reason }
                    }
                    1044 | 1142 | 1143 | 1227 => OriginError::NotAllowed { origin, reason },
                    1049 => OriginError::NoDatabase { origin, reason },
                    1146 => OriginError::NotInitialised { origin },
                    _ => OriginError::Failed { origin, reason },
                }
            }
            Error::Driver(mysql_async::DriverError::ConnectionClosed) => OriginError::Unreachable {
                origin,
                reason: "the server closed the connection".into(),
            },
            Error::Driver(mysql_async::DriverError::PacketTooLarge) => OriginError::Failed {
                origin,
                reason: "a statement is larger than the server's max_allowed_packet; raise it \
                         there"
                    .into(),
            },
            // The other driver errors may carry rows in their Debug text, never in this one.
            other => OriginError::Failed {
                origin,
                reason: other.to_string(),
            },
        }
    }
}

/// Errors with which a server ends a connection: shutdown, killed, idle for too long.
fn hangs_up(code: u16) -> bool {
    matches!(code, 1053 | 1152 | 1927 | 4031)
}

/// Errors whose text holds names, numbers of the server's and advice, never a value or a part of
/// the statement. Values are users' data, which no log shows; of an error that is not listed only
/// the number is shown.
fn holds_no_value(code: u16) -> bool {
    match code {
        // Logging in, privileges, the binlog, and a server that is full, ending or read-only.
        1040 | 1044 | 1045 | 1053 | 1130 | 1142 | 1143 | 1152 | 1203 | 1226 | 1227 | 1251
        | 1236 | 1290 | 1317 | 1698 | 1792 | 1820 | 1836 | 1862 | 1927 | 4031 | 4151 => true,
        // Disk, storage engine, memory, locks.
        1021 | 1026 | 1030 | 1036 | 1037 | 1038 | 1041 | 1114 | 1205 | 1206 | 1213 => true,
        // Databases, tables, columns and keys that are missing, there, or too long.
        1046 | 1048 | 1049 | 1050 | 1051 | 1054 | 1060 | 1071 | 1074 | 1091 | 1117 | 1118
        | 1146 | 1153 | 1170 | 1364 | 1406 | 1709 => true,
        _ => false,
    }
}

/// A connection, made when it is first needed.
pub(crate) struct Session {
    opts: Opts,
    origin: String,
    runtime: Option<Runtime>,
    conn: Option<Conn>,
    /// How many connections were made.
    made: u64,
}

impl Session {
    /// A session that is not connected yet.
    pub(crate) fn new(url: &MySqlUrl, purpose: Purpose) -> Result<Self, OriginError> {
        let strict = match purpose {
            Purpose::Read => "",
            Purpose::Write => ",STRICT_ALL_TABLES",
        };
        let mut setup = vec![
            "SET NAMES utf8mb4".to_owned(),
            format!(
                "SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES,ANSI_QUOTES{strict}', \
                 SESSION time_zone = '+00:00', SESSION autocommit = 1"
            ),
            // Whatever the server's defaults are: each read sees what is committed, and no more.
            "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ".into(),
        ];
        if purpose == Purpose::Write {
            // Both shorter than ANSWER_TIMEOUT, so that the server says why it waits.
            setup.push(
                "SET SESSION innodb_lock_wait_timeout = 20, SESSION lock_wait_timeout = 20".into(),
            );
        }
        let origin = url.to_string();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| OriginError::Unreachable {
                origin: origin.clone(),
                reason: format!("no runtime for the connection: {e}"),
            })?;
        Ok(Session {
            opts: OptsBuilder::from_opts(url.opts().clone())
                .setup(setup)
                .into(),
            origin,
            runtime: Some(runtime),
            conn: None,
            made: 0,
        })
    }

    /// The origin as a person may see it.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether there is a connection that worked when it was last used.
    pub(crate) fn is_connected(&self) -> bool {
        self.conn.is_some()
    }

    /// How many connections were made so far: another number, another connection.
    pub(crate) fn connections(&self) -> u64 {
        self.made
    }

    /// Connects if there is no connection.
    pub(crate) fn connect(&mut self) -> Result<(), SessionError> {
        if self.conn.is_some() {
            return Ok(());
        }
        let runtime = self.runtime.as_ref().ok_or(SessionError::Gone)?;
        let opts = self.opts.clone();
        let connecting = runtime
            .block_on(async { tokio::time::timeout(CONNECT_TIMEOUT, Conn::new(opts)).await });
        match connecting {
            Ok(conn) => {
                self.conn = Some(conn?);
                self.made += 1;
                Ok(())
            }
            Err(_) => Err(SessionError::Database(Error::Io(IoError::Io(
                std::io::Error::new(
                    std::io::ErrorKind::TimedOut,
                    format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()),
                ),
            )))),
        }
    }

    /// Runs `work` on the connection that exists; an error if there is none, since whoever calls
    /// this has a transaction open on it. `work` bounds its own time with [`answer`].
    pub(crate) fn run<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Conn) -> Result<T, SessionError>,
    ) -> Result<T, SessionError> {
        let (Some(runtime), Some(conn)) = (self.runtime.as_ref(), self.conn.as_mut()) else {
            return Err(SessionError::Gone);
        };
        let result = runtime.block_on(work(conn));
        if result.as_ref().is_err_and(SessionError::is_fatal) {
            self.drop_connection();
        }
        result
    }

    /// Runs `work`, which only reads or may be repeated, connecting first. When a connection that
    /// was idle proves broken, once more on a new one.
    pub(crate) fn run_again<T>(
        &mut self,
        work: impl AsyncFn(&mut Conn) -> Result<T, SessionError>,
    ) -> Result<T, SessionError> {
        let reused = self.is_connected();
        self.connect()?;
        match self.run(&work) {
            Err(SessionError::Database(_)) if reused && !self.is_connected() => {
                self.connect()?;
                self.run(&work)
            }
            result => result,
        }
    }

    /// Forgets the connection, with whatever is unread on it.
    pub(crate) fn drop_connection(&mut self) {
        // Outside the runtime: inside, mysql_async would first read the rest of the answer.
        self.conn = None;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.conn = None;
        if let Some(runtime) = self.runtime.take() {
            // Not the usual drop, which waits for a name lookup that may hang.
            runtime.shutdown_background();
        }
    }
}

/// Waits for one answer of the server, at most [`ANSWER_TIMEOUT`].
pub(crate) async fn answer<T>(
    waiting: impl Future<Output = Result<T, Error>>,
) -> Result<T, SessionError> {
    match tokio::time::timeout(ANSWER_TIMEOUT, waiting).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(SessionError::Silent),
    }
}

/// Runs statements whose rows, if any, nobody wants.
pub(crate) async fn execute(conn: &mut Conn, sql: &str) -> Result<(), SessionError> {
    answer(conn.query_drop(sql)).await
}

#[cfg(test)]
mod tests {
    use mysql_async::ServerError;

    use super::*;

    fn says(code: u16, message: &str) -> OriginError {
        SessionError::Database(Error::Server(ServerError {
            code,
            message: message.into(),
            state: "HY000".into(),
        }))
        .into_origin("mysql://db/ctldb".into())
    }

    #[test]
    fn a_missing_privilege_is_not_a_wrong_password() {
        for code in [1044, 1142, 1143, 1227] {
            let error = says(code, "INSERT command denied to user 'me'");
            assert!(matches!(error, OriginError::NotAllowed { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("INSERT command denied"), "{text}");
            assert!(!text.contains("password"), "{text}");
        }
        assert!(matches!(says(1045, "no"), OriginError::Denied { .. }));
    }

    #[test]
    fn errors_that_may_quote_a_value_show_their_number_only() {
        for code in [1062, 1064, 1292, 1300, 1366, 1525, 1690, 3140, 65000] {
            let text = says(code, "wrong: 'hunter2'").to_string();
            assert!(!text.contains("hunter2"), "{text}");
            assert!(text.contains(&code.to_string()), "{text}");
        }
    }
}
