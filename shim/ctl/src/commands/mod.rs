//! What each command does.

pub mod change;
pub mod config;
pub mod console;
pub mod list;
pub mod migrate;
pub mod state;
pub mod sweep;
pub mod watch;
