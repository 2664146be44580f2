//! From a sample to sequences of tokens: what is read, what is learned, which picture each token sees.
//!
//! The text is the reference's prompt string (see [`idefics::processor`]): `<s>`, pictures in their tokens, texts
//! without spaces at their ends, `</s>`. Two forms of labels: every token of a text counts, or those of answers
//! alone (transformers' masking with -100). Tokens of pictures count only if asked for.
//! Surprising: texts that stand side by side are tokenized as one, since a token may reach from a question into
//! its answer; such a token belongs to the answer.

use std::{ops::Range, sync::Arc};

use idefics::{
    Processor,
    model::TrainingSequence,
    processor::{ExifOrientation, FetchPolicy, ImageLimits, ImageSource, PixelValues, load_image},
};
use serde::{Deserialize, Serialize};

use super::{
    augment::RandomResizedCrop,
    sample::{Piece, Role, Sample, SampleKind},
};
use crate::rng::generator;

/// Which tokens the loss covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// All of the text.
    #[default]
    Text,
    /// Answers: captions, continuations, what the assistant says.
    Answers,
}

/// How samples become sequences.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SequenceConfig {
    /// Most tokens of a sequence.
    pub length: usize,
    /// Which tokens the loss covers.
    pub loss_on: LossOn,
    /// Whether the tokens that stand for pictures are learned, too.
    pub learn_image_tokens: bool,
    /// Whether each sample ends with `</s>`.
    pub add_eos: bool,
    /// Most pictures of a sequence.
    pub max_images: usize,
}

impl Default for SequenceConfig {
    fn default() -> Self {
        Self { length: 1024, loss_on: LossOn::Text, learn_image_tokens: false, add_eos: true, max_images: 16 }
    }
}

/// Turns samples into sequences.
#[derive(Debug, Clone)]
pub struct Encoder {
    processor: Processor,
    config: SequenceConfig,
    augment: Option<RandomResizedCrop>,
    seed: u64,
}

/// A sequence whose pictures are not decoded yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokens {
    /// Token ids `[T]`.
    pub token_ids: Vec<u32>,
    /// For each token, the picture it sees, counted from the sequence's first: `[T]`.
    pub image_index: Vec<Option<u32>>,
    /// What each position must predict, if that counts: `[T]`.
    pub targets: Vec<Option<u32>>,
    /// Which of the sample's pictures are the sequence's.
    pub images: Range<usize>,
}

impl Tokens {
    /// Number of positions that count.
    pub fn num_targets(&self) -> usize {
        self.targets.iter().flatten().count()
    }
}

impl Encoder {
    /// An encoder for a model's processor. `seed` is that of the augmentation.
    pub fn new(
        processor: Processor,
        config: SequenceConfig,
        augment: Option<RandomResizedCrop>,
        seed: u64,
    ) -> Self {
        Self { processor, config, augment, seed }
    }

    /// The same without augmentation, for evaluation.
    #[must_use]
    pub fn without_augmentation(&self) -> Self {
        Self { augment: None, ..self.clone() }
    }

    /// The sequences of a sample: one, or the windows of a long document.
    pub fn tokenize(&self, sample: &Sample) -> Result<Vec<Tokens>, String> {
        let Text { text, answers, images } = self.text(sample);
        let (ids, offsets) =
            self.processor.tokenizer().encode_with_offsets(&text).map_err(|error| error.to_string())?;
        let special = self.processor.special_tokens();
        let (image, around) = (special.image.id, special.fake_token_around_image.id);
        if ids.iter().filter(|&&id| id == image).count() != images {
            return Err("a text holds the word that stands for pictures".to_owned());
        }
        let counts: Vec<bool> = ids
            .iter()
            .zip(&offsets)
            .map(|(&id, offset)| {
                if id == image || id == around {
                    return self.config.learn_image_tokens;
                }
                match self.config.loss_on {
                    LossOn::Text => true,
                    LossOn::Answers => answers.iter().any(|answer| overlap(answer, offset)),
                }
            })
            .collect();
        let windows = self.windows(sample.kind, &ids)?;
        let sequences: Vec<Tokens> = windows
            .into_iter()
            .map(|window| self.sequence(&ids, &counts, window))
            .filter(|sequence| sequence.num_targets() > 0)
            .collect();
        if sequences.is_empty() { Err("nothing in it is to be learned".to_owned()) } else { Ok(sequences) }
    }

    /// Decodes the pictures of a sample. `key` names the draws of the augmentation.
    pub fn load(
        &self,
        sample: &Sample,
        sequences: Vec<Tokens>,
        key: &[u64],
    ) -> Result<Vec<TrainingSequence>, String> {
        let sources = sample.pieces.iter().filter_map(|piece| match piece {
            Piece::Image(source) => Some(source),
            Piece::Text { .. } => None,
        });
        let needed = |index: &usize| sequences.iter().any(|tokens| tokens.images.contains(index));
        let mut images = Vec::new();
        for (index, source) in sources.enumerate() {
            let picture = if needed(&index) {
                let picture = self.picture(source, key, index as u64);
                Some(picture.map_err(|error| format!("picture {index}: {error}"))?)
            } else {
                None
            };
            images.push(picture);
        }
        let load = |tokens: Tokens| TrainingSequence {
            images: images[tokens.images.clone()].iter().flatten().cloned().collect(),
            token_ids: tokens.token_ids,
            image_index: tokens.image_index,
            targets: tokens.targets,
        };
        Ok(sequences.into_iter().map(load).collect())
    }

    fn picture(&self, source: &ImageSource, key: &[u64], index: u64) -> Result<Arc<PixelValues>, String> {
        let limits = ImageLimits::default();
        let image = load_image(source, &limits, &FetchPolicy::disabled(), ExifOrientation::Ignore)
            .map_err(|error| error.to_string())?;
        let image_processor = self.processor.image_processor();
        let Some(augment) = &self.augment else { return Ok(Arc::new(image_processor.process(&image))) };
        let mut words = vec![self.seed, index];
        words.extend(key);
        Ok(Arc::new(image_processor.process(&augment.crop(&image, &mut generator(&words)))))
    }

    /// The string of a sample, as [`Processor::prompt_text`] makes it of one prompt.
    fn text(&self, sample: &Sample) -> Text {
        let special = self.processor.special_tokens();
        let mut text = special.bos.text.clone();
        let (mut answers, mut images) = (Vec::new(), 0);
        let mut last_role = Role::Context;
        let runs = sample.pieces.chunk_by(|a, b| is_text(a) && is_text(b));
        let mut follows_image = false;
        for run in runs {
            if !is_text(&run[0]) {
                if !follows_image {
                    text += &special.fake_token_around_image.text;
                }
                text += &special.image.text;
                text += &special.fake_token_around_image.text;
                images += 1;
                follows_image = true;
                continue;
            }
            // Spaces at the ends of a run are lost, so they are no part of an answer either.
            let whole: String = run.iter().filter_map(text_of).map(|(text, _)| text).collect();
            let (first, last) =
                (whole.len() - whole.trim_start_matches(' ').len(), whole.trim_end_matches(' ').len());
            let start = text.len();
            let mut from = 0;
            for (part, role) in run.iter().filter_map(text_of) {
                let to = from + part.len();
                let inside = from.clamp(first, last.max(first))..to.clamp(first, last.max(first));
                if role == Role::Answer && !inside.is_empty() {
                    answers.push(start + inside.start - first..start + inside.end - first);
                }
                (from, last_role) = (to, role);
            }
            text += whole.trim_matches(' ');
            follows_image = false;
        }
        if self.config.add_eos {
            if last_role == Role::Answer {
                answers.push(text.len()..text.len() + special.eos.text.len());
            }
            text += &special.eos.text;
        }
        Text { text, answers, images }
    }

    /// Ranges of the tokens behind `<s>`, each with room for one in front.
    fn windows(&self, kind: SampleKind, ids: &[u32]) -> Result<Vec<Range<usize>>, String> {
        let special = self.processor.special_tokens();
        let (image, around) = (special.image.id, special.fake_token_around_image.id);
        let images = |range: Range<usize>| ids[range].iter().filter(|&&id| id == image).count();
        let (length, max_images) = (self.config.length, self.config.max_images);
        if ids.len() <= length && images(0..ids.len()) <= max_images {
            return Ok(std::iter::once(1..ids.len()).collect());
        }
        if kind == SampleKind::Pair {
            return Err(format!(
                "{} tokens and {} pictures, more than the {length} and {max_images} of a sequence",
                ids.len(),
                images(0..ids.len()),
            ));
        }
        // A picture begins at the token around it, unless the one before it shares that token.
        let begins = |at: usize| ids[at] == around && ids.get(at + 1) == Some(&image);
        let is_inside = |at: usize| ids[at] == image || (ids[at] == around && at > 0 && ids[at - 1] == image);
        let mut windows = Vec::new();
        let mut start = 1;
        while start < ids.len() {
            let mut end = (start + length - 1).min(ids.len());
            while images(start..end) > max_images {
                end -= 1;
            }
            if end < ids.len() {
                // Rather before a picture of the second half than in the middle of what is said about it.
                let half = start + (end - start) / 2;
                let before_picture = (half + 1..=end).rev().find(|&at| begins(at));
                end = before_picture.unwrap_or(end);
                while end > start + 1 && is_inside(end) {
                    end -= 1;
                }
            }
            windows.push(start..end);
            start = end;
        }
        Ok(windows)
    }

    /// The sequence of a window: `<s>` and its tokens.
    fn sequence(&self, ids: &[u32], counts: &[bool], window: Range<usize>) -> Tokens {
        let special = self.processor.special_tokens();
        let is_image = |id: &&u32| **id == special.image.id;
        let first_image = ids[..window.start].iter().filter(is_image).count();
        let num_images = ids[window.clone()].iter().filter(is_image).count();
        let mut token_ids = vec![special.bos.id];
        token_ids.extend(&ids[window.clone()]);
        let mut targets: Vec<Option<u32>> = window.map(|at| counts[at].then_some(ids[at])).collect();
        targets.push(None);
        let image_index = image_index(&token_ids, special.image.id, special.eos.id);
        Tokens { token_ids, image_index, targets, images: first_image..first_image + num_images }
    }
}

/// For each token, the last picture before it; none after the end of a document. As the processor has it.
fn image_index(ids: &[u32], image: u32, eos: u32) -> Vec<Option<u32>> {
    let (mut seen, mut count) = (None, 0);
    ids.iter()
        .map(|&id| {
            if id == image {
                seen = Some(count);
                count += 1;
            }
            let now = seen;
            if id == eos {
                seen = None;
            }
            now
        })
        .collect()
}

struct Text {
    text: String,
    /// Bytes of `text` that are answers.
    answers: Vec<Range<usize>>,
    /// Number of pictures.
    images: usize,
}

fn is_text(piece: &Piece) -> bool {
    matches!(piece, Piece::Text { .. })
}

fn text_of(piece: &Piece) -> Option<(&str, Role)> {
    match piece {
        Piece::Text { text, role } => Some((text, *role)),
        Piece::Image(_) => None,
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use idefics::{
        Segment,
        processor::{AddEndOfUtterance, ProcessOptions, SpecialTokenText},
    };
    use idefics_testing::fixture;

    use super::*;

    fn encoder(config: SequenceConfig) -> Encoder {
        Encoder::new(Processor::from_pretrained(fixture("tiny")).unwrap(), config, None, 0)
    }

    fn image() -> Piece {
        Piece::Image(ImageSource::Path(fixture("processor/444.jpg")))
    }

    fn sample(pieces: Vec<Piece>) -> Sample {
        Sample { pieces, kind: SampleKind::Pair }
    }

    #[test]
    fn tokens_are_the_processor_s() {
        let encoder = encoder(SequenceConfig::default());
        let cases = [
            vec![image(), Piece::context(" a cat "), image(), image(), Piece::answer(" two\n dogs")],
            vec![Piece::answer("words")],
            vec![
                Piece::context("  "),
                image(),
                Piece::context("a"),
                Piece::answer(" b "),
                Piece::context(""),
            ],
        ];
        for pieces in cases {
            let got = encoder.tokenize(&sample(pieces.clone())).unwrap();
            // Neighbouring texts are one text to the encoder.
            let prompt: Vec<Segment> = pieces
                .chunk_by(|a, b| is_text(a) && is_text(b))
                .map(|run| match &run[0] {
                    Piece::Image(source) => Segment::Image(source.clone()),
                    Piece::Text { .. } => {
                        Segment::Text(run.iter().filter_map(text_of).map(|(text, _)| text).collect())
                    }
                })
                .collect();
            let options = ProcessOptions {
                add_end_of_utterance: AddEndOfUtterance::Never,
                add_eos_token: true,
                ..ProcessOptions::default()
            };
            let expected = encoder.processor.process(&[prompt], &options).unwrap().remove(0);
            assert_eq!(got.len(), 1);
            assert_eq!(got[0].token_ids, expected.token_ids, "{pieces:?}");
            assert_eq!(got[0].image_index, expected.image_index);
            assert_eq!(got[0].images, 0..expected.images.len());
        }
    }

    /// The text of the tokens that count.
    fn learned(config: SequenceConfig, pieces: Vec<Piece>) -> String {
        let encoder = encoder(config);
        let sequences = encoder.tokenize(&sample(pieces)).unwrap();
        let tokens = &sequences[0];
        for (at, target) in tokens.targets.iter().enumerate() {
            assert!(target.is_none_or(|target| target == tokens.token_ids[at + 1]), "targets are shifted");
        }
        let ids: Vec<u32> = tokens.targets.iter().flatten().copied().collect();
        encoder.processor.decode(&ids, SpecialTokenText::Keep).unwrap()
    }

    #[test]
    fn what_counts() {
        let pieces = || vec![image(), Piece::context("Question: what? Answer:"), Piece::answer(" a cat")];
        let config = SequenceConfig::default();
        assert_eq!(learned(config, pieces()), "Question: what? Answer: a cat</s>");
        let answers = SequenceConfig { loss_on: LossOn::Answers, ..config };
        assert_eq!(learned(answers, pieces()), "a cat</s>");
        let without_end = SequenceConfig { add_eos: false, ..answers };
        assert_eq!(learned(without_end, pieces()), "a cat");
        let with_images = SequenceConfig { learn_image_tokens: true, ..answers };
        assert_eq!(
            learned(with_images, pieces()),
            "<fake_token_around_image><image><fake_token_around_image> a cat</s>"
        );
        let dialogue = vec![
            Piece::context("User:"),
            image(),
            Piece::context(" Who?"),
            Piece::context("<end_of_utterance>"),
            Piece::context("\nAssistant:"),
            Piece::answer(" Tom."),
            Piece::answer("<end_of_utterance>"),
            Piece::context("\nUser:"),
            Piece::context(" Sure?"),
            Piece::context("<end_of_utterance>"),
            Piece::context("\nAssistant:"),
            Piece::answer(" Yes."),
            Piece::answer("<end_of_utterance>"),
        ];
        let got = learned(answers, dialogue);
        assert_eq!(got.replace("> ", ">"), "Tom.<end_of_utterance>Yes.<end_of_utterance></s>");
    }

    #[test]
    fn pairs_are_never_cut_and_documents_are() {
        let config = SequenceConfig { length: 12, ..SequenceConfig::default() };
        let encoder = encoder(config);
        let pieces = vec![
            Piece::answer("one two three four five six"),
            image(),
            Piece::answer("seven eight nine ten eleven twelve"),
            image(),
            Piece::answer("thirteen"),
        ];
        let pair = encoder.tokenize(&sample(pieces.clone())).unwrap_err();
        assert!(pair.contains("more than the 12"), "{pair}");
        let document = Sample { pieces: pieces.clone(), kind: SampleKind::Document };
        let windows = encoder.tokenize(&document).unwrap();
        assert!(windows.len() > 1);
        let whole = Encoder { config: SequenceConfig::default(), ..encoder.clone() };
        let whole = whole.tokenize(&sample(pieces)).unwrap().remove(0);
        let mut joined = vec![whole.token_ids[0]];
        let (mut next_image, mut targets) = (0, 0);
        for window in &windows {
            assert!(window.token_ids.len() <= 12, "{window:?}");
            assert_eq!(window.token_ids[0], whole.token_ids[0]);
            joined.extend(&window.token_ids[1..]);
            assert_eq!(window.images.start, next_image, "each picture is in one window");
            next_image = window.images.end;
            targets += window.num_targets();
        }
        assert_eq!(joined, whole.token_ids);
        assert_eq!((next_image, targets), (2, whole.num_targets()));
        let loaded = encoder.load(&document, windows, &[1]).unwrap();
        assert_eq!(loaded.iter().map(|sequence| sequence.images.len()).sum::<usize>(), 2);
    }

    #[test]
    fn pictures_are_cropped_by_their_key() {
        let mut encoder = encoder(SequenceConfig::default());
        encoder.augment = Some(RandomResizedCrop { scale: [0.5, 0.6], ..RandomResizedCrop::default() });
        let sample = sample(vec![image(), Piece::answer("x")]);
        let load = |key: &[u64]| {
            let tokens = encoder.tokenize(&sample).unwrap();
            encoder.load(&sample, tokens, key).unwrap()[0].images[0].data.clone()
        };
        assert_eq!(load(&[1, 2]), load(&[1, 2]));
        assert_ne!(load(&[1, 2]), load(&[1, 3]));
    }

    #[test]
    fn what_cannot_be_learned_is_said() {
        let answers = encoder(SequenceConfig { loss_on: LossOn::Answers, ..SequenceConfig::default() });
        let error = answers.tokenize(&sample(vec![Piece::context("no answer")])).unwrap_err();
        assert_eq!(error, "nothing in it is to be learned");
        let error = answers.tokenize(&sample(vec![Piece::answer("an <image> in words")])).unwrap_err();
        assert!(error.contains("the word that stands for pictures"), "{error}");
        let broken = sample(vec![Piece::Image(ImageSource::Bytes(Arc::from([1, 2]))), Piece::answer("x")]);
        let tokens = answers.tokenize(&broken).unwrap();
        let error = answers.load(&broken, tokens, &[]).unwrap_err();
        assert!(error.starts_with("picture 0: not an image"), "{error}");
    }
}
