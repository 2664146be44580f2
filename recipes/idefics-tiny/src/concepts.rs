//! The things that pictures show, and what they are called.
//!
//! A concept is an icon of Noto's object categories. Designs name their icons alike or have aliases; the name in
//! words is the icon's, which follows Unicode's.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Noto's categories that hold things rather than people, faces and signs.
pub(crate) const CATEGORIES: [&str; 5] =
    ["Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places"];

const HELD_OUT: &str = include_str!("../held_out.txt");

/// One thing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Concept {
    /// Noto's name of the icon: the key of the concept, and the name of its pictures' files.
    pub(crate) key: String,
    /// In words.
    pub(crate) name: String,
    /// One of [`CATEGORIES`], or the folder of a piece of clip art.
    pub(crate) category: String,
    /// The designs that have a picture of it.
    pub(crate) designs: Vec<String>,
}

/// The keys of the concepts that no training pair may show.
pub(crate) fn held_out() -> BTreeSet<String> {
    let lines = HELD_OUT.lines().filter(|line| !line.starts_with('#'));
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// An icon's name in words.
pub(crate) fn words(key: &str) -> String {
    match key {
        "mans-shoe" => "man's shoe".to_owned(),
        "rescue-workers-helmet" => "rescue worker's helmet".to_owned(),
        "t-rex" => "T-rex".to_owned(),
        "yo-yo" => "yo-yo".to_owned(),
        "x-ray" => "X-ray".to_owned(),
        _ => key.replace("womans-", "woman's ").replace("oclock", "o'clock").replace('-', " "),
    }
}

/// The name with its article: "an apple", "scissors", "bread".
pub(crate) fn with_article(name: &str) -> String {
    match article(name) {
        Some(article) => format!("{article} {name}"),
        None => name.to_owned(),
    }
}

/// Nouns that are not counted.
const MASS: [&str; 44] = [
    "bacon",
    "beach with umbrella",
    "bread",
    "rice",
    "cooked rice",
    "curry rice",
    "spaghetti",
    "sushi",
    "honey",
    "salt",
    "butter",
    "ice",
    "soap",
    "fire",
    "fog",
    "rainbow",
    "lightning",
    "high voltage",
    "thread",
    "yarn",
    "wood",
    "confetti",
    "sake",
    "bubble tea",
    "garlic",
    "ginger root",
    "money",
    "american football",
    "lacrosse",
    "badminton",
    "ping pong",
    "jewelry",
    "oden",
    "dango",
    "mate",
    "popcorn",
    "dna",
    "herb",
    "broccoli",
    "fondue",
    "falafel",
    "seaweed",
    "coral",
    "water wave",
];

fn article(name: &str) -> Option<&'static str> {
    let last = name.rsplit(' ').next().unwrap_or(name);
    let plural = last.ends_with('s') && !["ss", "us", "is", "as", "os"].iter().any(|end| last.ends_with(end));
    let singular_in_s = ["bus", "trolleybus", "compass", "cactus", "octopus", "hibiscus"].contains(&last);
    if name == "sun" || name == "globe" || name.ends_with(" moon") && name != "moon" {
        return Some("the").filter(|_| name == "sun").or(Some("a"));
    }
    if (plural && !singular_in_s)
        || MASS.contains(&name)
        || name.ends_with("o'clock")
        || name.ends_with("-thirty")
    {
        return None;
    }
    let consonant_sound = ["uni", "eu", "one", "use"].iter().any(|start| name.starts_with(start));
    let vowel = name.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']) && !consonant_sound;
    Some(if vowel || name == "X-ray" { "an" } else { "a" })
}

/// The plural of a name that is counted.
pub(crate) fn plural(name: &str) -> String {
    const IRREGULAR: [(&str, &str); 12] = [
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("fish", "fish"),
        ("leaf", "leaves"),
        ("knife", "knives"),
        ("wolf", "wolves"),
        ("goose", "geese"),
        ("tooth", "teeth"),
        ("foot", "feet"),
        ("scarf", "scarves"),
        ("loaf", "loaves"),
        ("ox", "oxen"),
    ];
    let (head, last) = name.rsplit_once(' ').map_or(("", name), |(head, last)| (head, last));
    let last = if let Some((_, plural)) = IRREGULAR.iter().find(|(singular, _)| *singular == last) {
        (*plural).to_owned()
    } else if article(name).is_none() {
        last.to_owned()
    } else if ["s", "x", "z", "ch", "sh"].iter().any(|end| last.ends_with(end)) {
        format!("{last}es")
    } else if last.ends_with('y') && !["ay", "ey", "oy", "uy"].iter().any(|end| last.ends_with(end)) {
        format!("{}ies", &last[..last.len() - 1])
    } else {
        format!("{last}s")
    };
    if head.is_empty() { last } else { format!("{head} {last}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_concepts_at_least_are_held_out() {
        assert!(held_out().len() >= 60);
    }

    #[test]
    fn names_take_their_articles_and_plurals() {
        let check = |key: &str, with: &str, many: &str| {
            assert_eq!(with_article(&words(key)), with);
            assert_eq!(plural(&words(key)), many);
        };
        check("red-apple", "a red apple", "red apples");
        check("octopus", "an octopus", "octopuses");
        check("unicorn", "a unicorn", "unicorns");
        check("scissors", "scissors", "scissors");
        check("bread", "bread", "bread");
        check("mouse", "a mouse", "mice");
        check("butterfly", "a butterfly", "butterflies");
        check("womans-hat", "a woman's hat", "woman's hats");
        check("two-oclock", "two o'clock", "two o'clock");
    }
}
