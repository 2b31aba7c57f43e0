//! When to look at the origin: at once for what push announces, again soon while that is not there
//! yet, and at an interval underneath. Pure; the time is passed in.

use std::time::{Duration, Instant};

use super::stop::Wakes;
use crate::ledger::push::Settling;
use crate::model::Seq;
use crate::pace::jitter;

/// The interval while push tells of changes: a safety net.
const SAFETY_NET: Duration = Duration::from_secs(30);
/// The first pause between looks for something that was announced. Each is a quarter longer than
/// the one before, so that what takes a while to show is found a quarter later at most.
const FIRST_PAUSE: Duration = Duration::from_micros(500);
/// The shortest pause once something was found: most likely that was it.
const AFTER_FIND: Duration = Duration::from_millis(5);
/// The longest pause between looks for a sequence that was announced, unless the interval is shorter.
const LAST_PAUSE: Duration = Duration::from_millis(250);
/// For how long an announced sequence is looked for.
const PATIENCE: Duration = Duration::from_secs(30);
/// For how long looks that are cheap are taken at short pauses.
const AT_FIRST: Duration = Duration::from_secs(1);
/// How much later than the poll that found an entry push may still tell of it.
const GRACE: Duration = Duration::from_secs(2);

/// Decides how long to wait.
#[derive(Debug)]
pub(super) struct Pace {
    /// The interval without push.
    interval: Duration,
    /// A sequence that was announced and is not found yet.
    known: Option<(Seq, Search)>,
    /// Something without a sequence that may not be found yet.
    unknown: Option<Search>,
    /// How such a thing is looked for.
    settling: Settling,
    /// When the last look at the interval was done, and how much jitter the next one has.
    polled: Option<(Instant, u64)>,
    due: bool,
    /// When a thorough look was last done, and whether something was announced since.
    checked: Option<Instant>,
    stirred: bool,
    /// An entry that was found before anybody told of it.
    untold: Option<(Seq, Instant)>,
    distrust: bool,
}

/// Looks for something, with pauses that grow.
#[derive(Debug)]
struct Search {
    since: Instant,
    pause: Duration,
    /// Whether something was found since, which most likely was it.
    found: bool,
}

impl Pace {
    /// A pace of one look in `interval` where nothing pushes.
    pub(super) fn new(interval: Duration) -> Self {
        Pace {
            interval,
            known: None,
            unknown: None,
            settling: Settling::default(),
            polled: None,
            due: true,
            checked: None,
            stirred: false,
            untold: None,
            distrust: false,
        }
    }

    /// Looks like this for what is announced without a sequence.
    pub(super) fn settle(&mut self, settling: Settling) {
        self.settling = settling;
    }

    /// Notes what was announced. To be called before a look.
    pub(super) fn note(&mut self, wakes: Wakes, now: Instant) {
        let search = || Search {
            since: now,
            pause: FIRST_PAUSE,
            found: false,
        };
        if let Some(seq) = wakes.known
            && self.known.as_ref().is_none_or(|(known, _)| *known < seq)
        {
            self.known = Some((seq, search()));
        }
        if wakes.unknown {
            self.unknown = Some(search());
        }
        self.stirred |= wakes.any();
        if let Some((seq, _)) = self.untold
            && (wakes.unknown || wakes.known >= Some(seq))
        {
            self.untold = None;
        }
    }

    /// Whether the next look is a thorough one: those at the interval (`pushed` if that is the long
    /// one), and one after something was announced, but no more than one in the short interval.
    pub(super) fn is_thorough(&mut self, pushed: bool, now: Instant) -> bool {
        self.due |= self.until_poll(pushed, now).is_zero();
        self.due || (self.stirred && self.until_check(now).is_zero())
    }

    /// Notes that a look found entries up to `last`.
    pub(super) fn found(&mut self, last: Seq, pushed: bool, now: Instant) {
        if let Some(search) = &mut self.unknown {
            search.pause = search.pause.max(AFTER_FIND);
            search.found = true;
        }
        let announced = self.known.is_some() || self.unknown.is_some();
        if pushed && self.due && self.polled.is_some() && !announced {
            self.untold = Some((last, now));
        }
    }

    /// How long to wait after a look that found nothing, when everything up to `seen` was fetched.
    /// `random` spreads the interval.
    pub(super) fn rest(&mut self, seen: Seq, pushed: bool, now: Instant, random: u64) -> Duration {
        let pause = self.pause(seen, now);
        if self.is_thorough(pushed, now) {
            self.checked = Some(now);
            // What was announced may not be there yet, and not be seen but by a thorough look.
            self.stirred = pause.is_some();
        }
        if std::mem::take(&mut self.due) {
            self.polled = Some((now, random));
        }
        let mut rest = self.until_poll(pushed, now);
        if self.stirred {
            rest = rest.min(self.until_check(now));
        }
        if let Some((_, found)) = self.untold {
            let grace = GRACE.saturating_sub(now.saturating_duration_since(found));
            if grace.is_zero() {
                self.untold = None;
                self.distrust = true;
            }
            rest = rest.min(grace);
        }
        pause.map_or(rest, |pause| rest.min(pause))
    }

    /// Whether push failed to tell of a change: from then on it is not relied on.
    pub(super) fn distrusts(&self) -> bool {
        self.distrust
    }

    /// Push has begun anew, and is trusted again.
    pub(super) fn trust(&mut self) {
        self.untold = None;
        self.distrust = false;
    }

    fn until_check(&self, now: Instant) -> Duration {
        self.checked.map_or(Duration::ZERO, |at| {
            self.interval
                .saturating_sub(now.saturating_duration_since(at))
        })
    }

    fn until_poll(&self, pushed: bool, now: Instant) -> Duration {
        let Some((at, random)) = self.polled else {
            return Duration::ZERO;
        };
        let interval = if pushed && !self.distrust {
            self.interval.max(SAFETY_NET)
        } else {
            self.interval
        };
        jitter(interval, random).saturating_sub(now.saturating_duration_since(at))
    }

    /// The pause before the next look for what was announced; `None` once there is nothing left to
    /// look for. A sequence is looked for until it is there. For what has none, looks get rarer up
    /// to the interval, and go on whatever is found: that may be something else.
    fn pause(&mut self, seen: Seq, now: Instant) -> Option<Duration> {
        self.known
            .take_if(|(seq, search)| *seq <= seen || search.age(now) > PATIENCE);
        self.unknown
            .take_if(|search| search.age(now) > self.settling.within);
        let longest = self.interval.min(LAST_PAUSE);
        let known = self.known.as_mut().map(|(_, search)| search.next(longest));
        let unknown = self.unknown.as_mut().map(|search| {
            let at_first = search.age(now) < AT_FIRST && !search.found;
            let longest = self.settling.pause.filter(|_| at_first);
            search.next(self.interval.min(longest.unwrap_or(self.interval)))
        });
        known.into_iter().chain(unknown).min()
    }
}

impl Search {
    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// The pause before the next look, of at most `longest`.
    fn next(&mut self, longest: Duration) -> Duration {
        let pause = self.pause.min(longest);
        self.pause = pause.saturating_mul(5) / 4;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    /// Jitter of nothing.
    const EVEN: u64 = 250;

    fn known(seq: u64) -> Wakes {
        Wakes {
            known: Some(Seq::new(seq)),
            unknown: false,
        }
    }

    const UNKNOWN: Wakes = Wakes {
        known: None,
        unknown: true,
    };

    fn millis(pace: &mut Pace, seen: u64, now: Instant) -> u128 {
        pace.rest(Seq::new(seen), true, now, EVEN).as_millis()
    }

    #[test]
    fn it_polls_at_the_interval_and_seldom_while_push_is_on() {
        let mut pace = Pace::new(SECOND);
        let start = Instant::now();
        assert!(pace.is_thorough(false, start));
        assert_eq!(pace.rest(Seq::ZERO, false, start, EVEN), SECOND);
        assert!(!pace.is_thorough(false, start));
        // Going on from a look in between does not put the next one off.
        let later = start + SECOND / 4;
        assert_eq!(pace.rest(Seq::ZERO, false, later, EVEN), SECOND * 3 / 4);
        assert_eq!(pace.rest(Seq::ZERO, true, later, EVEN), SECOND * 119 / 4);
        assert!(pace.is_thorough(false, start + SECOND));
    }

    #[test]
    fn what_is_announced_calls_for_one_thorough_look() {
        let mut pace = Pace::new(SECOND);
        let start = Instant::now();
        assert!(pace.is_thorough(true, start));
        assert_eq!(millis(&mut pace, 5, start), 30_000);
        // Too soon after the last: put off, not forgotten.
        let soon = start + SECOND / 4;
        pace.note(known(5), soon);
        assert!(!pace.is_thorough(true, soon));
        assert_eq!(millis(&mut pace, 5, soon), 750);
        let later = start + SECOND;
        assert!(pace.is_thorough(true, later));
        assert_eq!(millis(&mut pace, 5, later), 29_000);
        assert!(!pace.is_thorough(true, later + SECOND));
    }

    #[test]
    fn what_is_announced_is_looked_for_until_it_is_there() {
        let mut pace = Pace::new(SECOND);
        let now = Instant::now();
        assert_eq!(millis(&mut pace, 5, now - SECOND), 30_000);
        pace.note(known(7), now);
        let pauses: Vec<_> = (0..31).map(|_| millis(&mut pace, 6, now)).collect();
        assert_eq!(pauses[..10], [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]);
        assert_eq!(pauses[27..], [206, 250, 250, 250]);
        assert_eq!(millis(&mut pace, 7, now), 1_000, "one more thorough look");
        // One that never comes is given up.
        pace.note(known(9), now);
        assert_eq!(millis(&mut pace, 7, now), 0);
        let late = now + PATIENCE + SECOND;
        assert!(pace.is_thorough(true, late));
        assert_eq!(millis(&mut pace, 7, late), 30_000);
    }

    #[test]
    fn for_what_has_no_sequence_looks_get_rarer_up_to_the_interval() {
        let mut pace = Pace::new(SECOND / 100);
        pace.settle(Settling {
            within: SECOND,
            pause: None,
        });
        let now = Instant::now();
        millis(&mut pace, 6, now);
        pace.note(UNKNOWN, now);
        let pauses: Vec<_> = (0..15).map(|_| millis(&mut pace, 6, now)).collect();
        assert_eq!(pauses[11..], [5, 7, 9, 10]);
        // However short the interval is, a disk is waited for.
        assert_eq!(millis(&mut pace, 6, now + SECOND), 10);
        let late = now + SECOND * 1_001 / 1_000;
        assert_eq!(millis(&mut pace, 6, late), 9, "one more thorough look");
        let late = late + SECOND / 100;
        assert!(pace.is_thorough(true, late));
        assert!(millis(&mut pace, 6, late) > 19_000);
        pace.note(UNKNOWN, now);
        pace.note(known(3), now);
        assert_eq!(millis(&mut pace, 6, now), 0, "the unknown one is left");
        pace.found(Seq::new(6), true, now);
        assert_eq!(
            millis(&mut pace, 6, now),
            5,
            "what was found may be something else"
        );
    }

    #[test]
    fn where_looks_are_cheap_they_are_frequent_at_first() {
        let mut pace = Pace::new(SECOND);
        pace.settle(Settling {
            within: SECOND * 10,
            pause: Some(SECOND / 250),
        });
        let now = Instant::now();
        millis(&mut pace, 6, now);
        pace.note(UNKNOWN, now);
        let pauses: Vec<_> = (0..30).map(|_| millis(&mut pace, 6, now)).collect();
        assert_eq!(pauses[9..], [[3, 4].as_slice(), &[4; 19]].concat());
        let pauses: Vec<_> = (0..30)
            .map(|_| millis(&mut pace, 6, now + SECOND))
            .collect();
        assert_eq!(pauses[..5], [5, 6, 7, 9, 12]);
        assert!(pauses[29] > 900, "up to the interval");
        // What was found most likely was it.
        pace.note(UNKNOWN, now);
        pace.found(Seq::new(7), true, now);
        let pauses: Vec<_> = (0..5).map(|_| millis(&mut pace, 7, now)).collect();
        assert_eq!(pauses, [5, 6, 7, 9, 12]);
    }

    #[test]
    fn a_push_that_does_not_tell_is_not_relied_on() {
        let mut pace = Pace::new(SECOND);
        let start = Instant::now();
        millis(&mut pace, 5, start);
        let poll = start + SAFETY_NET;
        // Told a moment later: well.
        assert!(pace.is_thorough(true, poll));
        pace.found(Seq::new(6), true, poll);
        assert_eq!(millis(&mut pace, 6, poll), 2_000);
        pace.note(known(6), poll);
        assert_eq!(millis(&mut pace, 6, poll), 1_000, "one more thorough look");
        // Never told.
        let poll = poll + SAFETY_NET;
        assert!(pace.is_thorough(true, poll));
        pace.found(Seq::new(7), true, poll);
        assert_eq!(millis(&mut pace, 7, poll), 2_000);
        assert!(!pace.distrusts());
        millis(&mut pace, 7, poll + GRACE);
        assert!(pace.distrusts());
        // From then on at the short interval, of which the next look is due at once.
        assert!(pace.is_thorough(true, poll + GRACE));
        assert_eq!(millis(&mut pace, 7, poll + GRACE), 1_000);
        pace.trust();
        assert_eq!(millis(&mut pace, 7, poll + GRACE), 30_000);
    }
}
