//! The server as its clients see it, on the small random model of the fixtures: its words mean nothing, but they are
//! the same each time and the same as the library's.

mod faults;
mod live;
mod openai;
mod operation;
mod panics;
mod tgi;
#[cfg(feature = "otel")]
mod traces;
