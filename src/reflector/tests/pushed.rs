//! The reflector with a push that a test speaks for, while nothing polls.

use super::*;
use crate::ledger::push::{Listener, PushState, Settling};

/// A push that says what a test has it say.
struct Told(std::sync::mpsc::Receiver<Option<Seq>>);

impl Push for Told {
    fn settling(&self) -> Settling {
        Settling {
            within: Duration::from_secs(60),
            pause: None,
        }
    }

    fn blind_spot(&self) -> &'static str {
        "it says what a test has it say"
    }

    fn run(&mut self, listener: &dyn Listener) {
        listener.state(PushState::On, None);
        while let Ok(seq) = self.0.recv() {
            listener.changed(seq);
        }
    }
}

/// A reflector that nothing but push moves, what tells it, and its end.
fn pushed(
    ledger: &Ledger,
    fixture: &mut Fixture,
) -> (std::sync::mpsc::Sender<Option<Seq>>, impl FnOnce() + use<>) {
    let (tell, told) = std::sync::mpsc::channel();
    ledger.state(|s| s.push = Some(Box::new(Told(told))));
    fixture.settings.poll_interval = Duration::from_secs(3600);
    fixture.restart();
    let stop = StopHandle::new();
    let mut reflector = fixture.reflector.take().unwrap();
    let handle = stop.clone();
    let thread = std::thread::spawn(move || reflector.run(&handle));
    let board = Arc::clone(&fixture.board);
    wait_until("push is on", || board.push_state() == PushState::On);
    // The look that a new stream calls for, and those that follow it, are over.
    let mut last = (0, Instant::now());
    wait_until("it is quiet", || {
        let now = ledger.state(|s| s.fetches);
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(600)
    });
    let end = move || {
        stop.stop();
        thread.join().unwrap();
    };
    (tell, end)
}

#[test]
fn what_is_told_before_it_shows_is_looked_for_until_it_does() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    let mut fixture = Fixture::new(ledger.clone());
    let (tell, end) = pushed(&ledger, &mut fixture);
    let mut next = 3;
    for told in [true, false] {
        for looks in [1, 5, 15] {
            let before = ledger.state(|s| s.fetches);
            tell.send(told.then(|| Seq::new(next))).unwrap();
            wait_until("it looks in vain", || {
                ledger.state(|s| s.fetches) >= before + looks
            });
            ledger.append(&[BUMP]);
            let board = Arc::clone(&fixture.board);
            wait_until("it is found", || board.progress().applied == Seq::new(next));
            next += 1;
        }
    }
    assert_eq!(fixture.values(), "1=6");
    end();
}

#[test]
fn what_is_told_while_it_fetches_or_applies_is_not_lost() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    let mut fixture = Fixture::new(ledger.clone());
    let (tell, end) = pushed(&ledger, &mut fixture);
    for next in (3..43).step_by(2) {
        // In the middle of the look that finds the first, behind what that look will see.
        let again = tell.clone();
        let mut armed = true;
        ledger.state(|s| {
            s.at_fetch = Some(Box::new(move |_| {
                if std::mem::take(&mut armed) {
                    again.send(Some(Seq::new(next + 1))).unwrap();
                }
            }));
        });
        ledger.append(&[BUMP]);
        tell.send(Some(Seq::new(next))).unwrap();
        let board = Arc::clone(&fixture.board);
        wait_until("the first", || board.progress().applied == Seq::new(next));
        ledger.append(&[BUMP]);
        wait_until("the second", || {
            board.progress().applied == Seq::new(next + 1)
        });
    }
    end();
}

#[test]
fn entries_behind_one_that_cannot_be_applied_make_no_haste() {
    let ledger = Ledger::with(&[LIMITS, &set(1, 0)]);
    let mut fixture = Fixture::new(ledger.clone());
    let (tell, end) = pushed(&ledger, &mut fixture);
    ledger.append(&["REPLACE INTO app___missing VALUES (1)"]);
    tell.send(Some(Seq::new(3))).unwrap();
    let board = Arc::clone(&fixture.board);
    wait_until("the problem", || board.progress().problem.is_some());
    // The first pauses after a failure are short whatever is told.
    wait_until("the pauses get longer", || {
        let before = ledger.state(|s| s.fetches);
        for seq in 4..104 {
            ledger.append(&[BUMP]);
            tell.send(Some(Seq::new(seq))).unwrap();
        }
        let over = Instant::now() + Duration::from_millis(300);
        wait_until("a while has passed", || Instant::now() >= over);
        ledger.state(|s| s.fetches) <= before + 1
    });
    // A change that is no new entry may be what helps.
    ledger.put(3, BUMP);
    tell.send(None).unwrap();
    wait_until("it goes on", || board.progress().problem.is_none());
    end();
}
