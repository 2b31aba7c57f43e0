//! How what a commit changed reaches the thread that writes it: the reflector waits for room, but
//! not for long. What it does not hand over is in the LDB, and the thread is told to look there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// So many jobs wait at most.
const ROOM: usize = 16;
/// How long the one who hands over waits for room, all in all until the queue is empty again.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the thread receives.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item<J> {
    /// A job.
    Job(J),
    /// Jobs behind the last one were left out.
    LeftOut,
}

/// The end of those who hand over.
pub(super) struct Giver<J> {
    items: Sender<Item<J>>,
    done: Receiver<()>,
    room: usize,
    patience: Duration,
    /// Whether something was left out that the thread does not know of yet.
    left_out: Arc<AtomicBool>,
}

/// The end of the thread.
pub(super) struct Taker<J> {
    items: Receiver<Item<J>>,
    done: Sender<()>,
    left_out: Arc<AtomicBool>,
    /// Whether the last item took some of the room.
    busy: bool,
}

/// Makes a queue.
pub(super) fn queue<J>() -> (Giver<J>, Taker<J>) {
    let (give, items) = mpsc::channel();
    let (tell, done) = mpsc::channel();
    let left_out = Arc::<AtomicBool>::default();
    let giver = Giver {
        items: give,
        done,
        room: ROOM,
        patience: PATIENCE,
        left_out: Arc::clone(&left_out),
    };
    let taker = Taker {
        items,
        done: tell,
        left_out,
        busy: false,
    };
    (giver, taker)
}

impl<J> Giver<J> {
    /// Hands a job over, or leaves it out if there is no room for it in time. Returns whether the
    /// thread is still there.
    pub(super) fn give(&mut self, job: J) -> bool {
        while self.done.try_recv().is_ok() {
            self.room += 1;
        }
        if self.room == ROOM {
            self.patience = PATIENCE;
        }
        if self.room == 0 {
            let began = Instant::now();
            let waited = self.done.recv_timeout(self.patience);
            self.patience = self.patience.saturating_sub(began.elapsed());
            match waited {
                Ok(()) => self.room += 1,
                Err(RecvTimeoutError::Timeout) => return self.leave_out(),
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        self.room -= 1;
        self.items.send(Item::Job(job)).is_ok()
    }

    /// Leaves a job out. Returns whether the thread is still there.
    pub(super) fn leave_out(&self) -> bool {
        self.left_out.swap(true, Ordering::AcqRel) || self.items.send(Item::LeftOut).is_ok()
    }
}

impl<J> Taker<J> {
    /// The next item, for which to wait no longer than `limit` if there is one. The one before is
    /// done with.
    pub(super) fn take(&mut self, limit: Option<Duration>) -> Result<Item<J>, RecvTimeoutError> {
        if std::mem::take(&mut self.busy) {
            // Nobody may be there any more to hear it.
            let _ = self.done.send(());
        }
        let item = match limit {
            Some(limit) => self.items.recv_timeout(limit)?,
            None => (self.items.recv()).map_err(|_| RecvTimeoutError::Disconnected)?,
        };
        match &item {
            Item::Job(_) => self.busy = true,
            // What is left out from now on is told again.
            Item::LeftOut => self.left_out.store(false, Ordering::Release),
        }
        Ok(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_hands_over_is_not_held_up_for_long_and_what_is_left_out_is_told() {
        let (mut giver, mut taker) = queue();
        for job in 0..ROOM {
            assert!(giver.give(job));
        }
        let began = Instant::now();
        assert!(giver.give(ROOM));
        assert!(began.elapsed() >= PATIENCE);
        let began = Instant::now();
        for job in 0..1_000 {
            assert!(giver.give(job));
        }
        assert!(began.elapsed() < PATIENCE, "waited once only");
        for job in 0..ROOM {
            assert_eq!(taker.take(None), Ok(Item::Job(job)));
        }
        assert_eq!(taker.take(None), Ok(Item::LeftOut));
        let nothing = taker.take(Some(Duration::ZERO));
        assert_eq!(nothing, Err(RecvTimeoutError::Timeout));
        // And again.
        assert!(giver.leave_out() && giver.leave_out());
        assert_eq!(taker.take(None), Ok(Item::LeftOut));
        assert!(giver.give(7));
        assert_eq!(taker.take(None), Ok(Item::Job(7)));
        drop(taker);
        assert!(!giver.give(8) && !giver.leave_out());
    }

    #[test]
    fn room_that_is_made_in_time_is_used() {
        let (mut giver, mut taker) = queue();
        let thread = std::thread::spawn(move || {
            let mut taken = Vec::new();
            while let Ok(item) = taker.take(None) {
                taken.push(item);
            }
            taken
        });
        // Not so many that a busy machine uses the patience up.
        let jobs = 0..3 * ROOM;
        assert!(jobs.clone().all(|job| giver.give(job)));
        drop(giver);
        assert_eq!(
            thread.join().unwrap(),
            jobs.map(Item::Job).collect::<Vec<_>>()
        );
    }
}
