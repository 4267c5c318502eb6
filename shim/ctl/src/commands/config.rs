//! `dyadctl config`.

use serde_json::Value;

use crate::args::Options;
use crate::config::origins;
use crate::error::Result;
use crate::text::{Cell, Format, Printer};

/// Prints every value of the effective configuration and where it comes from.
///
/// # Errors
/// Where the configuration is wrong, or the output is gone.
pub fn run(options: &Options, printer: Printer) -> Result<()> {
    let origins = origins(options)?;
    if printer.format == Format::Json {
        return printer.json(&origins);
    }
    let rows: Vec<_> = origins
        .iter()
        .map(|origin| {
            let value = match &origin.value {
                Value::Null => String::new(),
                value => value.to_string(),
            };
            [
                Cell::from(&origin.key),
                value.into(),
                Cell::from(&origin.from),
            ]
        })
        .collect();
    printer.table(["KEY", "VALUE", "FROM"], &rows)
}
