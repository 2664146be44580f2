//! One job over the lines of a file: in batches, in order, and a bad line does not stop the others.

use anyhow::{Context, bail};
use serde_json::json;

use crate::{cancel, counter::Counter, output};

/// How a file is worked through.
pub(crate) struct Lines<T> {
    /// Each line with its number, or why it cannot be read.
    pub(crate) entries: Vec<(usize, anyhow::Result<T>)>,
    pub(crate) batch_size: usize,
    /// What a line is, in the plural.
    pub(crate) what: &'static str,
    /// Whether a bad line has a line of JSON in the results; it always has one on stderr.
    pub(crate) reports_errors: bool,
}

impl<T> Lines<T> {
    /// Makes a job of each line, does the jobs of a batch together, and prints the result of each. `work` gives as
    /// many results as it gets jobs.
    pub(crate) fn run<J>(
        self,
        mut prepare: impl FnMut(usize, T) -> anyhow::Result<J>,
        mut work: impl FnMut(&[J]) -> anyhow::Result<Vec<anyhow::Result<String>>>,
    ) -> anyhow::Result<()> {
        let (total, mut done, mut failed) = (self.entries.len(), 0, 0);
        let mut counter = Counter::start(total, self.what);
        let mut lines = self.entries.into_iter();
        while !cancel::is_requested() {
            let batch: Vec<_> = lines.by_ref().take(self.batch_size).collect();
            if batch.is_empty() {
                break;
            }
            let read = batch.len();
            let mut jobs = Vec::with_capacity(read);
            let mut outcomes = Vec::with_capacity(read);
            for (number, line) in batch {
                match line.and_then(|line| prepare(number, line)) {
                    Ok(job) => {
                        jobs.push(job);
                        outcomes.push((number, None));
                    }
                    Err(error) => outcomes.push((number, Some(error))),
                }
            }
            let mut results = work(&jobs)?.into_iter();
            if cancel::is_requested() {
                // These answers were cut short.
                break;
            }
            for (number, refused) in outcomes {
                let result = match refused {
                    Some(error) => Err(error),
                    None => results.next().context("every job has a result")?,
                };
                match result {
                    Ok(result) => counter.aside(|| output::print(&result))?,
                    Err(error) => {
                        failed += 1;
                        let error = format!("{error:#}");
                        counter.aside(|| eprintln!("error: line {number}: {error}"));
                        if self.reports_errors {
                            let line = json!({"line": number, "error": error}).to_string();
                            counter.aside(|| output::print(&line))?;
                        }
                    }
                }
            }
            done += read;
            counter.advance(read);
        }
        counter.finish();
        if done < total {
            bail!(cancel::Stopped { done, total, what: self.what });
        }
        if failed > 0 {
            bail!("{failed} of {total} {} failed", self.what);
        }
        Ok(())
    }
}
