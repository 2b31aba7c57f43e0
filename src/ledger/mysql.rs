//! The ledger in a MySQL or MariaDB database. It only reads.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Row, Value};
use tokio::sync::watch;

use super::binlog::BinlogPush;
use super::push::Push;
use super::session::{Purpose, Session, SessionError, answer};
use super::url::MySqlUrl;
use super::{Entry, LEDGER_TABLE, Origin, OriginError, holds_more};
use crate::model::{LedgerTime, Seq};

/// The statement bytes that an answer aims at.
const ANSWER_BYTES: usize = 8 << 20;
/// The statement bytes at which reading an answer stops early.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// What an entry costs in memory besides its statement, about.
const ENTRY_BYTES: usize = 64;
/// How long reading an answer may take before what came so far is handed on.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(20);
/// For how long a comparison of the clocks counts.
const CLOCK_AGE: Duration = Duration::from_secs(600);
const FIRST_LIMIT: usize = 1000;
const MAX_LIMIT: usize = 64 * 1024;

/// A ledger in MySQL. Connects on the first call, and again on the next call after a failure.
pub struct MySqlOrigin {
    session: Session,
    url: MySqlUrl,
    limit: usize,
    clock: Option<Clock>,
    /// Changes when the binlog stream breaks: then the server may be away without a word, or
    /// another one, and a connection from before is not waited for.
    broken: Arc<watch::Sender<u64>>,
    seen_broken: u64,
}

/// A comparison of the server's clock with ours.
struct Clock {
    /// Microseconds that the server's is ahead.
    ahead: i64,
    at: Instant,
    /// The connection that it was made on.
    connection: u64,
}

impl MySqlOrigin {
    /// An origin that is not connected yet.
    pub fn new(url: &MySqlUrl) -> Result<Self, OriginError> {
        Ok(MySqlOrigin {
            session: Session::new(url, Purpose::Read)?,
            url: url.clone(),
            limit: FIRST_LIMIT,
            clock: None,
            broken: Arc::default(),
            seen_broken: 0,
        })
    }

    fn read<T>(
        &mut self,
        work: impl AsyncFn(&mut Conn) -> Result<T, SessionError>,
    ) -> Result<T, OriginError> {
        let broken = *self.broken.borrow();
        if broken != self.seen_broken {
            self.seen_broken = broken;
            self.session.drop_connection();
        }
        // From here on: whatever breaks while it connects counts as well.
        let breaks = self.broken.subscribe();
        let result = self.session.connect().and_then(|()| {
            self.compare_clocks(&breaks)?;
            self.session
                .run_again(async |conn| unless_broken(&breaks, work(conn)).await)
        });
        result.map_err(|e| e.into_origin(self.session.origin().to_owned()))
    }

    /// Compares the clocks on a new connection, and now and then on an old one.
    fn compare_clocks(&mut self, breaks: &watch::Receiver<u64>) -> Result<(), SessionError> {
        let connection = self.session.connections();
        if self
            .clock
            .as_ref()
            .is_some_and(|c| c.connection == connection && c.at.elapsed() < CLOCK_AGE)
        {
            return Ok(());
        }
        let sql = "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))";
        let asked = (Instant::now(), SystemTime::now());
        // A clock that cannot be had is no reason not to read the ledger.
        let theirs = self
            .session
            .run(async |conn| unless_broken(breaks, answer(conn.query_first::<i64, _>(sql))).await);
        let theirs = match theirs {
            Ok(Some(theirs)) => theirs,
            Err(gone @ SessionError::Gone) => return Err(gone),
            Ok(None) | Err(_) => return Ok(()),
        };
        let ours = LedgerTime::from(asked.1 + asked.0.elapsed() / 2).micros();
        self.clock = Some(Clock {
            ahead: theirs.saturating_sub(ours),
            at: Instant::now(),
            connection,
        });
        Ok(())
    }

    fn failed(&self, reason: impl Into<String>) -> OriginError {
        OriginError::Failed {
            origin: self.session.origin().to_owned(),
            reason: reason.into(),
        }
    }
}

/// What one query for entries gave.
struct Answer {
    entries: Vec<Entry>,
    bytes: usize,
    /// The rest of the rows was left on the connection.
    unread: bool,
    /// The sequence of an entry that could not be read.
    broken: Option<String>,
}

impl Origin for MySqlOrigin {
    fn fetch(&mut self, from: Seq) -> Result<Vec<Entry>, OriginError> {
        // The server computes the time, for every type of column; an entry without one counts as
        // written at the epoch.
        let sql = format!(
            "SELECT seq, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', leader_ts), statement \
             FROM {LEDGER_TABLE} WHERE seq >= {from} ORDER BY seq LIMIT {}",
            self.limit
        );
        let limit = self.limit;
        let answer = self.read(async |conn| read_entries(conn, &sql, limit).await);
        if answer.is_err() {
            // Should it have taken too long, the next one takes less.
            self.limit = self.limit.min(FIRST_LIMIT);
        }
        let answer = answer?;
        if answer.unread {
            self.session.drop_connection();
        }
        self.limit = next_limit(self.limit, answer.entries.len(), answer.bytes);
        match answer.broken {
            // What stands before it can still be applied; the next fetch starts with it.
            Some(reason) if !holds_more(&answer.entries, from) => Err(self.failed(reason)),
            _ => Ok(answer.entries),
        }
    }

    fn last_seq(&mut self) -> Result<Option<Seq>, OriginError> {
        let sql = format!("SELECT MAX(seq) FROM {LEDGER_TABLE}");
        let last: Option<Option<i64>> =
            self.read(async |conn| answer(conn.query_first(&sql)).await)?;
        Ok(last.flatten().map(Seq::from_sql))
    }

    fn seqs_between(&mut self, first: Seq, last: Seq) -> Result<Vec<Seq>, OriginError> {
        let sql = format!(
            "SELECT seq FROM {LEDGER_TABLE} WHERE seq BETWEEN {first} AND {last} ORDER BY seq"
        );
        let seqs: Vec<i64> = self.read(async |conn| answer(conn.query(&sql)).await)?;
        Ok(seqs.into_iter().map(Seq::from_sql).collect())
    }

    fn describe(&self) -> String {
        self.session.origin().to_owned()
    }

    fn push(&self, heartbeat: Duration) -> Option<Box<dyn Push>> {
        Some(Box::new(BinlogPush::new(
            &self.url,
            heartbeat,
            Arc::clone(&self.broken),
        )))
    }

    fn clock_ahead(&self) -> Option<i64> {
        self.clock.as_ref().map(|clock| clock.ahead)
    }
}

/// Does `work`, unless the binlog stream breaks meanwhile: the server may have gone without a word.
async fn unless_broken<T>(
    breaks: &watch::Receiver<u64>,
    work: impl Future<Output = Result<T, SessionError>>,
) -> Result<T, SessionError> {
    let mut breaks = breaks.clone();
    tokio::select! {
        biased;
        result = work => result,
        _ = breaks.changed() => Err(SessionError::Gone),
    }
}

async fn read_entries(conn: &mut Conn, sql: &str, limit: usize) -> Result<Answer, SessionError> {
    let started = Instant::now();
    let mut rows = answer(conn.query_iter(sql)).await?;
    let mut found = Answer {
        entries: Vec::with_capacity(limit.min(FIRST_LIMIT)),
        bytes: 0,
        unread: false,
        broken: None,
    };
    while let Some(row) = answer(rows.next()).await? {
        match entry(row) {
            Ok(entry) => {
                found.bytes += entry.statement.len() + ENTRY_BYTES;
                found.entries.push(entry);
            }
            Err(reason) => {
                found.broken = Some(reason);
                found.unread = true;
                break;
            }
        }
        // The first may be the one at `from`.
        if (found.bytes >= MAX_ANSWER_BYTES && found.entries.len() >= 2)
            || (found.entries.len().is_multiple_of(256) && started.elapsed() > MAX_ANSWER_TIME)
        {
            found.unread = found.entries.len() < limit;
            break;
        }
    }
    Ok(found)
}

/// Decodes a row of the text protocol; the error says what is wrong without the statement.
fn entry(row: Row) -> Result<Entry, String> {
    let mut columns = row.unwrap_raw().into_iter();
    let mut next = || columns.next().flatten().unwrap_or(Value::NULL);
    let number = |value: Value| match value {
        Value::NULL => Ok(0),
        Value::Int(i) => Ok(i),
        Value::UInt(u) => i64::try_from(u).map_err(|_| ()),
        Value::Bytes(text) => std::str::from_utf8(&text)
            .ok()
            .and_then(|t| t.parse::<i64>().ok())
            .ok_or(()),
        _ => Err(()),
    };
    let seq = number(next()).map_err(|()| "a sequence of the ledger is not a whole number")?;
    let time = number(next()).map_err(|()| format!("the time of ledger entry {seq} is no time"))?;
    let statement = match next() {
        Value::Bytes(bytes) => String::from_utf8(bytes)
            .map_err(|_| format!("the statement of ledger entry {seq} is not UTF-8 text"))?,
        _ => return Err(format!("ledger entry {seq} has no statement")),
    };
    Ok(Entry {
        seq: Seq::from_sql(seq),
        time: LedgerTime::from_micros(time),
        statement,
    })
}

/// The limit for the next query, so that an answer is about [`ANSWER_BYTES`]; it grows slowly,
/// because entries of one kind come together. Never one, which may be all that was there before.
fn next_limit(limit: usize, entries: usize, bytes: usize) -> usize {
    match bytes.checked_div(entries) {
        None | Some(0) => limit,
        Some(average) => (ANSWER_BYTES / average).clamp(2, (limit * 4).min(MAX_LIMIT)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_follows_the_size_of_entries() {
        assert_eq!(next_limit(1000, 1000, 100_000), 4000);
        assert_eq!(next_limit(64_000, 64_000, 6_400_000), MAX_LIMIT);
        assert_eq!(next_limit(1000, 10, MAX_ANSWER_BYTES), 5);
        assert_eq!(next_limit(2, 1, 17 << 20), 2);
        assert_eq!(next_limit(2, 2, 200), 8);
        assert_eq!(next_limit(1000, 0, 0), 1000);
    }
}
