//! What the server needs of an engine, so that it need not know of which model.

use idefics::{
    SequenceInputs,
    generate::{Drain, Engine, GenerationConfig, Rejected, Stats, StepModel, Submission, Ticket},
};

/// An engine: takes requests and reports on them from a thread of its own.
pub trait Backend: Send + Sync + 'static {
    /// Queues a request.
    fn submit(&self, submission: Submission) -> Result<Ticket, Rejected>;

    /// Longest answer, in tokens, that these inputs leave room for in the context and in memory.
    fn longest_answer(&self, inputs: &SequenceInputs, config: &GenerationConfig) -> usize;

    /// Figures for the metrics.
    fn stats(&self) -> Stats;

    /// Longest sequence in tokens.
    fn max_positions(&self) -> usize;

    /// Number of tokens that the model knows.
    fn vocab_size(&self) -> usize;

    /// Ends all requests where they are and takes no more.
    fn stop(&self);
}

impl<M: StepModel + Send + Sync + 'static> Backend for Engine<M> {
    fn submit(&self, submission: Submission) -> Result<Ticket, Rejected> {
        Self::submit(self, submission)
    }

    fn longest_answer(&self, inputs: &SequenceInputs, config: &GenerationConfig) -> usize {
        Self::longest_answer(self, inputs, config)
    }

    fn stats(&self) -> Stats {
        Self::stats(self)
    }

    fn max_positions(&self) -> usize {
        self.model().max_positions()
    }

    fn vocab_size(&self) -> usize {
        self.model().vocab_size()
    }

    fn stop(&self) {
        self.shutdown(Drain::Now);
    }
}
