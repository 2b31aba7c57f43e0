//! Push from MySQL and MariaDB: follows the server's binlog from its end, as a replica does, and
//! tells of every transaction that touched the ledger. What the rows hold is not looked at.
//!
//! The stream is made again whenever it breaks or falls silent: soon at first, and never so late
//! that a server that is back for five seconds is not followed. Each time it starts anew from the
//! end of the binlog and says that something may have been missed. Two followers with one server
//! number end each other's streams, so the number is drawn anew for every connection.

mod events;

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_core::Stream;
use mysql_async::prelude::Queryable;
use mysql_async::{BinlogStream, BinlogStreamRequest, Conn, Error, Opts, OptsBuilder, Row};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tracing::{debug, trace};

use super::OriginError;
use super::push::{Listener, Push, PushState, Settling};
use super::session::{CONNECT_TIMEOUT, SessionError, answer};
use super::url::MySqlUrl;
use crate::pace::{Backoff, full_jitter, jitter, random};
use events::{Told, Tracker};

/// How often the server says that it is there while nothing happens.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// After how long without a word the stream counts as broken.
const SILENCE: Duration = Duration::from_secs(3);
/// The first pause before the stream is made again, and the longest while the server is away.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// The pause when there is no binlog to read or no privilege to, which only a person changes.
const OFF_PAUSE: Duration = Duration::from_secs(60);
/// A commit is in the binlog, on the disk, a moment before it is visible.
const COMMIT: Duration = Duration::from_secs(1);
/// The most that a position in COM_BINLOG_DUMP can be.
const MAX_POSITION: u64 = u32::MAX as u64;

/// Where servers tell the end of their binlog: MySQL from 8.2, all before that, and what MariaDB
/// calls it besides.
const WHERE_IT_ENDS: [&str; 3] = [
    "SHOW BINARY LOG STATUS",
    "SHOW MASTER STATUS",
    "SHOW BINLOG STATUS",
];

/// The binlog of the server that holds the ledger.
pub(super) struct BinlogPush {
    opts: Opts,
    origin: String,
    database: String,
    /// Counts the streams that broke.
    broken: Arc<watch::Sender<u64>>,
}

/// Why there is no stream, or no longer one.
enum End {
    /// The listener was stopped.
    Stopped,
    /// There is no binlog, or none that this user may read.
    Off(String),
    /// The server is away, or ended it.
    Broken(String),
    /// Anything else that trying again may or may not help against.
    Failed(String),
}

impl BinlogPush {
    /// Follows the binlog of the server in `url`; `broken` changes whenever a stream breaks.
    pub(super) fn new(
        url: &MySqlUrl,
        heartbeat: Duration,
        broken: Arc<watch::Sender<u64>>,
    ) -> Self {
        let period = heartbeat.min(HEARTBEAT).as_nanos();
        let setup = vec![
            "SET NAMES utf8mb4".to_owned(),
            // MySQL ends an older stream of the same UUID; without one, and in MariaDB, of the
            // same server number. A MariaDB that does not hear that its GTID events are understood
            // rewrites them.
            format!(
                "SET @master_heartbeat_period = {period}, @source_heartbeat_period = {period}, \
                 @mariadb_slave_capability = 4, @slave_uuid = UUID(), @replica_uuid = @slave_uuid"
            ),
        ];
        BinlogPush {
            opts: OptsBuilder::from_opts(url.opts().clone())
                .setup(setup)
                .into(),
            origin: url.to_string(),
            database: url.database().to_owned(),
            broken,
        }
    }

    /// Makes one stream and follows it to its end. `told` is when it began to tell, if it did.
    fn follow(
        &self,
        runtime: &Runtime,
        listener: &dyn Listener,
        stop: &Notify,
        told: &mut Option<Instant>,
    ) -> End {
        let connected = runtime.block_on(async {
            tokio::select! {
                biased;
                () = stop.notified() => Err(End::Stopped),
                stream = self.connect() => stream,
            }
        });
        let mut stream = match connected {
            Ok(stream) => stream,
            Err(end) => return end,
        };
        let end = runtime.block_on(async {
            tokio::select! {
                biased;
                () = stop.notified() => End::Stopped,
                end = self.read(&mut stream, listener, told) => end,
            }
        });
        // Outside the runtime: inside, mysql_async would first read the stream to its end.
        drop(stream);
        end
    }

    async fn connect(&self) -> Result<BinlogStream, End> {
        let connecting = async {
            let mut conn = Conn::new(self.opts.clone())
                .await
                .map_err(|e| self.end(e))?;
            let (file, position) = self.end_of_binlog(&mut conn).await?;
            let request = BinlogStreamRequest::new(server_number())
                .with_filename(&file)
                .with_pos(position);
            conn.get_binlog_stream(request)
                .await
                .map_err(|e| self.end(e))
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(stream) => stream,
            Err(_) => Err(End::Broken(format!(
                "{} did not answer within {} s",
                self.origin,
                CONNECT_TIMEOUT.as_secs()
            ))),
        }
    }

    async fn end_of_binlog(&self, conn: &mut Conn) -> Result<(Vec<u8>, u64), End> {
        for question in WHERE_IT_ENDS {
            let row: Option<Row> = match answer(conn.query_first(question)).await {
                Ok(row) => row,
                // It is no statement of this server.
                Err(error) if error.code() == Some(1064) => continue,
                Err(SessionError::Database(error)) => return Err(self.end(error)),
                Err(error) => return Err(End::Broken(self.explain(error).to_string())),
            };
            let position = row.and_then(|row| {
                let file: Vec<u8> = row.get_opt(0)?.ok()?;
                let position: u64 = row.get_opt(1)?.ok()?;
                Some((file, position))
            });
            return match position {
                None => Err(End::Off(format!(
                    "{} writes no binlog; start the server with log_bin to have changes at once",
                    self.origin
                ))),
                // The server begins a new file behind a transaction that is so large.
                Some((_, position)) if position > MAX_POSITION => Err(End::Broken(format!(
                    "{} stands beyond 4 GiB in its binlog file; waiting for its next file",
                    self.origin
                ))),
                Some(end) => Ok(end),
            };
        }
        Err(End::Failed(format!(
            "{} knows no way to ask where its binlog ends",
            self.origin
        )))
    }

    async fn read(
        &self,
        stream: &mut BinlogStream,
        listener: &dyn Listener,
        told: &mut Option<Instant>,
    ) -> End {
        let mut tracker = Tracker::new(&self.database);
        let mut contact = Instant::now();
        loop {
            let next = poll_fn(|context| Pin::new(&mut *stream).poll_next(context));
            let event = match tokio::time::timeout(SILENCE, pin!(next)).await {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) => return self.end(error),
                Ok(None) => return End::Broken(format!("{} ended the binlog stream", self.origin)),
                Err(_) => {
                    return End::Broken(format!(
                        "{} was silent for {} s",
                        self.origin,
                        SILENCE.as_secs()
                    ));
                }
            };
            if told.is_none() {
                // The first event proves that the server has accepted us.
                *told = Some(Instant::now());
                listener.state(PushState::On, None);
                listener.contact(false);
                listener.changed(None);
            }
            let kind = event.header().event_type_raw();
            trace!(kind, bytes = event.data().len(), "binlog event");
            match tracker.event(kind, event.data()) {
                Told::Changed(seq) => {
                    debug!(?seq, "the binlog tells of a change of the ledger");
                    listener.changed(seq);
                }
                Told::Quiet => {
                    contact = Instant::now();
                    listener.contact(true);
                }
                Told::Nothing if contact.elapsed() >= HEARTBEAT / 4 => {
                    contact = Instant::now();
                    listener.contact(false);
                }
                Told::Nothing => {}
            }
        }
    }

    fn explain(&self, error: SessionError) -> OriginError {
        error.into_origin(self.origin.clone())
    }

    fn end(&self, error: Error) -> End {
        if let Error::Driver(error) = &error
            && !matches!(error, mysql_async::DriverError::ConnectionClosed)
        {
            // Its text may hold a part of an event.
            return End::Failed(format!("{} sent what is no binlog", self.origin));
        }
        let code = match &error {
            Error::Server(error) => Some(error.code),
            _ => None,
        };
        let error = self.explain(SessionError::Database(error));
        match (&error, code) {
            (OriginError::NotAllowed { reason, .. }, _) => End::Off(format!(
                "{} does not let this user follow its binlog: {reason}; GRANT REPLICATION SLAVE, \
                 REPLICATION CLIENT ON *.* to the user to have changes at once",
                self.origin
            )),
            // It has too many connections, all in all or of this user: more tries make it worse.
            (_, Some(1040 | 1203 | 1226)) => End::Failed(error.to_string()),
            (OriginError::Unreachable { .. }, _) => End::Broken(error.to_string()),
            // The server's own word for a stream that it ends: a file that is gone, another
            // follower with the same number, a query that was killed.
            (_, Some(1236 | 1317)) => End::Broken(error.to_string()),
            _ => End::Failed(error.to_string()),
        }
    }
}

impl Push for BinlogPush {
    fn settling(&self) -> Settling {
        Settling {
            within: COMMIT,
            pause: None,
        }
    }

    fn blind_spot(&self) -> &'static str {
        "the server that is followed may not write what it replicates to its binlog \
         (log_slave_updates), or the writer turned it off (sql_log_bin)"
    }

    fn run(&mut self, listener: &dyn Listener) {
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => {
                listener.state(PushState::Off, Some(format!("no runtime for it: {error}")));
                return;
            }
        };
        let stop = Arc::new(Notify::new());
        let stopper = Arc::clone(&stop);
        // A permit that nobody waits for yet is kept.
        listener.on_stop(Box::new(move || stopper.notify_one()));
        let mut backoff = Backoff::new(FIRST_PAUSE);
        while !listener.is_stopped() {
            let mut told = None;
            let end = self.follow(&runtime, listener, &stop, &mut told);
            if let Some(since) = told {
                self.broken.send_modify(|count| *count += 1);
                // One that the server accepts and ends at once is no reason to hurry.
                if since.elapsed() >= Duration::from_secs(1) {
                    backoff.reset();
                }
            }
            let pause = match end {
                End::Stopped => break,
                End::Off(reason) => {
                    listener.state(PushState::Off, Some(reason));
                    jitter(OFF_PAUSE, random())
                }
                End::Broken(reason) => {
                    listener.state(PushState::Connecting, Some(reason));
                    // A server that is back is met by the whole fleet.
                    full_jitter(backoff.next(LONGEST_PAUSE), random())
                }
                End::Failed(reason) => {
                    listener.state(PushState::Connecting, Some(reason));
                    full_jitter(backoff.next(OFF_PAUSE), random())
                }
            };
            let stopped = runtime
                .block_on(async { tokio::time::timeout(pause, stop.notified()).await.is_ok() });
            if stopped {
                break;
            }
        }
        // Not the usual drop, which waits for a name lookup that may hang.
        runtime.shutdown_background();
    }
}

/// A number from the upper half of what a server's can be, where people number none.
fn server_number() -> u32 {
    u32::try_from(random() >> 33).unwrap_or(0) | 1 << 31
}
