//! The times of ledger entries, and their text form in SQLite: `YYYY-MM-DD HH:MM:SS.ffffff+00:00`,
//! always UTC. Takes times and never reads a clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MICROS_PER_DAY: i64 = 86_400_000_000;

/// The time of a ledger entry: microseconds since the Unix epoch, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LedgerTime(i64);

impl LedgerTime {
    /// A time from microseconds since the Unix epoch.
    pub const fn from_micros(micros: i64) -> Self {
        LedgerTime(micros)
    }

    /// Microseconds since the Unix epoch.
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// Reads `YYYY-MM-DD HH:MM:SS[.f…]`, UTC, as SQLite's own functions and ctlstore write it: `T`
    /// for the blank, and `Z` or `+00:00` at the end, are fine too. `None` for everything else.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let number = |range: std::ops::Range<usize>| {
            text.get(range)?.iter().try_fold(0_i64, |n, digit| {
                digit
                    .is_ascii_digit()
                    .then(|| n * 10 + i64::from(digit - b'0'))
            })
        };
        let separator = |at: usize, allowed: &[u8]| allowed.contains(text.get(at)?).then_some(());
        let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
        let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
        separator(4, b"-")?;
        separator(7, b"-")?;
        separator(10, b" T")?;
        separator(13, b":")?;
        separator(16, b":")?;
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        if hour > 23 || minute > 59 || second > 60 {
            return None;
        }
        let rest = text.get(19..)?;
        let zones = [&b"Z"[..], b"+00:00", b" +0000 UTC", b"+0000 UTC"];
        let rest = zones
            .iter()
            .find_map(|zone| rest.strip_suffix(*zone))
            .unwrap_or(rest);
        let fraction = match rest.split_first() {
            None => 0,
            Some((b'.', digits)) if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => {
                (0..6).fold(0, |n, i| {
                    n * 10 + i64::from(digits.get(i).map_or(0, |d| d - b'0'))
                })
            }
            Some(_) => return None,
        };
        // Days since 1970-01-01 in the Gregorian calendar, with years that begin in March.
        let shifted = if month > 2 { year } else { year - 1 };
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let days =
            365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year - 719_468;
        let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
        Some(LedgerTime(seconds * 1_000_000 + fraction))
    }

    /// The time as ctlstore writes it into `_ldb_last_update`.
    pub fn to_timestamp(self) -> String {
        let days = self.0.div_euclid(MICROS_PER_DAY);
        let rest = self.0.rem_euclid(MICROS_PER_DAY);
        let (year, month, day) = civil_from_days(days);
        let (seconds, micros) = (rest / 1_000_000, rest % 1_000_000);
        format!(
            "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}.{micros:06}+00:00",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
        )
    }
}

impl From<LedgerTime> for SystemTime {
    fn from(time: LedgerTime) -> SystemTime {
        let distance = Duration::from_micros(time.0.unsigned_abs());
        let moved = if time.0 >= 0 {
            UNIX_EPOCH.checked_add(distance)
        } else {
            UNIX_EPOCH.checked_sub(distance)
        };
        moved.unwrap_or(UNIX_EPOCH)
    }
}

impl From<SystemTime> for LedgerTime {
    fn from(time: SystemTime) -> LedgerTime {
        let micros = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |m| -m),
        };
        LedgerTime(micros)
    }
}

/// The proleptic Gregorian date of a day counted from 1970-01-01 (Hinnant's algorithm).
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn micros(text: &[u8]) -> Option<i64> {
        LedgerTime::parse(text).map(LedgerTime::micros)
    }

    #[test]
    fn times_are_read_as_sqlite_writes_them() {
        for (text, expected) in [
            ("1970-01-01 00:00:00", Some(0)),
            ("2024-02-29 12:34:56.789", Some(1_709_210_096_789_000)),
            ("2024-02-29T12:34:56.7890123Z", Some(1_709_210_096_789_012)),
            ("1969-12-31 23:59:59", Some(-1_000_000)),
            ("2000-03-01 00:00:00.000001", Some(951_868_800_000_001)),
            ("2024-02-29", None),
            ("2024-13-01 00:00:00", None),
            ("2024-02-29 12:34:56.", None),
            ("now, or thereabouts", None),
        ] {
            assert_eq!(micros(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn the_text_is_ctlstores() {
        let time = LedgerTime::from_micros(1_709_210_096_000_123);
        assert_eq!(time.to_timestamp(), "2024-02-29 12:34:56.000123+00:00");
        for text in [
            "2024-02-29 12:34:56.000123+00:00",
            "2024-02-29T12:34:56.000123Z",
            "2024-02-29 12:34:56.000123 +0000 UTC",
            "2024-02-29 12:34:56.000123",
        ] {
            assert_eq!(LedgerTime::parse(text.as_bytes()), Some(time), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_time_reads_back(micros in -62_135_596_800_000_000i64..253_402_300_799_000_000) {
            let time = LedgerTime::from_micros(micros);
            prop_assert_eq!(LedgerTime::parse(time.to_timestamp().as_bytes()), Some(time));
        }
    }
}
