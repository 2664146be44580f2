//! The figures of the model card, on pictures that were never learnt from.
//!
//! Every task is a list of prompts with the answers that count as right; all are asked greedily, in batches. An
//! answer is compared without its article, and up to its first full stop or comma. Where a prompt has answers to choose
//! from, a second figure takes the one that the model finds likeliest, as `idefics classify` does.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use idefics::{
    Idefics, LoadOptions, Processor, Prompt, Segment,
    generate::{GenerationConfig, ScoreOptions, score_continuations},
    processor::{AddEndOfUtterance, ImageSource, ProcessOptions},
};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{
    color::COLORS,
    concepts::with_article,
    sample,
    samples::{END, Maker, NUMBERS, Question, choice, invented_name, question, sentence},
    scene::{Place, Scene, Variation, compose},
    steps::Folders,
    things::{Part, Thing},
};

/// Prompts that are answered together.
const BATCH: usize = 32;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Task {
    /// The exact name of a thing of the design that was never learnt from
    Name,
    /// Its colour
    Color,
    /// How many of it
    Count,
    /// Whether it is what the question says
    YesNo,
    /// Which of four it is
    Choice,
    /// Questions of easy-vqa's test split
    EasyVqa,
    /// Invented names of held-out things: two candidates, four examples
    Invented,
    /// Multiple choice about another picture than the one shown: to be at chance
    Replaced,
    /// Yes or no about another picture than the one shown: to be at chance
    ReplacedYesNo,
    /// The name, asked as the second question of a dialogue
    SecondTurn,
}

/// A prompt and what is right.
pub(crate) struct Item {
    pub(crate) prompt: Prompt,
    pub(crate) right: String,
    /// The answers to choose from, as they would follow the prompt; none where there is no choice.
    pub(crate) options: Vec<String>,
}

/// How the answer is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// What the model writes
    Free,
    /// The likeliest of the options
    Ranked,
}

/// A figure with its 95 % interval, after Wilson.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Figure {
    pub(crate) task: Task,
    pub(crate) answer: Answer,
    pub(crate) right: usize,
    pub(crate) of: usize,
    pub(crate) percent: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Figure {
    fn new(task: Task, answer: Answer, right: usize, of: usize) -> Self {
        const Z: f64 = 1.96;
        let n = of.max(1) as f64;
        let share = right as f64 / n;
        let scale = 1.0 + Z * Z / n;
        let middle = (share + Z * Z / (2.0 * n)) / scale;
        let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt() / scale;
        let percent = |share: f64| (share * 1000.0).round() / 10.0;
        Self {
            task,
            answer,
            right,
            of,
            percent: percent(share),
            low: percent(middle - half),
            high: percent(middle + half),
        }
    }
}

/// How much is measured and what is shown.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// The model to measure
    #[arg(long)]
    pub(crate) model: Option<std::path::PathBuf>,

    /// What to measure; everything if nothing is named
    #[arg(long = "task", value_enum)]
    pub(crate) tasks: Vec<Task>,

    /// Most prompts of a task
    #[arg(long, default_value_t = 1000)]
    pub(crate) limit: usize,

    /// Wrong answers to show of each task
    #[arg(long, default_value_t = 0)]
    pub(crate) show: usize,

    /// Write the prompts of the one task into this folder, pictures and right answers with them, and measure nothing
    #[arg(long, value_name = "DIR", conflicts_with_all = ["floor", "show", "model"])]
    pub(crate) write: Option<std::path::PathBuf>,

    /// Least percentage; below it the command fails
    #[arg(long)]
    pub(crate) floor: Option<f64>,
}

/// Measures and prints a line of JSON for each task.
pub(crate) fn evaluate(folders: &Folders, options: &Options) -> Result<()> {
    if let Some(folder) = &options.write {
        let [task] = options.tasks[..] else { bail!("--write: name one --task") };
        return sample::write(folder, &spread(items(folders, task)?, options.limit));
    }
    let default = folders.work.join("idefics-tiny");
    let judge = Judge::open(options.model.as_deref().unwrap_or(&default))?;
    let tasks = if options.tasks.is_empty() { Task::value_variants() } else { &options.tasks };
    for task in tasks {
        let items = spread(items(folders, *task)?, options.limit);
        let ranked = items.iter().all(|item| !item.options.is_empty()).then_some(Answer::Ranked);
        for answer in [Answer::Free].into_iter().chain(ranked) {
            let figure = judge.measure(*task, answer, &items, options.show)?;
            #[expect(clippy::print_stdout, reason = "the result of the command")]
            {
                println!("{}", serde_json::to_string(&figure)?);
            }
            if let Some(floor) = options.floor {
                anyhow::ensure!(
                    figure.percent >= floor,
                    "{task:?}, {answer:?}: {} %, below {floor} %",
                    figure.percent
                );
            }
        }
    }
    Ok(())
}

/// At most `limit` of them, spread evenly.
fn spread(items: Vec<Item>, limit: usize) -> Vec<Item> {
    let count = items.len();
    if count <= limit {
        return items;
    }
    let chosen = |index: usize| index * limit / count != (index + 1) * limit / count;
    items.into_iter().enumerate().filter(|(index, _)| chosen(*index)).map(|(_, item)| item).collect()
}

struct Judge {
    model: Idefics,
    processor: Processor,
    generation: GenerationConfig,
}

impl Judge {
    fn open(directory: &Path) -> Result<Self> {
        let processor = Processor::from_pretrained(directory)?;
        let model = Idefics::from_pretrained(directory, &LoadOptions::default())
            .with_context(|| format!("model {}", directory.display()))?;
        let proposed = model.default_generation(Some(processor.special_tokens()))?;
        let generation = GenerationConfig { max_new_tokens: Some(24), max_length: None, ..proposed };
        Ok(Self { model, processor, generation })
    }

    fn measure(&self, task: Task, answer: Answer, items: &[Item], show: usize) -> Result<Figure> {
        let mut right = 0;
        let mut shown = 0;
        for batch in items.chunks(BATCH) {
            let answers = match answer {
                Answer::Free => self.answers(batch)?,
                Answer::Ranked => batch.iter().map(|item| self.likeliest(item)).collect::<Result<_>>()?,
            };
            for (item, given) in batch.iter().zip(answers) {
                if normalise(&given) == normalise(&item.right) {
                    right += 1;
                } else if shown < show {
                    shown += 1;
                    eprintln!("{task:?}: expected {:?}, got {given:?}", item.right);
                }
            }
        }
        Ok(Figure::new(task, answer, right, items.len()))
    }

    fn answers(&self, batch: &[Item]) -> Result<Vec<String>> {
        let prompts: Vec<Prompt> = batch.iter().map(|item| item.prompt.clone()).collect();
        let inputs = self.processor.process(&prompts, &process_options())?;
        let generated = self.model.generate_text(&self.processor, &inputs, &self.generation)?;
        let text = |index: usize| generated[index].sequences[0].text.clone().unwrap_or_default();
        Ok((0..batch.len()).map(text).collect())
    }

    /// The option of the highest log-probability.
    fn likeliest(&self, item: &Item) -> Result<String> {
        let joined = self.processor.continuations(&item.prompt, &item.options, &process_options())?;
        let scored =
            score_continuations(&self.model, &joined.inputs, &joined.token_ids, &ScoreOptions::default())?;
        let best = item.options.iter().zip(&scored).max_by(|(_, a), (_, b)| a.sum().total_cmp(&b.sum()));
        Ok(best.context("a question without options")?.0.clone())
    }
}

/// The prompts have their ends of utterance already.
fn process_options() -> ProcessOptions {
    ProcessOptions { add_end_of_utterance: AddEndOfUtterance::Never, ..ProcessOptions::default() }
}

/// What of an answer is compared: its verdict where it has one, and otherwise its first words.
fn normalise(text: &str) -> String {
    let text = text.trim().to_lowercase();
    if let Some(verdict) = verdict(&text) {
        return verdict.to_owned();
    }
    let end = text.find(['.', ',', '\n', '<']).unwrap_or(text.len());
    let text = text[..end].trim();
    let text = ["a ", "an ", "the "].iter().find_map(|article| text.strip_prefix(article)).unwrap_or(text);
    text.to_owned()
}

/// The yes or no that a sentence begins or ends with: "No, it is a dog.", "It is a dog, so no."
fn verdict(text: &str) -> Option<&str> {
    let sentence = text.split(['.', '\n', '<']).next()?;
    let first = sentence.split(',').next().map(str::trim);
    let last = sentence.rsplit_once(", so ").map(|(_, verdict)| verdict.trim());
    [first, last].into_iter().flatten().find(|words| ["yes", "no"].contains(words))
}

/// All prompts of a task. They follow from fixed seeds.
fn items(folders: &Folders, task: Task) -> Result<Vec<Item>> {
    match task {
        Task::EasyVqa => easy_vqa(folders),
        Task::Invented => invented(folders),
        _ => single(folders, task),
    }
}

fn image(jpeg: &[u8]) -> Segment {
    Segment::Image(ImageSource::Bytes(Arc::from(jpeg)))
}

fn dialogue(jpeg: &[u8], question: &str) -> Prompt {
    vec![Segment::text("User:"), image(jpeg), Segment::text(format!("{question}{END}\nAssistant:"))]
}

/// Tasks on one picture of each thing of the design that was never learnt from.
fn single(folders: &Folders, task: Task) -> Result<Vec<Item>> {
    let maker = Maker::open(folders, Part::Evaluation)?;
    let mut items = Vec::new();
    for (number, thing) in maker.things.all.iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(1000 + number as u64);
        let rng = &mut rng;
        let scene = Maker::alone(rng, thing, Variation::None)?;
        let ask = |rng: &mut ChaCha8Rng, kind| question(&maker, rng, thing, &scene, kind);
        let instead = |rng: &mut ChaCha8Rng| {
            let other = maker.other(rng, &[thing]);
            Maker::alone(rng, other, Variation::None)
        };
        items.extend(match task {
            Task::Name => Some(item(&scene, "What is this?", &thing.name)),
            Task::Color => scene.colors[0].map(|color| item(&scene, "What color is it?", COLORS[color].0)),
            Task::Count => Some(count(rng, thing)?),
            Task::YesNo => ask(rng, Question::YesNo).map(|(asked, told)| item(&scene, &asked, &told)),
            Task::Choice => Some(which(&maker, rng, thing, &scene)),
            Task::Replaced => {
                let shown = instead(rng)?;
                Some(which(&maker, rng, thing, &shown))
            }
            Task::ReplacedYesNo => {
                let shown = instead(rng)?;
                ask(rng, Question::YesNo).map(|(asked, told)| item(&shown, &asked, &told))
            }
            Task::SecondTurn => Some(second_turn(&scene, &thing.name)),
            Task::EasyVqa | Task::Invented => None,
        });
    }
    Ok(items)
}

fn item(scene: &Scene, question: &str, right: &str) -> Item {
    Item { prompt: dialogue(&scene.jpeg, question), right: right.to_owned(), options: Vec::new() }
}

/// Which of four it is.
fn which(maker: &Maker, rng: &mut ChaCha8Rng, thing: &Thing, scene: &Scene) -> Item {
    let (asked, options) = choice(maker, rng, thing);
    let options = options.iter().map(|option| format!(" {}", sentence(&option.name))).collect();
    Item { options, ..item(scene, &asked, &thing.name) }
}

fn count(rng: &mut ChaCha8Rng, thing: &Thing) -> Result<Item> {
    let count = rng.random_range(1..=6);
    let placed: Vec<_> =
        Place::several(rng, count).into_iter().map(|place| (&thing.pictures[0], place)).collect();
    let scene = compose(rng, &placed, Variation::None)?;
    Ok(item(&scene, "How many things are in the picture?", NUMBERS[count]))
}

/// The name again, behind a first question that the picture answers.
fn second_turn(scene: &Scene, name: &str) -> Item {
    let first = format!(
        "How many things are in the picture?{END}\nAssistant: One.{END}\nUser: What is this?{END}\nAssistant:"
    );
    let prompt = vec![Segment::text("User:"), image(&scene.jpeg), Segment::text(first)];
    Item { prompt, right: name.to_owned(), options: Vec::new() }
}

fn easy_vqa(folders: &Folders) -> Result<Vec<Item>> {
    let maker = Maker::open(folders, Part::Evaluation)?;
    let mut items = Vec::new();
    for shape in maker.shapes() {
        for (asked, told) in &shape.questions {
            let mut asked = asked.clone();
            asked[..1].make_ascii_uppercase();
            items.push(Item {
                prompt: dialogue(&shape.png, &asked),
                right: told.clone(),
                options: Vec::new(),
            });
        }
    }
    Ok(items)
}

/// Four examples of two things that were never learnt, with names that were never seen, then one of the two in
/// another design or at another place.
fn invented(folders: &Folders) -> Result<Vec<Item>> {
    let maker = Maker::open(folders, Part::HeldOut)?;
    let mut items = Vec::new();
    for number in 0..400 {
        let mut rng = ChaCha8Rng::seed_from_u64(9000 + number);
        let rng = &mut rng;
        let first = maker.things.all.choose(rng).context("no held-out things")?;
        let second = maker.other(rng, &[first]);
        let names = [invented_name(rng), invented_name(rng)];
        if names[0] == names[1] {
            continue;
        }
        let things = [first, second];
        let mut order = [0, 1, 0, 1];
        rand::seq::SliceRandom::shuffle(&mut order[..], rng);
        let asked = rng.random_range(0..2);
        let mut prompt = Prompt::new();
        for which in order.into_iter().chain([asked]) {
            let scene = Maker::alone(rng, things[which], Variation::Strong)?;
            let text = Segment::text(format!("This is {}.\n", with_article(&names[which])));
            prompt.extend([image(&scene.jpeg), text]);
        }
        prompt.pop();
        prompt.push(Segment::text("This is"));
        let options = names.iter().map(|name| format!(" {}.", with_article(name))).collect();
        items.push(Item { prompt, right: names[asked].clone(), options });
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of the sample that the model has to know, of 64.
    const FLOOR: usize = 31;

    /// The model that ships, on pictures of a design that it never learnt from.
    #[test]
    fn the_default_model_names_what_is_in_the_picture() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let judge = Judge::open(&root.join("models/idefics-tiny")).unwrap();
        let mut items = sample::read(&root.join("fixtures/naming")).unwrap();
        assert_eq!(items.len(), 64);
        let names = judge.measure(Task::Name, Answer::Free, &items, 0).unwrap();
        eprintln!("{} of {} names are right ({} to {} %)", names.right, names.of, names.low, names.high);
        assert!(names.right >= FLOOR, "{} of {} names are right, below {FLOOR}", names.right, names.of);

        // The same questions about other pictures: what is left is what can be guessed.
        let mut pictures: Vec<Segment> = items.iter().map(|item| item.prompt[1].clone()).collect();
        pictures.rotate_left(1);
        for (item, picture) in items.iter_mut().zip(pictures) {
            item.prompt[1] = picture;
        }
        let replaced = judge.measure(Task::Name, Answer::Free, &items, 0).unwrap();
        eprintln!("{} of {} about other pictures", replaced.right, replaced.of);
        assert!(
            replaced.right * 4 < names.right,
            "{} of {} names are right, and {} where the picture is another one",
            names.right,
            names.of,
            replaced.right
        );
    }

    #[test]
    fn samples_are_spread_evenly() {
        let items = |count: usize| -> Vec<Item> {
            let item = |n: usize| Item { prompt: Prompt::new(), right: n.to_string(), options: Vec::new() };
            (0..count).map(item).collect()
        };
        let chosen: Vec<String> = spread(items(10), 4).into_iter().map(|item| item.right).collect();
        assert_eq!(chosen, ["2", "4", "7", "9"]);
        assert_eq!(spread(items(3), 4).len(), 3);
    }

    #[test]
    fn answers_are_compared_without_their_dress() {
        let check = |text: &str, expected: &str| assert_eq!(normalise(text), expected);
        check(" A red apple.", "red apple");
        check("No, it is a dog.", "no");
        check("It is a dog, so no.", "no");
        check(" It is a dog, so yes.<end_of_utterance>", "yes");
        check("Yes.", "yes");
        check("No entry.", "no entry");
        check(" An ant\nUser:", "ant");
        check("Antenna.", "antenna");
    }

    #[test]
    fn intervals_are_those_of_wilson() {
        // Newcombe 1998, table I: 81 of 263.
        let figure = Figure::new(Task::Name, Answer::Free, 81, 263);
        assert_eq!((figure.low, figure.high), (25.5, 36.6));
        let none = Figure::new(Task::Name, Answer::Free, 0, 20);
        assert_eq!((none.low, none.high), (0.0, 16.1));
    }
}
