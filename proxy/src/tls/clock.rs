//! A certificate outside its time, told so that its reader compares clocks, and not trust roots.
//!
//! Knows rustls' errors only. rustls tells seconds since 1970; people compare dates (RFC 3339).

use std::fmt;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::{CertificateError, Error};
use rustls_pki_types::UnixTime;
use x509_parser::time::ASN1Time;

/// Which end of a certificate's time the clock here is beyond, and by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outside {
    TooEarly { not_before: Duration, now: Duration },
    TooLate { not_after: Duration, now: Duration },
}

impl Outside {
    /// `None`: the error is another one.
    pub(crate) fn of(error: &Error) -> Option<Self> {
        let seconds = |time: &UnixTime| Duration::from_secs(time.as_secs());
        match error {
            Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
                Some(Self::TooEarly { not_before: seconds(not_before), now: seconds(time) })
            }
            Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
                Some(Self::TooLate { not_after: seconds(not_after), now: seconds(time) })
            }
            _ => None,
        }
    }

    /// What ended at `not_after`, which `now` has passed.
    pub(crate) fn too_late(not_after: SystemTime, now: SystemTime) -> Self {
        let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::TooLate { not_after: since(not_after), now: since(now) }
    }
}

impl fmt::Display for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooEarly { not_before, now } => write!(
                f,
                "is not valid before {}, and the clock here says {} ({} s earlier): {COMPARE}",
                Date(not_before),
                Date(now),
                not_before.saturating_sub(now).as_secs()
            ),
            Self::TooLate { not_after, now } => write!(
                f,
                "was valid until {}, and the clock here says {} ({} s later): {COMPARE}; if they agree, it was not renewed",
                Date(not_after),
                Date(now),
                now.saturating_sub(not_after).as_secs()
            ),
        }
    }
}

/// A handshake that failed, as it is told.
pub(crate) struct Handshake<'a>(pub(crate) &'a io::Error);

impl fmt::Display for Handshake<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = self.0.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
        match error.and_then(Outside::of) {
            Some(outside) => write!(f, "its certificate {outside}"),
            None => self.0.fmt(f),
        }
    }
}

/// Time since 1970 in UTC, as RFC 3339 has it.
struct Date(Duration);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match i64::try_from(seconds).ok().and_then(|seconds| ASN1Time::from_timestamp(seconds).ok()) {
            Some(time) => {
                let time = time.to_datetime();
                let (year, month, day) = time.to_calendar_date();
                let (hour, minute, second) = time.to_hms();
                write!(f, "{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
            }
            None => write!(f, "{seconds} s after 1970"), // beyond the year 9999
        }
    }
}

const COMPARE: &str = "compare the clock of this node with the identity service's";

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    #[test]
    fn both_ends_are_told_with_the_times_the_difference_and_the_fix() {
        let (ended, noon) = (at(1_795_521_599), at(1_795_521_600));
        let early = CertificateError::NotValidYetContext { time: noon, not_before: at(1_795_521_880) };
        assert_eq!(
            Outside::of(&early.into()).expect("a matter of time").to_string(),
            "is not valid before 2026-11-24T12:04:40Z, and the clock here says 2026-11-24T12:00:00Z (280 s earlier): \
             compare the clock of this node with the identity service's"
        );
        let late = CertificateError::ExpiredContext { time: noon, not_after: ended };
        assert_eq!(
            Outside::of(&late.into()).expect("a matter of time").to_string(),
            "was valid until 2026-11-24T11:59:59Z, and the clock here says 2026-11-24T12:00:00Z (1 s later): compare \
             the clock of this node with the identity service's; if they agree, it was not renewed"
        );
        assert_eq!(Outside::of(&CertificateError::UnknownIssuer.into()), None);
    }

    #[test]
    fn a_handshake_that_failed_for_another_reason_is_told_as_rustls_tells_it() {
        let told = |error: Error| Handshake(&io::Error::new(io::ErrorKind::InvalidData, error)).to_string();
        assert_eq!(told(CertificateError::UnknownIssuer.into()), "invalid peer certificate: UnknownIssuer");
        let early = CertificateError::NotValidYetContext { time: at(0), not_before: at(1) };
        assert!(told(early.into()).starts_with("its certificate is not valid before 1970-01-01T00:00:01Z, and "));
        assert_eq!(Handshake(&io::ErrorKind::ConnectionReset.into()).to_string(), "connection reset");
        assert_eq!(Date(Duration::MAX).to_string(), format!("{} s after 1970", u64::MAX));
    }
}
