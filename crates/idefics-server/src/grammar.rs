//! Answers of a given form: JSON by a schema, or a regular expression.
//!
//! The work is done by `llguidance`, which says at each step which tokens may follow; the others are ruled out
//! before the choice. Its limits bound what a hostile schema can cost. Surprising: the engine hands a rule the
//! tokens of one sequence without saying which, so states are found by what was written.

use std::sync::{Arc, Mutex, PoisonError};

use idefics::{
    generate::SharedProcessor,
    processor::{SpecialTokens, Tokenizer},
};
use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use crate::error::ApiError;

/// Larger schemas are refused.
const MAX_BYTES: usize = 64 << 10;

/// What may stand between two parts of JSON. Without a bound a model that sees nothing likelier writes white space
/// until its answer is cut off. llama.cpp draws the same line.
const SPACE: &str = r"[ ]|\n[ \t]{0,20}";

/// A form, as a request has it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AnswerForm {
    /// JSON that a schema allows.
    Json(Value),
    /// What a regular expression matches as a whole.
    Regex(String),
}

/// The vocabulary as the parser sees it; made once for each model.
pub(crate) struct Vocabulary(ParserFactory);

/// A form that was understood.
pub(crate) struct Grammar {
    start: Matcher,
    /// The field of the request, for messages.
    param: &'static str,
}

impl AnswerForm {
    /// Any JSON object.
    pub(crate) fn any_object() -> Self {
        Self::Json(json!({"type": "object"}))
    }
}

impl Vocabulary {
    /// Of a tokenizer, for a model with so many logits.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        special: &SpecialTokens,
        vocab_size: usize,
    ) -> Result<Self, String> {
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id);
                // Marked, so that no text can be mistaken for a special token.
                if tokenizer.is_special_token(id) {
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat()
                } else {
                    bytes
                }
            })
            .collect();
        let mut info = TokRxInfo::new(vocab_size as u32, special.eos.id);
        info.tok_end_of_turn = special.end_of_utterance.as_ref().map(|token| token.id);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &[])
            .map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // A state takes one or two kB.
            max_lexer_states: 20_000,
            // Errors must not repeat what was written.
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self(factory))
    }

    /// Understands a form, or says what is wrong with it. `param` is the field of the request.
    pub(crate) fn compile(&self, form: &AnswerForm, param: &'static str) -> Result<Grammar, ApiError> {
        let size = match form {
            AnswerForm::Json(schema) => schema.to_string().len(),
            AnswerForm::Regex(pattern) => pattern.len(),
        };
        if size > MAX_BYTES {
            return Err(ApiError::field(param, format_args!("expected at most {MAX_BYTES} bytes")));
        }
        let grammar = match form {
            AnswerForm::Json(schema) => TopLevelGrammar::from_json_schema(with_bounded_space(schema.clone())),
            AnswerForm::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
        };
        let start = Matcher::new(self.0.create_parser(grammar));
        match start.get_error() {
            None => Ok(Grammar { start, param }),
            Some(problem) => {
                // About the schema alone, which is the caller's own, and in one line.
                let problem: String = problem.lines().next().unwrap_or_default().chars().take(200).collect();
                Err(ApiError::field(param, format_args!("not a form that can be kept to: {problem}"))
                    .code("unsupported_format"))
            }
        }
    }
}

/// The schema with [`SPACE`], unless it has such options of its own: the parser reads them from this field.
fn with_bounded_space(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": SPACE}));
    }
    schema
}

impl Grammar {
    /// The rule for the answers to a prompt of `prompt` tokens, `sequences` of them.
    pub(crate) fn rule(self, prompt: usize, sequences: usize) -> SharedProcessor {
        let states = Mutex::new(States { start: self.start, seen: Vec::new(), limit: 2 * sequences + 2 });
        let param = self.param;
        Arc::new(move |history, scores| {
            let answer = history.get(prompt..).unwrap_or_default();
            let mut states = states.lock().unwrap_or_else(PoisonError::into_inner);
            match states.allowed(answer) {
                Ok(allowed) => {
                    for (id, score) in scores.iter_mut().enumerate() {
                        if !allowed(id as u32) {
                            *score = f32::NEG_INFINITY;
                        }
                    }
                }
                Err(problem) => {
                    tracing::warn!(param, %problem, "a form could not be kept to");
                    // With no token left the answer fails: better than one of another form.
                    scores.fill(f32::NEG_INFINITY);
                }
            }
        })
    }
}

/// Where the parser is after what was written.
struct States {
    start: Matcher,
    /// The latest last.
    seen: Vec<(Vec<u32>, Matcher)>,
    limit: usize,
}

impl States {
    /// Which tokens may follow an answer so far.
    fn allowed(&mut self, answer: &[u32]) -> Result<impl Fn(u32) -> bool + use<>, String> {
        let longest = self
            .seen
            .iter()
            .enumerate()
            .filter(|(_, (tokens, _))| answer.starts_with(tokens))
            .max_by_key(|(_, (tokens, _))| tokens.len())
            .map(|(index, _)| index);
        // Cloned, since another sequence may have begun the same.
        let (read, mut matcher) = match longest {
            Some(index) => (self.seen[index].0.len(), self.seen[index].1.deep_clone()),
            None => (0, self.start.deep_clone()),
        };
        matcher.consume_tokens(&answer[read..]).map_err(|error| error.to_string())?;
        let mask = matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        if self.seen.len() >= self.limit {
            self.seen.remove(0);
        }
        self.seen.push((answer.to_vec(), matcher));
        Ok(move |id| mask.is_allowed(id))
    }
}

#[cfg(test)]
mod tests {
    use idefics::Processor;
    use idefics_testing::fixture;

    use super::*;
    use crate::error::Kind;

    const VOCAB: usize = 451;

    fn processor() -> Processor {
        Processor::from_pretrained(fixture("tiny")).unwrap()
    }

    /// Writes by a form, at each step one of the allowed tokens that `choose` takes; gives the text.
    fn write(processor: &Processor, form: &AnswerForm, mut choose: impl FnMut(&[u32]) -> u32) -> String {
        let special = processor.special_tokens();
        let vocabulary = Vocabulary::new(processor.tokenizer(), special, VOCAB).unwrap();
        let rule = vocabulary.compile(form, "x").unwrap().rule(1, 1);
        let mut history = vec![special.bos.id];
        let mut bytes = Vec::new();
        for _ in 0..200 {
            let mut scores = vec![0.0; VOCAB];
            rule(&history, &mut scores);
            let allowed: Vec<u32> = (0..VOCAB as u32).filter(|&id| scores[id as usize] == 0.0).collect();
            assert!(!allowed.is_empty(), "after {:?}", String::from_utf8_lossy(&bytes));
            let id = choose(&allowed);
            if id == special.eos.id || Some(id) == special.end_of_utterance.as_ref().map(|token| token.id) {
                return String::from_utf8(bytes).unwrap();
            }
            bytes.extend(processor.tokenizer().token_bytes(id));
            history.push(id);
        }
        panic!("it never ended: {:?}", String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn whatever_is_drawn_has_the_form() {
        let processor = processor();
        let schema = json!({"type": "object", "additionalProperties": false, "required": ["seen", "count"],
            "properties": {"seen": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}}});
        for seed in 0..20_u64 {
            let mut state = seed;
            let mut draw = |allowed: &[u32]| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                allowed[(state >> 33) as usize % allowed.len()]
            };
            let value: Value =
                serde_json::from_str(&write(&processor, &AnswerForm::Json(schema.clone()), &mut draw))
                    .unwrap();
            assert!(value["seen"] == "cat" || value["seen"] == "dog", "{value}");
            assert!(value["count"].as_u64().unwrap() < 100, "{value}");
            let text = write(&processor, &AnswerForm::Regex("[ab]{2,4}-[0-9]".to_owned()), &mut draw);
            let (letters, digit) = text.split_once('-').unwrap();
            assert!(
                (2..=4).contains(&letters.len()) && letters.bytes().all(|it| it == b'a' || it == b'b'),
                "{text}"
            );
            assert!(digit.len() == 1 && digit.bytes().all(|it| it.is_ascii_digit()), "{text}");
        }
    }

    #[test]
    fn white_space_comes_to_an_end() {
        let processor = processor();
        let is_space = |id: &u32| processor.tokenizer().token_bytes(*id).iter().all(u8::is_ascii_whitespace);
        // As much of it as may be.
        let mut choose = |allowed: &[u32]| *allowed.iter().find(|id| is_space(id)).unwrap_or(&allowed[0]);
        let schema = json!({"type": "object", "additionalProperties": false, "required": ["seen"],
            "properties": {"seen": {"const": "cat"}}});
        let text = write(&processor, &AnswerForm::Json(schema), &mut choose);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), json!({"seen": "cat"}));
        assert!(text.len() > 40 && text.len() <= 15 + 4 * 21, "{text:?}");
    }

    #[test]
    fn sequences_that_share_a_rule_do_not_disturb_each_other() {
        let processor = processor();
        let special = processor.special_tokens();
        let vocabulary = Vocabulary::new(processor.tokenizer(), special, VOCAB).unwrap();
        let form = AnswerForm::Regex("(ab|ba)".to_owned());
        let rule = vocabulary.compile(&form, "x").unwrap().rule(0, 2);
        let id = |text: &str| {
            (0..VOCAB as u32).find(|&id| processor.tokenizer().token_bytes(id) == text.as_bytes()).unwrap()
        };
        let allows = |history: &[u32], next: u32| {
            let mut scores = vec![0.0; VOCAB];
            rule(history, &mut scores);
            scores[next as usize] == 0.0
        };
        let (a, b) = (id("a"), id("b"));
        for _ in 0..2 {
            assert!(allows(&[], a) && allows(&[], b));
            assert!(allows(&[a], b) && !allows(&[a], a));
            assert!(allows(&[b], a) && !allows(&[b], b));
            assert!(allows(&[a, b], special.eos.id));
        }
    }

    #[test]
    fn forms_that_cannot_be_kept_to_are_refused() {
        let processor = processor();
        let vocabulary = Vocabulary::new(processor.tokenizer(), processor.special_tokens(), VOCAB).unwrap();
        for form in [
            AnswerForm::Json(json!({"type": "nonsense"})),
            AnswerForm::Json(json!({"$ref": "http://elsewhere.example/schema"})),
            AnswerForm::Json(json!(["not", "a", "schema"])),
            AnswerForm::Json(json!({"enum": vec!["x".repeat(100); 1000]})),
            AnswerForm::Regex("(unclosed".to_owned()),
            AnswerForm::Regex("x".repeat(MAX_BYTES + 1)),
        ] {
            let error = vocabulary.compile(&form, "response_format").err().expect("refused");
            assert_eq!(error.kind, Kind::Invalid);
            assert!(error.message.starts_with("`response_format`: "), "{}", error.message);
        }
    }
}
