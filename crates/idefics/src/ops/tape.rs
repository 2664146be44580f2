//! A piece of the model that runs forward, and later backward.
//!
//! Training goes layer by layer: a [`Segment`] keeps either the tape of its operations or what went in, in which
//! case it runs again before it goes backward (gradient checkpointing, Chen et al., 2016).
//!
//! The tape is a list. While a segment runs, its tensors know their [`Place`] on it, and each operation adds what
//! takes the gradient of its result back to its arguments. Backward the list is taken from its end, and what an
//! operation kept is freed once it was used. Gradients are handed on as they are where nobody else holds them,
//! and sums are made in place.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use half::bf16;
use idefics_kernels::{elementwise, linear::round_all, rows};

use super::{Context, Result, Tensor, tensor};

/// The gradient of one tensor on a tape. Whoever holds it alone may change it.
pub(super) type Slope = Arc<Vec<f32>>;

/// Where a tensor stands on a tape.
#[derive(Debug, Clone)]
pub(super) struct Place {
    tape: Arc<Tape>,
    /// The number under which its gradient is summed; none if nobody asks for that.
    slot: Option<usize>,
    /// Its numbers rounded, once a product has kept them: the next one keeps the same.
    rounded: Arc<OnceLock<Arc<Vec<bf16>>>>,
}

impl Place {
    fn new(tape: Arc<Tape>, slot: Option<usize>) -> Self {
        Self { tape, slot, rounded: Arc::default() }
    }

    /// The numbers of the tensor that stands here, `values`, rounded to bf16.
    pub(super) fn rounded(&self, ctx: Context, values: &[f32]) -> Arc<Vec<bf16>> {
        Arc::clone(self.rounded.get_or_init(|| Arc::new(round_all(ctx.isa, values))))
    }
}

#[derive(Default)]
struct Tape(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    n_slots: usize,
    list: Vec<Entry>,
}

/// One operation that ran.
struct Entry {
    arguments: Vec<Option<usize>>,
    result: usize,
    backward: Backward,
}

type Backward = Box<dyn FnOnce(Slope, &mut Slopes<'_>) -> Result<()> + Send>;

/// Where an operation puts the gradients of its arguments.
pub(super) struct Slopes<'a> {
    arguments: &'a [Option<usize>],
    sums: &'a mut [Option<Slope>],
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tape").field(&self.lock().list.len()).finish()
    }
}

impl Tape {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slopes<'_> {
    /// Whether anybody asks for the gradient of an argument.
    pub(super) fn wants(&self, argument: usize) -> bool {
        self.arguments[argument].is_some()
    }

    /// Adds to the gradient of an argument, if anybody asks for it.
    pub(super) fn add(&mut self, argument: usize, slope: impl Into<Slope>) {
        let Some(slot) = self.arguments[argument] else { return };
        let (mut slope, place) = (slope.into(), &mut self.sums[slot]);
        let Some(sum) = place else {
            *place = Some(slope);
            return;
        };
        if let Some(sum) = Arc::get_mut(sum) {
            elementwise::add(sum, &slope);
        } else if let Some(own) = Arc::get_mut(&mut slope) {
            elementwise::add(own, sum);
            *sum = slope;
        } else {
            *sum = Arc::new(elementwise::sum(sum, &slope));
        }
    }
}

/// The numbers of a gradient, to be changed: themselves if nobody else holds them, else a copy.
pub(super) fn owned(slope: Slope) -> Vec<f32> {
    Arc::try_unwrap(slope).unwrap_or_else(|shared| rows::copied(&shared))
}

/// The result of an operation, with its way back if any of its arguments is on a tape. `trains` says whether the
/// way back changes the gradient of a weight: if not, and nobody asks for a gradient of an argument, there is none.
pub(super) fn record(
    arguments: &[&Tensor],
    result: Tensor,
    trains: bool,
    backward: impl FnOnce(Slope, &mut Slopes<'_>) -> Result<()> + Send + 'static,
) -> Tensor {
    let Some(tape) = arguments.iter().find_map(|x| x.place.as_ref()).map(|place| Arc::clone(&place.tape))
    else {
        return result;
    };
    let slots: Vec<_> = arguments.iter().map(|x| x.place.as_ref().and_then(|place| place.slot)).collect();
    let mut slot = None;
    if trains || slots.iter().any(Option::is_some) {
        let mut entries = tape.lock();
        slot = Some(entries.n_slots);
        let entry = Entry { arguments: slots, result: entries.n_slots, backward: Box::new(backward) };
        entries.n_slots += 1;
        entries.list.push(entry);
    }
    Tensor { values: result.values, place: Some(Place::new(tape, slot)) }
}

/// What a segment computes from its inputs.
type Run<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// Whether the gradient of an input is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// It is.
    Followed,
    /// It is not.
    Fixed,
}

/// One layer, or a few, with inputs that gradients are asked for.
pub struct Segment<'a> {
    /// Extents of each input, and whether its gradient is asked for.
    inputs: Vec<(Vec<usize>, Input)>,
    state: State<'a>,
}

enum State<'a> {
    Taped(Taped),
    ToRunAgain { inputs: Vec<Tensor>, run: Box<Run<'a>> },
}

/// A tape and the place of the result on it, if it depends on anything.
struct Taped {
    tape: Arc<Tape>,
    result: Option<usize>,
}

impl<'a> Segment<'a> {
    /// Runs `run` on `inputs`; returns what it gives, without a tape. `keeps_tape` trades memory for not having
    /// to run it again.
    pub fn forward(
        inputs: &[(Tensor, Input)],
        keeps_tape: bool,
        run: impl Fn(&[Tensor]) -> Result<Tensor> + 'a,
    ) -> Result<(Self, Tensor)> {
        let extents = inputs.iter().map(|(x, input)| (x.dims().to_vec(), *input)).collect();
        let kinds: Vec<_> = inputs.iter().map(|(_, input)| *input).collect();
        let inputs: Vec<_> = inputs.iter().map(|(x, _)| x.without_tape()).collect();
        let (state, output) = if keeps_tape {
            let (taped, output) = tape(&inputs, &kinds, &run)?;
            (State::Taped(taped), output)
        } else {
            let output = run(&inputs)?;
            (State::ToRunAgain { inputs, run: Box::new(run) }, output)
        };
        Ok((Self { inputs: extents, state }, output))
    }

    /// The gradients of the inputs from that of the output; none for inputs that are fixed. Gradients of trained
    /// weights are added where they go.
    pub fn backward(self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let Taped { tape, result } = match self.state {
            State::Taped(taped) => taped,
            State::ToRunAgain { inputs, run } => {
                let kinds: Vec<_> = self.inputs.iter().map(|(_, input)| *input).collect();
                self::tape(&inputs, &kinds, &run)?.0
            }
        };
        let Entries { n_slots, list } = std::mem::take(&mut *tape.lock());
        let mut sums: Vec<Option<Slope>> = vec![None; n_slots];
        if let Some(slot) = result {
            sums[slot] = Some(Arc::new(rows::copied(&dy.elements()?)));
        }
        for Entry { arguments, result, backward } in list.into_iter().rev() {
            if let Some(slope) = sums[result].take() {
                backward(slope, &mut Slopes { arguments: &arguments, sums: &mut sums })?;
            }
        }
        // Inputs that gradients are asked for have the first slots, in their order.
        let mut slots = sums.into_iter();
        self.inputs
            .iter()
            .map(|(extents, input)| {
                if *input == Input::Fixed {
                    return Ok(None);
                }
                let numbers = match slots.next().flatten() {
                    Some(slope) => owned(slope),
                    None => rows::zeros(extents.iter().product()), // nothing read it
                };
                tensor(numbers, extents).map(Some)
            })
            .collect()
    }
}

/// Runs `run` on a tape; returns the output without it.
fn tape(inputs: &[Tensor], kinds: &[Input], run: &Run<'_>) -> Result<(Taped, Tensor)> {
    let tape = Arc::new(Tape::default());
    let on_tape: Vec<Tensor> = inputs
        .iter()
        .zip(kinds)
        .map(|(x, kind)| {
            let mut entries = tape.lock();
            let slot = (*kind == Input::Followed).then_some(entries.n_slots);
            entries.n_slots += usize::from(slot.is_some());
            Tensor { values: x.values.clone(), place: Some(Place::new(Arc::clone(&tape), slot)) }
        })
        .collect();
    let output = run(&on_tape)?;
    let result = output.place.as_ref().and_then(|place| place.slot);
    Ok((Taped { tape, result }, output.without_tape()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{self, to_vec};

    /// `x + 2·(x + y)`, through an addition that is used twice.
    fn run(x: &[Tensor]) -> Result<Tensor> {
        let both = ops::add(&x[0], &x[1])?;
        ops::add(&x[0], &ops::add(&both, &both)?)
    }

    #[test]
    fn gradients_of_values_used_twice_are_summed() {
        let inputs = |second| {
            let x = |values: [f32; 2]| tensor(values.to_vec(), &[1, 2]).unwrap();
            [(x([1.0, 2.0]), Input::Followed), (x([3.0, 4.0]), second)]
        };
        for keeps in [false, true] {
            for second in [Input::Followed, Input::Fixed] {
                let (segment, y) = Segment::forward(&inputs(second), keeps, run).unwrap();
                assert_eq!(to_vec(&y).unwrap(), [9.0, 14.0]);
                let dy = tensor(vec![1.0, -1.0], &[1, 2]).unwrap();
                let gradients = segment.backward(&dy).unwrap();
                assert_eq!(to_vec(gradients[0].as_ref().unwrap()).unwrap(), [3.0, -3.0]);
                assert_eq!(gradients[1].is_some(), second == Input::Followed);
                if let Some(gradient) = &gradients[1] {
                    assert_eq!(to_vec(gradient).unwrap(), [2.0, -2.0]);
                }
            }
        }
    }

    #[test]
    fn an_input_that_nothing_reads_has_a_gradient_of_zeros() {
        let x = tensor(vec![1.0, 2.0], &[1, 2]).unwrap();
        let inputs = [(x.clone(), Input::Followed), (x, Input::Followed)];
        let (segment, y) = Segment::forward(&inputs, true, |x| ops::add(&x[0], &x[0])).unwrap();
        let gradients = segment.backward(&y).unwrap();
        assert_eq!(to_vec(gradients[0].as_ref().unwrap()).unwrap(), [4.0, 8.0]);
        assert_eq!(to_vec(gradients[1].as_ref().unwrap()).unwrap(), [0.0, 0.0]);
    }

    #[test]
    fn what_has_no_way_back_refuses_a_tensor_on_a_tape() {
        let x = tensor(vec![1.0, 2.0], &[1, 2]).unwrap();
        let inputs = [(x, Input::Followed)];
        let error = Segment::forward(&inputs, true, |x| tensor(to_vec(&x[0])?, &[1, 2])).err();
        assert!(error.is_some_and(|error| error.to_string().contains("backward")));
    }
}
