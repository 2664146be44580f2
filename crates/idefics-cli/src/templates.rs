//! The prompts of the tasks, in the form that base models and the one that instruct models were trained for.
//!
//! Base: the task guide of transformers for IDEFICS. Instruct: the dialogue of the model card. A checkpoint is an
//! instruct one if its vocabulary has `<end_of_utterance>`. Base models go on writing after an answer, so each
//! task has texts that end it.

use idefics::{
    Prompt, Segment,
    dialogue::Form,
    generate::GenerationConfig,
    processor::{END_OF_UTTERANCE, ImageSource},
};

/// What is asked about a picture.
pub(crate) enum Task<'a> {
    Caption,
    Answer { question: &'a str },
    Classify { labels: &'a [String] },
}

impl Task<'_> {
    /// The prompt for one picture.
    pub(crate) fn prompt(&self, form: Form, image: ImageSource) -> Prompt {
        let (before, after) = match (form, self) {
            (Form::Base, Self::Caption) => (String::new(), "This is an image of".to_owned()),
            (Form::Base, Self::Answer { question }) => (
                "Instruction: Provide an answer to the question. Use the image to answer.\n".to_owned(),
                format!("Question: {question} Answer:"),
            ),
            (Form::Base, Self::Classify { labels }) => {
                (format!("Instruction: {}\n", choice(labels)), "Category:".to_owned())
            }
            (Form::Instruct, Self::Caption) => turn("Describe the image briefly.", ""),
            (Form::Instruct, Self::Answer { question }) => turn(question, ""),
            (Form::Instruct, Self::Classify { labels }) => turn(&choice(labels), " Category:"),
        };
        let mut prompt = Prompt::new();
        if !before.is_empty() {
            prompt.push(Segment::Text(before));
        }
        prompt.push(Segment::Image(image));
        prompt.push(Segment::Text(after));
        prompt
    }

    /// The options of the task, on top of the checkpoint's.
    pub(crate) fn generation(&self, form: Form, base: GenerationConfig) -> GenerationConfig {
        let stops: &[&str] = match form {
            Form::Base => &["\n", "Question:", "Instruction:", "Caption:", "User:", "Image:"],
            Form::Instruct => &["\nUser:"],
        };
        GenerationConfig {
            max_new_tokens: Some(if matches!(self, Self::Caption) { 40 } else { 100 }),
            max_length: None,
            stop_strings: stops.iter().map(ToString::to_string).collect(),
            trim_stop_strings: true,
            ..base
        }
    }
}

/// A turn of the user with a picture and the start of the assistant's.
fn turn(words: &str, answer: &str) -> (String, String) {
    ("User:".to_owned(), format!("{words}{END_OF_UTTERANCE}\nAssistant:{answer}"))
}

fn choice(labels: &[String]) -> String {
    let labels = labels.join(", ");
    format!("Classify the following image into a single category from the following list: {labels}.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_read_as_published() {
        let labels = ["cat".to_owned(), "dog".to_owned()];
        let classify = Task::Classify { labels: &labels };
        let answer = Task::Answer { question: "Who?" };
        let rows = [
            (Form::Base, &Task::Caption, "@This is an image of"),
            (
                Form::Base,
                &answer,
                "Instruction: Provide an answer to the question. Use the image to answer.\n@Question: Who? Answer:",
            ),
            (
                Form::Base,
                &classify,
                "Instruction: Classify the following image into a single category from the following list: cat, dog.\n@Category:",
            ),
            (Form::Instruct, &answer, "User:@Who?<end_of_utterance>\nAssistant:"),
            (
                Form::Instruct,
                &Task::Caption,
                "User:@Describe the image briefly.<end_of_utterance>\nAssistant:",
            ),
        ];
        for (form, task, expected) in rows {
            let prompt = task.prompt(form, ImageSource::Url("http://h/i".to_owned()));
            let segment = |segment: &Segment| match segment {
                Segment::Text(text) => text.clone(),
                Segment::Image(_) => "@".to_owned(),
            };
            assert_eq!(prompt.iter().map(segment).collect::<String>(), expected);
        }
    }
}
