//! Points in time as files and users see them: RFC 3339 in UTC with nanoseconds.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const DAY: u64 = 86_400;

/// `2026-11-21T05:51:40.000000001Z`
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub SystemTime);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a time of RFC 3339, as 2026-11-21T05:51:40Z or 2026-11-21T05:51:40.5+01:00")]
pub struct BadTimestamp;

impl Timestamp {
    pub fn now() -> Self {
        Self(SystemTime::now())
    }

    /// How long ago it is; zero if it is to come.
    pub fn age(self) -> Duration {
        self.0.elapsed().unwrap_or_default()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (year, month, day) = civil(since.as_secs() / DAY);
        let second = since.as_secs() % DAY;
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let nanos = since.subsec_nanos();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
    }
}

impl FromStr for Timestamp {
    type Err = BadTimestamp;

    /// Reads RFC 3339: a fraction of at most nine digits, `Z` or an offset.
    fn from_str(text: &str) -> Result<Self, BadTimestamp> {
        let (local, offset) = zone(text).ok_or(BadTimestamp)?;
        let (seconds, fraction) = local.split_once('.').unwrap_or((local, "0"));
        if fraction.is_empty() || fraction.len() > 9 {
            return Err(BadTimestamp);
        }
        let local = Self::read(&format!("{seconds}.{fraction:0<9}Z"))?.0;
        let offset_by = Duration::from_secs(offset.unsigned_abs());
        let utc = if offset < 0 { local + offset_by } else { local - offset_by };
        if utc < UNIX_EPOCH { Err(BadTimestamp) } else { Ok(Self(utc)) }
    }
}

/// The text before the zone, and the zone's offset in seconds, east being positive.
fn zone(text: &str) -> Option<(&str, i64)> {
    if let Some(local) = text.strip_suffix('Z') {
        return Some((local, 0));
    }
    let (local, zone) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let [sign, h1, h2, b':', m1, m2] = *zone.as_bytes() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(10).map(i64::from);
    let (hours, minutes) = (digit(h1)? * 10 + digit(h2)?, digit(m1)? * 10 + digit(m2)?);
    let offset = hours * 3600 + minutes * 60;
    match sign {
        b'+' if hours < 24 && minutes < 60 => Some((local, offset)),
        b'-' if hours < 24 && minutes < 60 => Some((local, -offset)),
        _ => None,
    }
}

impl Timestamp {
    /// Reads what [`Display`](fmt::Display) writes, and nothing else.
    fn read(text: &str) -> Result<Self, BadTimestamp> {
        let number = |range: std::ops::Range<usize>| -> Result<u64, BadTimestamp> {
            let digits = text.get(range).ok_or(BadTimestamp)?;
            digits.parse().map_err(|_| BadTimestamp)
        };
        let days = days(number(0..4)?, number(5..7)?, number(8..10)?).ok_or(BadTimestamp)?;
        let seconds = number(11..13)? * 3600 + number(14..16)? * 60 + number(17..19)?;
        let nanos = u32::try_from(number(20..29)?).map_err(|_| BadTimestamp)?;
        let time = Self(UNIX_EPOCH + Duration::new(days * DAY + seconds, nanos));
        if time.to_string() == text { Ok(time) } else { Err(BadTimestamp) }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Days since 1970-01-01 as year, month and day. Years are taken to begin in March, so that the leap day is
/// their last; 400 of them have 146,097 days.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

/// The other way round.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    let year = year.checked_sub(u64::from(month <= 2))?;
    let (era, of_era) = (year / 400, year % 400);
    let from_march = (month + 9) % 12;
    let of_year = (153 * from_march + 2) / 5 + day.checked_sub(1)?;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    days.checked_sub(719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_and_read_back() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (951_868_800, 0, "2000-03-01T00:00:00.000000000Z"),
            (1_795_240_300, 999_999_999, "2026-11-21T05:51:40.999999999Z"),
            (4_107_542_399, 0, "2100-02-28T23:59:59.000000000Z"),
        ] {
            let time = Timestamp(UNIX_EPOCH + Duration::new(seconds, nanos));
            assert_eq!(time.to_string(), text);
            assert_eq!(text.parse(), Ok(time));
        }
    }

    #[test]
    fn fractions_and_zones_are_those_of_rfc_3339() {
        for (text, same) in [
            ("2026-11-21T05:51:40Z", "2026-11-21T05:51:40.000000000Z"),
            ("2026-11-21T05:51:40.25Z", "2026-11-21T05:51:40.250000000Z"),
            ("2026-11-21T05:51:40+01:30", "2026-11-21T04:21:40.000000000Z"),
            ("2026-12-31T23:51:40.5-00:10", "2027-01-01T00:01:40.500000000Z"),
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), same);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "Z",
            "2026-11-21",
            "2026-11-21T05:51:40",
            "2026-13-21T05:51:40.000000000Z",
            "2026-02-30T05:51:40Z",
            "2026-11-21T05:51:60Z",
            "2026-11-21T05:51:40.Z",
            "2026-11-21T05:51:40.0000000000Z",
            "2026-11-21T05:51:40+1:30",
            "2026-11-21T05:51:40+24:00",
            "2026-11-21T05:51:40++1:30",
            "1970-01-01T00:00:00+01:00",
            "ä026-11-21T05:51:40.0Z",
            "2026-11-21T05:51:40ä01:00",
        ] {
            assert_eq!(text.parse::<Timestamp>(), Err(BadTimestamp), "{text}");
        }
    }
}
