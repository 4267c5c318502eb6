//! Text for a terminal: aligned columns, a little colour, and nothing that a foreign
//! string could do to it.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::model::TaskState;

/// A colour, used only on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// As the terminal has it.
    #[default]
    Plain,
    /// Well.
    Good,
    /// Worth a look.
    Notice,
    /// Wrong.
    Bad,
}

impl Style {
    fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Good => Some("32"),
            Self::Notice => Some("33"),
            Self::Bad => Some("31"),
        }
    }

    /// The colour of a state.
    pub fn of(state: TaskState) -> Self {
        match state {
            TaskState::Running => Self::Good,
            TaskState::Failed => Self::Bad,
            TaskState::Created | TaskState::Exited | TaskState::Migrated => Self::Plain,
            _ => Self::Notice,
        }
    }
}

/// One field of a row.
#[derive(Debug, Clone, Default)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// `text` in `style`.
    pub fn styled(text: impl AsRef<str>, style: Style) -> Self {
        Self {
            text: printable(text.as_ref()).into_owned(),
            style,
        }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::styled(text, Style::Plain)
    }
}

/// `text` with everything escaped that is not a printable character, so that a name or a
/// reason from elsewhere cannot move the cursor or reorder the line.
pub fn printable(text: &str) -> Cow<'_, str> {
    let is_plain = |c: char| matches!(c, '"' | '\'' | '\\') || c.escape_debug().count() == 1;
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_plain(c) {
            safe.push(c)
        } else {
            safe.extend(c.escape_debug())
        }
    }
    Cow::Owned(safe)
}

/// Rows below `headers`, columns two spaces apart, no blanks at the end of a line. An
/// empty cell is shown as `-`.
pub fn table<const N: usize>(headers: [&str; N], rows: &[[Cell; N]], colour: bool) -> String {
    let shown = |cell: &Cell| {
        if cell.text.is_empty() {
            "-".to_owned()
        } else {
            cell.text.clone()
        }
    };
    let mut widths = headers.map(|header| header.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(shown(cell).chars().count());
        }
    }
    let mut text = String::new();
    let header = headers.map(|header| (header.to_owned(), Style::Plain));
    let lines = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| (shown(cell), cell.style)));
    for line in std::iter::once(header).chain(lines) {
        for (column, ((field, style), width)) in line.iter().zip(widths).enumerate() {
            match style.code() {
                Some(code) if colour => text.push_str(&format!("\x1b[{code}m{field}\x1b[0m")),
                _ => text.push_str(field),
            }
            if column + 1 < N {
                text.extend(std::iter::repeat_n(' ', width + 2 - field.chars().count()));
            }
        }
        text.push('\n');
    }
    text
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Standard output.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    /// What is wanted.
    pub format: Format,
    colour: bool,
}

impl Printer {
    /// With colour only on a terminal that has some, and not where `NO_COLOR` is set.
    pub fn new(format: Format) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        Self {
            format,
            colour: io::stdout().is_terminal() && !dumb && set("NO_COLOR").is_none(),
        }
    }

    /// Prints `text` as it is.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn text(&self, text: &str) -> Result<()> {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
            .map_err(Error::Output)
    }

    /// Prints one JSON document, indented.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn json(&self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
        self.text(&(text + "\n"))
    }

    /// Prints one JSON document on one line.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn json_line(&self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(value).map_err(io::Error::from)?;
        self.text(&(text + "\n"))
    }

    /// Prints a table, see [`table`].
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn table<const N: usize>(&self, headers: [&str; N], rows: &[[Cell; N]]) -> Result<()> {
        self.text(&table(headers, rows, self.colour))
    }

    /// `word` in colour, where there is colour.
    pub fn word(&self, word: &str, style: Style) -> String {
        match style.code() {
            Some(code) if self.colour => format!("\x1b[{code}m{}\x1b[0m", printable(word)),
            _ => printable(word).into_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let rows = [
            [
                "default/web".into(),
                Cell::styled("running", Style::Good),
                "".into(),
            ],
            ["a".into(), "paused,running".into(), "why".into()],
        ];
        let expected = "\
POD          STATE           REASON
default/web  running         -
a            paused,running  why
";
        assert_eq!(table(["POD", "STATE", "REASON"], &rows, false), expected);
        let colour = table(["POD", "STATE", "REASON"], &rows, true);
        assert!(
            colour.contains("\x1b[32mrunning\x1b[0m         -\n"),
            "{colour:?}"
        );
    }

    #[test]
    fn a_foreign_string_cannot_touch_the_terminal() {
        for (text, shown) in [
            ("plain \"quoted\" it's a \\", "plain \"quoted\" it's a \\"),
            ("grüße", "grüße"),
            ("\x1b[2Jboo", "\\u{1b}[2Jboo"),
            ("two\nlines", "two\\nlines"),
            ("\u{202e}txt", "\\u{202e}txt"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}
