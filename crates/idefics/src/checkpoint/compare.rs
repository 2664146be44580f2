//! The tensors of the files against those that the configuration calls for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeInclusive,
};

use super::{
    CheckpointError, PackedError, Part, Weights,
    header::printable,
    layout::{ADDITIONAL_EMBEDDING, ADDITIONAL_FC, EMBED_TOKENS, LM_HEAD, expected_tensors},
};
use crate::config::IdeficsConfig;

/// Everything in which tensors and configuration differ. Displayed on one line, where names that differ in one
/// number stand together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Called for, but in no file.
    pub missing: Vec<String>,
    /// In a file, but not called for.
    pub unexpected: Vec<String>,
    /// In a file, but of another shape.
    pub wrong_shape: Vec<WrongShape>,
    /// Packed, but not a linear layer's: the model needs the numbers themselves.
    pub not_linear: Vec<String>,
    /// Packed, but not soundly.
    pub unsound: Vec<(String, PackedError)>,
}

/// A tensor of another shape than the configuration calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongShape {
    /// The tensor.
    pub name: String,
    /// The configuration's shape.
    pub expected: Vec<usize>,
    /// The file's shape.
    pub got: Vec<usize>,
}

/// Checks names and shapes of all weights, then ties the heads to the embeddings if the configuration says so.
/// `unsound` are the packed weights that were given up.
pub(super) fn check(
    weights: &mut Weights,
    unsound: Vec<(String, PackedError)>,
    config: &IdeficsConfig,
) -> Result<(), CheckpointError> {
    check_additional_vocab(weights, config)?;
    let mismatch = compare(weights, unsound, config);
    if mismatch != Mismatch::default() {
        return Err(CheckpointError::Mismatch(Box::new(mismatch)));
    }
    if config.tie_word_embeddings {
        // As the reference does, the embedding wins over a head that the file may hold as well.
        for (head, embedding) in HEADS {
            if let Some(weight) = weights.get(embedding).cloned() {
                weights.insert(head, weight);
            }
        }
    }
    Ok(())
}

/// The heads and the embeddings that they may be tied to.
const HEADS: [(&str, &str); 2] = [(LM_HEAD, EMBED_TOKENS), (ADDITIONAL_FC, ADDITIONAL_EMBEDDING)];

/// The commonest slip has its own message: a configuration of the base model beside weights of the instruct one.
fn check_additional_vocab(weights: &Weights, config: &IdeficsConfig) -> Result<(), CheckpointError> {
    for tensor in [ADDITIONAL_EMBEDDING, ADDITIONAL_FC] {
        let rows = match weights.get(tensor) {
            Some(weight) => weight.shape().first().copied().unwrap_or(0),
            // The comparison of all tensors reports it.
            None => continue,
        };
        if rows != config.additional_vocab_size {
            return Err(CheckpointError::AdditionalVocab {
                config: config.additional_vocab_size,
                tensor,
                rows,
            });
        }
    }
    let none = [ADDITIONAL_EMBEDDING, ADDITIONAL_FC].iter().all(|tensor| weights.get(tensor).is_none());
    if none && config.additional_vocab_size > 0 && weights.get(EMBED_TOKENS).is_some() {
        let (config, tensor) = (config.additional_vocab_size, ADDITIONAL_EMBEDDING);
        return Err(CheckpointError::AdditionalVocab { config, tensor, rows: 0 });
    }
    Ok(())
}

fn compare(weights: &Weights, unsound: Vec<(String, PackedError)>, config: &IdeficsConfig) -> Mismatch {
    let mut mismatch = Mismatch { unsound, ..Mismatch::default() };
    let mut known = BTreeSet::new();
    for (name, expected) in expected_tensors(config) {
        let is_packed = weights.get_packed(&name).is_some();
        match weights.get_linear(&name) {
            _ if mismatch.unsound.iter().any(|(unsound, _)| *unsound == name) => {}
            None if config.tie_word_embeddings && HEADS.iter().any(|(head, _)| *head == name) => {}
            None => mismatch.missing.push(name.clone()),
            Some(weight) if weight.shape() != expected => {
                let got = weight.shape().to_vec();
                mismatch.wrong_shape.push(WrongShape { name: name.clone(), expected, got });
            }
            Some(_) if is_packed && Part::of_linear(&name).is_none() => {
                mismatch.not_linear.push(name.clone());
            }
            Some(_) => {}
        }
        known.insert(name);
    }
    let dense = weights.iter().map(|(name, _)| name);
    let unexpected =
        dense.chain(weights.iter_packed().map(|(name, _)| name)).filter(|name| !known.contains(*name));
    mismatch.unexpected = unexpected.map(str::to_owned).collect();
    mismatch.unexpected.sort();
    mismatch
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.missing.is_empty() {
            parts.push(format!("{} missing: {}", self.missing.len(), name_list(&self.missing)));
        }
        if !self.unexpected.is_empty() {
            parts.push(format!("{} unexpected: {}", self.unexpected.len(), name_list(&self.unexpected)));
        }
        if !self.wrong_shape.is_empty() {
            // Tensors that go wrong in the same way are listed together.
            let mut ways: BTreeMap<_, Vec<&str>> = BTreeMap::new();
            for wrong in &self.wrong_shape {
                ways.entry((&wrong.expected, &wrong.got)).or_default().push(&wrong.name);
            }
            let ways = ways.iter().map(|((expected, got), names)| {
                format!("{}: expected {expected:?}, got {got:?}", name_list(names))
            });
            parts.push(format!("{} of another shape: {}", self.wrong_shape.len(), shortened(ways)));
        }
        if !self.not_linear.is_empty() {
            let names = name_list(&self.not_linear);
            parts.push(format!(
                "{} packed, though no linear layer reads them: {names}",
                self.not_linear.len()
            ));
        }
        if !self.unsound.is_empty() {
            let mut ways: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            for (name, error) in &self.unsound {
                ways.entry(error.to_string()).or_default().push(name);
            }
            let ways = ways.iter().map(|(error, names)| format!("{}: {error}", name_list(names)));
            parts.push(format!("{} packed unsoundly: {}", self.unsound.len(), shortened(ways)));
        }
        f.write_str(&parts.join("; "))
    }
}

/// Names on one line; those that differ only in their first number become one, `model.layers.{0-3,7}.mlp`.
pub(super) fn name_list(names: &[impl AsRef<str>]) -> String {
    let mut groups: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    for name in names.iter().map(AsRef::as_ref) {
        let (before, number, after) = split_at_number(name);
        groups.entry((before, after)).or_default().extend(number);
    }
    shortened(groups.into_iter().map(|((before, after), mut numbers)| {
        numbers.sort_unstable();
        let (before, after) = (printable(before), printable(after));
        match numbers.as_slice() {
            [] => format!("`{before}`"),
            [number] => format!("`{before}{number}{after}`"),
            numbers => format!("`{before}{{{}}}{after}`", runs(numbers)),
        }
    }))
}

/// Comma-separated, but not without end: a hostile file may hold a million odd names.
fn shortened(items: impl ExactSizeIterator<Item = String>) -> String {
    const MOST: usize = 100;
    let rest = items.len().saturating_sub(MOST);
    let list = items.take(MOST).collect::<Vec<_>>().join(", ");
    if rest > 0 { format!("{list}, and {rest} more") } else { list }
}

/// `model.layers.12.mlp` as `model.layers.`, 12, `.mlp`; a name without a number has it all before.
fn split_at_number(name: &str) -> (&str, Option<usize>, &str) {
    let mut start = 0;
    for part in name.split('.') {
        let end = start + part.len();
        // Only a canonical number comes back as it was.
        if let Some(number) = part.parse::<usize>().ok().filter(|number| number.to_string() == part) {
            return (&name[..start], Some(number), &name[end..]);
        }
        start = end + 1;
    }
    (name, None, "")
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn runs(numbers: &[usize]) -> String {
    let mut runs: Vec<RangeInclusive<usize>> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some(run) if run.end().checked_add(1) == Some(number) => *run = *run.start()..=number,
            _ => runs.push(number..=number),
        }
    }
    let shown = runs.iter().map(|run| match (run.start(), run.end()) {
        (start, end) if start == end => start.to_string(),
        (start, end) => format!("{start}-{end}"),
    });
    shown.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_differ_in_a_number_stand_together() {
        let layers = [0, 1, 2, 3, 7, 10, 9].map(|n| format!("model.layers.{n}.mlp.up_proj.weight"));
        assert_eq!(name_list(&layers), "`model.layers.{0-3,7,9-10}.mlp.up_proj.weight`");
        assert_eq!(name_list(&["b", "a.5"]), "`a.5`, `b`");
        assert_eq!(
            name_list(&["x.01.y", "x.18446744073709551616.y"]),
            "`x.01.y`, `x.18446744073709551616.y`"
        );
        assert_eq!(name_list(&["x.18446744073709551615", "x.0"]), "`x.{0,18446744073709551615}`");
        assert_eq!(name_list(&["a\u{1b}[2J\n.0.ü"]), "`a\\u{1b}[2J\\n.0.ü`");
    }

    #[test]
    fn endless_lists_are_cut() {
        let names: Vec<String> = (0..1000).map(|n| format!("x{n}")).collect();
        let list = name_list(&names);
        assert!(list.ends_with(", and 900 more"), "{list}");
        assert!(list.len() < 2000);
    }

    #[test]
    fn all_differences_are_shown_at_once() {
        let wrong = |n: usize| WrongShape { name: format!("l.{n}.w"), expected: vec![2, 3], got: vec![3, 2] };
        let mismatch = Mismatch {
            missing: vec!["a.0.x".to_owned(), "a.1.x".to_owned()],
            unexpected: vec!["b".to_owned()],
            wrong_shape: vec![wrong(0), wrong(1)],
            ..Mismatch::default()
        };
        assert_eq!(
            mismatch.to_string(),
            "2 missing: `a.{0-1}.x`; 1 unexpected: `b`; 2 of another shape: `l.{0-1}.w`: expected [2, 3], got [3, 2]"
        );
    }
}
