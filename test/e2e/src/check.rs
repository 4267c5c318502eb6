//! What a trial asserts, as errors that tell what was there and what should have been.

use anyhow::{Result, bail};

/// The text of the error that was expected.
///
/// # Errors
/// There was none.
pub fn refusal<T>(result: Result<T>) -> Result<String> {
    match result {
        Ok(_) => bail!("it was accepted"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// `text` must hold every word.
///
/// # Errors
/// One is missing; it is named.
pub fn names(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        if !text.contains(word) {
            bail!("{word:?} is not named in: {text}");
        }
    }
    Ok(())
}

/// Both must be the same.
///
/// # Errors
/// They differ; both are shown.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<()> {
    if is != should {
        bail!("{what} is {is:?} and should be {should:?}");
    }
    Ok(())
}
