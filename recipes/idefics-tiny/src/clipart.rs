//! Openclipart: drawings with the titles and keywords that their authors gave them.

use std::path::Path;

use anyhow::Result;

use crate::{archive, fetch, steps::Folders};

/// Folders whose drawings show things.
const FOLDERS: [&str; 13] = [
    "animals",
    "buildings",
    "containers",
    "decorations",
    "education",
    "electronics",
    "food",
    "geography",
    "office",
    "plants",
    "recreation",
    "tools",
    "transportation",
];

/// A drawing and what its author says of it.
pub(crate) struct Drawing {
    pub(crate) folder: String,
    /// The file's name without its ending.
    pub(crate) stem: String,
    pub(crate) title: String,
    pub(crate) keywords: Vec<String>,
    pub(crate) svg: String,
}

/// All drawings of things that are marked as public domain and need no font.
pub(crate) fn drawings(folders: &Folders) -> Result<Vec<Drawing>> {
    let path = fetch::package("openclipart-svg")?.path(folders);
    let root = "usr/share/openclipart/svg/";
    let wanted = |name: &str| {
        let folder = name.strip_prefix(root).and_then(|rest| rest.split('/').next());
        Path::new(name).extension().is_some_and(|extension| extension == "svg")
            && folder.is_some_and(|folder| FOLDERS.contains(&folder))
    };
    let mut files: Vec<_> = archive::debian(&path, wanted)?.into_iter().collect();
    files.sort();
    Ok(files.into_iter().filter_map(|(name, bytes)| drawing(&name[root.len()..], bytes)).collect())
}

fn drawing(name: &str, bytes: Vec<u8>) -> Option<Drawing> {
    let svg = String::from_utf8(bytes).ok()?;
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(&svg, options).ok()?;
    let element = |tag: &str| document.descendants().find(|node| node.tag_name().name() == tag);
    // Fonts would make the picture depend on the machine.
    if element("text").is_some() || element("image").is_some() {
        return None;
    }
    let work = element("Work")?;
    let public = work.descendants().filter(|node| node.tag_name().name() == "license").any(|node| {
        node.attributes().any(|attribute| attribute.value().to_lowercase().contains("publicdomain"))
    });
    if !public {
        return None;
    }
    let text = |node: roxmltree::Node<'_, '_>| node.text().unwrap_or_default().trim().to_lowercase();
    let title = work.children().find(|node| node.tag_name().name() == "title").map(text).unwrap_or_default();
    let keywords = work.descendants().filter(|node| node.tag_name().name() == "li").map(text);
    let keywords = keywords.filter(|word| !word.is_empty()).collect();
    let folder = name.split('/').next().unwrap_or_default().to_owned();
    let stem = name.rsplit('/').next().unwrap_or_default().trim_end_matches(".svg").to_lowercase();
    Some(Drawing { folder, stem, title, keywords, svg })
}
