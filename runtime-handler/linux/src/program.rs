//! The programs that come with this one, and lie beside it.

use std::path::PathBuf;

use dyad_runtime_handler::error::{Context, Error, Result};

/// The path of `name`, in the folder of the program that runs.
///
/// # Errors
/// It is not there.
pub fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context(|| "find this program".into())?;
    let path = own.with_file_name(name);
    if path.exists() {
        return Ok(path);
    }
    Err(Error::FailedPrecondition(format!(
        "{} is missing: install it beside {}",
        path.display(),
        own.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_beside_this_one_is_found_and_another_is_named() {
        let own = std::env::current_exe().unwrap();
        let name = own.file_name().unwrap().to_str().unwrap();
        assert_eq!(beside(name).unwrap(), own);
        let error = beside("dyad-nothing").unwrap_err().to_string();
        assert!(error.contains("dyad-nothing is missing"), "{error}");
    }
}
