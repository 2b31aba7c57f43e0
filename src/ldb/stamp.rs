//! The text form of times in `_ldb_last_update`: `YYYY-MM-DD HH:MM:SS.ffffff+00:00`, always UTC.
//! Pure.

use crate::model::LedgerTime;

const MICROS_PER_DAY: i64 = 86_400_000_000;

/// A time as ctlstore writes it.
pub fn format_timestamp(time: LedgerTime) -> String {
    let days = time.micros().div_euclid(MICROS_PER_DAY);
    let rest = time.micros().rem_euclid(MICROS_PER_DAY);
    let (year, month, day) = civil_from_days(days);
    let (seconds, micros) = (rest / 1_000_000, rest % 1_000_000);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}.{micros:06}+00:00",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
    )
}

/// Reads what [`format_timestamp`] or ctlstore wrote (`T` for the blank, a shorter or no fraction,
/// and `Z` or no zone are accepted). `None` for everything else.
pub fn parse_timestamp(text: &str) -> Option<LedgerTime> {
    let text = text.trim();
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse().ok())?
    };
    let punctuated = [(4, "-"), (7, "-"), (13, ":"), (16, ":")]
        .into_iter()
        .all(|(i, c)| text.get(i..i + 1) == Some(c));
    if !punctuated || !matches!(text.get(10..11), Some(" " | "T")) {
        return None;
    }
    let days = days_from_civil(number(0..4)?, number(5..7)?, number(8..10)?)?;
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut micros = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let padded = format!("{:0<6}", fraction.get(..digits)?);
        micros = padded.get(..6)?.parse().ok()?;
        rest = fraction.get(digits..)?;
    }
    if !matches!(rest.trim(), "" | "Z" | "+00:00" | "+0000 UTC") {
        return None;
    }
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    Some(LedgerTime::from_micros(seconds * 1_000_000 + micros))
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

fn days_from_civil(year: i64, month: i64, day: i64) -> Option<i64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Some(era * 146_097 + day_of_era - 719_468)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_text_is_ctlstores() {
        let time = LedgerTime::from_micros(1_709_210_096_000_123);
        assert_eq!(format_timestamp(time), "2024-02-29 12:34:56.000123+00:00");
        for text in [
            "2024-02-29 12:34:56.000123+00:00",
            "2024-02-29T12:34:56.000123Z",
            "2024-02-29 12:34:56.000123",
        ] {
            assert_eq!(parse_timestamp(text), Some(time), "{text}");
        }
        assert_eq!(
            parse_timestamp("2024-02-29 12:34:56").map(LedgerTime::micros),
            Some(1_709_210_096_000_000)
        );
        for bad in ["", "yesterday", "2024-02-29", "2024-13-01 00:00:00", "été"] {
            assert_eq!(parse_timestamp(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_time_reads_back(micros in -62_135_596_800_000_000i64..253_402_300_799_000_000) {
            let time = LedgerTime::from_micros(micros);
            prop_assert_eq!(parse_timestamp(&format_timestamp(time)), Some(time));
        }
    }
}
