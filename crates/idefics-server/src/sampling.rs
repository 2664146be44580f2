//! Options of a request, bounded, to options of a generation.
//!
//! Surprising: `OpenAI`'s temperature is 1 where a request does not name one, but these checkpoints propose greedy
//! search. So without `temperature` and the like the checkpoint's own options hold; a temperature of 0 is greedy
//! search, and anything that shapes a draw turns sampling on.

use std::{collections::BTreeMap, fmt::Display, ops::RangeInclusive};

use idefics::generate::GenerationConfig;
use serde_json::Number;

use crate::error::ApiError;

/// What both dialects have, by the names of fields in messages.
#[derive(Debug, Default)]
pub(crate) struct Sampling {
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<usize>,
    pub(crate) min_p: Option<f64>,
    pub(crate) typical_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) seed: Option<u64>,
    /// Said by the request; shaping a draw says it too.
    pub(crate) do_sample: Option<bool>,
    /// Written, of which the best may be all that is returned.
    pub(crate) answers: usize,
}

impl Sampling {
    /// The options, on top of the checkpoint's.
    pub(crate) fn apply(&self, config: &mut GenerationConfig) {
        let shapes = [self.temperature, self.top_p, self.min_p, self.typical_p];
        let is_shaped = shapes.iter().any(Option::is_some) || self.top_k.is_some() || self.answers > 1;
        config.do_sample = match (self.do_sample, self.temperature) {
            (_, Some(0.0)) => false,
            (Some(said), _) => said,
            (None, _) => config.do_sample || is_shaped,
        };
        // What neither the request nor the checkpoint says is off, not 50 as in transformers: these dialects know no
        // such default.
        let proposed = Some(config.top_k).filter(|&top_k| top_k != GenerationConfig::default().top_k);
        config.top_k = self.top_k.or(proposed).unwrap_or(0);
        set(&mut config.temperature, self.temperature.filter(|&temperature| temperature > 0.0));
        set(&mut config.top_p, self.top_p);
        config.min_p = self.min_p.or(config.min_p);
        set(&mut config.typical_p, self.typical_p);
        set(&mut config.repetition_penalty, self.repetition_penalty);
        set(&mut config.frequency_penalty, self.frequency_penalty);
        set(&mut config.presence_penalty, self.presence_penalty);
        config.seed = self.seed.or(config.seed);
        // Greedy search has one answer, however many are asked for; the dialect repeats it.
        config.num_return_sequences = if config.do_sample { self.answers.max(1) } else { 1 };
        config.num_beams = 1;
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// An integer of a request within bounds; `128.0` is one, as some clients write.
pub(crate) fn count(
    param: &str,
    value: Option<f64>,
    range: RangeInclusive<usize>,
) -> Result<Option<usize>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let (low, high) = range.into_inner();
    if value.fract() != 0.0 || value < low as f64 || value > high as f64 {
        return Err(ApiError::field(param, format_args!("expected an integer from {low} to {high}")));
    }
    Ok(Some(value as usize))
}

/// A number of a request within bounds.
pub(crate) fn number(
    param: &str,
    value: Option<f64>,
    allowed: impl Fn(f64) -> bool,
    expected: impl Display,
) -> Result<Option<f64>, ApiError> {
    match value {
        Some(value) if !allowed(value) => {
            Err(ApiError::field(param, format_args!("expected a number {expected}")))
        }
        value => Ok(value),
    }
}

/// A seed: any integer of 64 bits, signed or not.
pub(crate) fn seed(value: Option<&Number>) -> Result<Option<u64>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
    seed.map(Some).ok_or_else(|| ApiError::field("seed", "expected an integer of 64 bits"))
}

/// Stop strings: at most so many, none empty, none huge.
pub(crate) fn stops(param: &str, stops: Vec<String>, limit: usize) -> Result<Vec<String>, ApiError> {
    const MAX_BYTES: usize = 1024;
    if stops.len() > limit {
        return Err(ApiError::field(param, format_args!("expected at most {limit} strings")));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_BYTES) {
        return Err(ApiError::field(param, format_args!("expected strings of 1 to {MAX_BYTES} bytes")));
    }
    Ok(stops)
}

/// `logit_bias` of `OpenAI`: token ids, as strings, to numbers that are added to their scores.
pub(crate) fn biases(
    map: &BTreeMap<String, f64>,
    vocab_size: usize,
    limit: usize,
) -> Result<Vec<(Vec<u32>, f64)>, ApiError> {
    let wrong = |problem: String| ApiError::field("logit_bias", problem);
    if map.len() > limit {
        return Err(wrong(format!("expected at most {limit} tokens")));
    }
    let bias = |(token, bias): (&String, &f64)| {
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size);
        let id = id.ok_or_else(|| wrong(format!("expected token ids from 0 to {}", vocab_size - 1)))?;
        if !(-100.0..=100.0).contains(bias) {
            return Err(wrong("expected numbers from -100 to 100".to_owned()));
        }
        // The ends mean never and always.
        Ok((vec![id], if *bias == -100.0 { f64::NEG_INFINITY } else { *bias }))
    };
    map.iter().map(bias).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_bounded() {
        for (value, expected) in [
            (None, Ok(None)),
            (Some(1.0), Ok(Some(1))),
            (Some(16.0), Ok(Some(16))),
            (Some(0.0), Err(())),
            (Some(17.0), Err(())),
            (Some(1.5), Err(())),
            (Some(-1.0), Err(())),
            (Some(1e300), Err(())),
        ] {
            assert_eq!(count("n", value, 1..=16).map_err(|_| ()), expected, "{value:?}");
        }
        let error = count("n", Some(62e9), 1..=16).unwrap_err();
        assert_eq!(error.message, "`n`: expected an integer from 1 to 16");
    }

    #[test]
    fn sampling_is_on_where_a_draw_is_shaped() {
        let with = |sampling: Sampling| {
            let mut config = GenerationConfig::default();
            sampling.apply(&mut config);
            (config.do_sample, config.temperature, config.top_k, config.num_return_sequences)
        };
        assert_eq!(with(Sampling::default()), (false, 1.0, 0, 1));
        assert_eq!(
            with(Sampling { temperature: Some(0.0), answers: 3, ..Default::default() }),
            (false, 1.0, 0, 1)
        );
        assert_eq!(with(Sampling { temperature: Some(0.5), ..Default::default() }), (true, 0.5, 0, 1));
        assert_eq!(with(Sampling { answers: 2, ..Default::default() }), (true, 1.0, 0, 2));
        assert_eq!(
            with(Sampling { do_sample: Some(false), top_k: Some(5), ..Default::default() }),
            (false, 1.0, 5, 1)
        );
    }

    #[test]
    fn a_checkpoints_own_top_k_holds_and_the_default_of_transformers_does_not() {
        for (proposed, asked, expected) in [
            (50, None, 0),
            (10, None, 10),
            (0, None, 0),
            (10, Some(5), 5),
            (10, Some(0), 0),
            (50, Some(50), 50),
        ] {
            let mut config = GenerationConfig { top_k: proposed, ..Default::default() };
            Sampling { top_k: asked, ..Default::default() }.apply(&mut config);
            assert_eq!(config.top_k, expected, "{proposed} {asked:?}");
        }
    }

    #[test]
    fn seeds_and_biases_are_checked() {
        let of = |json: &str| seed(Some(&serde_json::from_str(json).unwrap())).map_err(|error| error.message);
        assert_eq!(of("7"), Ok(Some(7)));
        assert_eq!(of("-1"), Ok(Some(u64::MAX)));
        assert_eq!(of("18446744073709551615"), Ok(Some(u64::MAX)));
        assert!(of("1.5").is_err());
        let of = |token: &str, bias| biases(&BTreeMap::from([(token.to_owned(), bias)]), 10, 1);
        assert_eq!(of("9", -5.0).unwrap(), [(vec![9], -5.0)]);
        assert_eq!(of("9", -100.0).unwrap(), [(vec![9], f64::NEG_INFINITY)]);
        for (token, bias) in [("10", 0.0), ("-1", 0.0), ("x", 0.0), ("9", 101.0)] {
            assert!(of(token, bias).is_err(), "{token} {bias}");
        }
    }
}
