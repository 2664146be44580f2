//! What was said so far, and the prompt it makes.

use std::sync::Arc;

use idefics::{
    Prompt, Segment,
    dialogue::{Form, Role, Turn, dialogue},
};

use super::picture::Picture;

/// A piece of a message.
#[derive(Clone)]
pub(super) enum Part {
    Text(String),
    Picture(Arc<Picture>),
}

/// A message and the answer to it.
#[derive(Clone)]
pub(super) struct Exchange {
    pub(super) question: Vec<Part>,
    pub(super) answer: String,
}

#[derive(Clone, Default)]
pub(super) struct Conversation {
    /// Stands before the first message.
    pub(super) system: Option<String>,
    pub(super) exchanges: Vec<Exchange>,
}

impl Conversation {
    /// The prompt that asks for an answer to `question`, without the first `forgotten` exchanges.
    pub(super) fn prompt(&self, form: Form, forgotten: usize, question: &[Part]) -> Prompt {
        let mut turns = Vec::with_capacity(2 * self.exchanges.len() + 2);
        turns.extend(self.system.as_ref().map(|text| Turn::text(Role::System, text)));
        for exchange in &self.exchanges[forgotten..] {
            turns.push(user(&exchange.question));
            turns.push(Turn::text(Role::Assistant, &exchange.answer));
        }
        turns.push(user(question));
        dialogue(form, &turns)
    }

    pub(super) fn pictures(&self) -> usize {
        let questions = self.exchanges.iter().flat_map(|exchange| &exchange.question);
        questions.filter(|part| matches!(part, Part::Picture(_))).count()
    }
}

fn user(parts: &[Part]) -> Turn {
    let segment = |part: &Part| match part {
        Part::Text(text) => Segment::text(text),
        Part::Picture(picture) => picture.segment(),
    };
    Turn { role: Role::User, content: parts.iter().map(segment).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgotten_exchanges_are_left_out_and_the_system_text_stays() {
        let exchange = |question: &str, answer: &str| Exchange {
            question: vec![Part::Text(question.to_owned())],
            answer: answer.to_owned(),
        };
        let conversation = Conversation {
            system: Some("Be brief.".to_owned()),
            exchanges: vec![exchange("a", "b"), exchange("c", "d")],
        };
        let text = |forgotten| {
            let prompt = conversation.prompt(Form::Base, forgotten, &[Part::Text("e".to_owned())]);
            match prompt.as_slice() {
                [Segment::Text(text)] => text.clone(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(text(0), "Be brief.\nUser: a\nAssistant: b\nUser: c\nAssistant: d\nUser: e\nAssistant:");
        assert_eq!(text(1), "Be brief.\nUser: c\nAssistant: d\nUser: e\nAssistant:");
        assert_eq!(text(2), "Be brief.\nUser: e\nAssistant:");
    }
}
