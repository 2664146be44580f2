//! The web chat and the page that shows the interface: static files inside the binary.
//!
//! The policy lets a page use this server and nothing else: no script, style, font or connection from elsewhere.

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
    connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, type and content.
const FILES: [(&str, &str, &str); 15] = [
    ("/", HTML, include_str!("../static/index.html")),
    ("/chat.css", CSS, include_str!("../static/chat.css")),
    ("/chat.js", SCRIPT, include_str!("../static/chat.js")),
    ("/chat/api.js", SCRIPT, include_str!("../static/chat/api.js")),
    ("/chat/composer.js", SCRIPT, include_str!("../static/chat/composer.js")),
    ("/chat/elements.js", SCRIPT, include_str!("../static/chat/elements.js")),
    ("/chat/pictures.js", SCRIPT, include_str!("../static/chat/pictures.js")),
    ("/chat/settings.js", SCRIPT, include_str!("../static/chat/settings.js")),
    ("/chat/sidebar.js", SCRIPT, include_str!("../static/chat/sidebar.js")),
    ("/chat/store.js", SCRIPT, include_str!("../static/chat/store.js")),
    ("/chat/thread.js", SCRIPT, include_str!("../static/chat/thread.js")),
    ("/chat/transcript.js", SCRIPT, include_str!("../static/chat/transcript.js")),
    ("/docs", HTML, include_str!("../static/docs.html")),
    ("/docs.css", CSS, include_str!("../static/docs.css")),
    ("/docs.js", SCRIPT, include_str!("../static/docs.js")),
];

/// Whether a path is one of these files.
pub(crate) fn is_page(path: &str) -> bool {
    FILES.iter().any(|(known, ..)| *known == path)
}

pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, &(path, content_type, content)| {
        router.route(path, get(async move || file(content_type, content)))
    })
}

fn file(content_type: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}
