//! One module per subcommand: `Args` for clap, `run` for the work.

pub(crate) mod download;
pub(crate) mod inspect;
