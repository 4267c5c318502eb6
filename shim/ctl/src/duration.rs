//! Durations as people write and read them.

use std::time::Duration;

/// The longest grace that the shim takes.
pub const MAX_GRACE: Duration = Duration::from_secs(24 * 3600);

/// Reads `90s`, `1m30s`, `500ms`: whole numbers with a unit each, the largest first
/// (`h`, `m`, `s`, `ms`); a bare number is seconds.
///
/// # Errors
/// A text for people, where `text` is not of that form or does not fit.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: write it like 30s, 1m30s, 500ms or 2h");
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map(Duration::from_secs).map_err(|_| wrong());
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut last_unit = u64::MAX;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, after) = after.split_at(letters);
        let unit_ms = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return Err(wrong()),
        };
        if unit_ms >= last_unit {
            return Err(wrong());
        }
        last_unit = unit_ms;
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let part = number.checked_mul(unit_ms).ok_or_else(wrong)?;
        total = total
            .checked_add(Duration::from_millis(part))
            .ok_or_else(wrong)?;
        rest = after;
    }
    if last_unit == u64::MAX {
        return Err(wrong());
    }
    Ok(total)
}

/// [`parse`], at most [`MAX_GRACE`].
///
/// # Errors
/// As [`parse`], and where it is longer.
pub fn parse_grace(text: &str) -> Result<Duration, String> {
    let grace = parse(text)?;
    if grace > MAX_GRACE {
        return Err(format!("{text:?} is too long: a grace is at most 24h"));
    }
    Ok(grace)
}

/// [`parse`], and more than nothing.
///
/// # Errors
/// As [`parse`], and where it is zero.
pub fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse(text)? {
        Duration::ZERO => Err("a timeout of 0 would never get an answer".into()),
        timeout => Ok(timeout),
    }
}

/// The two largest units: `850ms`, `12s`, `3m12s`, `2h05m`, `4d3h`.
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        for (text, ms) in [
            ("0", 0),
            ("30", 30_000),
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("500ms", 500),
            ("2h", 7_200_000),
            ("1h1m1s1ms", 3_661_001),
            ("0s", 0),
        ] {
            assert_eq!(parse(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_with_an_example() {
        for text in [
            "",
            "s",
            "ms",
            "1x",
            "-1s",
            "1.5s",
            "30 s",
            "1s1m",
            "1s1s",
            "1d",
            " 1s",
            "1s ",
            "1sm",
            "99999999999999999999",
            "99999999999999999h",
            "∞",
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("30s"), "{text}: {error}");
        }
    }

    #[test]
    fn bounds_are_kept() {
        assert_eq!(parse_grace("24h").unwrap(), MAX_GRACE);
        assert!(parse_grace("24h1ms").unwrap_err().contains("24h"));
        assert!(parse_timeout("0").is_err());
    }

    #[test]
    fn durations_read_well() {
        for (ms, text) in [
            (0, "0ms"),
            (850, "850ms"),
            (12_900, "12s"),
            (192_000, "3m12s"),
            (7_500_000, "2h05m"),
            (356_400_000, "4d3h"),
        ] {
            assert_eq!(human(Duration::from_millis(ms)), text);
        }
    }
}
