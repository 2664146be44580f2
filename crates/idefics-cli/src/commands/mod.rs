//! One module per subcommand: `Args` for clap, `run` for the work.

pub(crate) mod ask;
pub(crate) mod bench;
pub(crate) mod caption;
pub(crate) mod chat;
pub(crate) mod classify;
pub(crate) mod download;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod merge;
pub(crate) mod quantize;
pub(crate) mod score;
pub(crate) mod serve;
pub(crate) mod train;
