//! Makes strings that a peer chose safe to show: in logs, in tables, in metric labels.
//!
//! What is printed can neither start a new line, nor drive a terminal, nor turn the reading direction, nor be endless.

use std::fmt::{self, Write};

/// Bytes shown of a peer's string; the rest becomes `…`.
pub const MAX_SHOWN: usize = 256;

/// Shows bytes with everything but printable characters escaped (`\n`, `\x1b`, `\u{202e}`), and `\` and `"` as `\\` and `\"`.
#[derive(Clone, Copy)]
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(MAX_SHOWN)];
        for chunk in shown.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '"' | '\\' => write!(f, "\\{c}")?,
                    '\n' => f.write_str("\\n")?,
                    '\r' => f.write_str("\\r")?,
                    '\t' => f.write_str("\\t")?,
                    c if c.is_ascii_control() => write!(f, "\\x{:02x}", u32::from(c))?,
                    c if is_unprintable(c) => write!(f, "{}", c.escape_unicode())?,
                    c => f.write_char(c)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        if shown.len() < self.0.len() { f.write_char('…') } else { Ok(()) }
    }
}

impl fmt::Debug for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Appends `value` as a Prometheus label value (text format 0.0.4: `\`, `"` and line feed are escaped), without the quotes.
pub fn label_value(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// C1 controls, separators, and the invisible or direction-changing characters of Unicode (UAX 9, UTR 36).
fn is_unprintable(c: char) -> bool {
    matches!(c, '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_a_peer_sends_can_drive_a_terminal() {
        let long = [b'a'; 300];
        let cases: [(&[u8], String); 7] = [
            (b"/api/list", "/api/list".into()),
            (b"a\r\nb\tc", r"a\r\nb\tc".into()),
            (b"\x1b[2J\x7f\0", r"\x1b[2J\x7f\x00".into()),
            (b"\"q\\", r#"\"q\\"#.into()),
            ("héé\u{202e}x\u{9b}".as_bytes(), r"héé\u{202e}x\u{9b}".into()),
            (b"\xff\xe2\x82", r"\xff\xe2\x82".into()),
            (&long, format!("{}…", "a".repeat(MAX_SHOWN))),
        ];
        for (bytes, want) in cases {
            assert_eq!(Escaped(bytes).to_string(), want);
        }
        assert_eq!(format!("{:?}", Escaped(b"a\n")), r#""a\n""#);
    }

    #[test]
    fn label_values_keep_the_text_format_whole() {
        let mut out = String::new();
        label_value(&mut out, "a\"b\\c\nd");
        assert_eq!(out, r#"a\"b\\c\nd"#);
    }
}
