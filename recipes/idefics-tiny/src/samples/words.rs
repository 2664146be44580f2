//! Small words that all samples share.

use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::concepts::with_article;

/// "A dog.", "Scissors."
pub(crate) fn sentence(name: &str) -> String {
    capital(&format!("{}.", with_article(name)))
}

/// The same with a capital letter.
pub(crate) fn capital(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

/// One of several wordings.
pub(crate) fn pick<'a>(rng: &mut ChaCha8Rng, wordings: &[&'a str]) -> &'a str {
    wordings.choose(rng).copied().unwrap_or_default()
}

/// Zero to six.
pub(crate) const NUMBERS: [&str; 7] = ["zero", "one", "two", "three", "four", "five", "six"];

/// "is" or "are", by the name's article.
pub(crate) fn is(name: &str) -> &'static str {
    if with_article(name) == name && name.ends_with('s') { "are" } else { "is" }
}
