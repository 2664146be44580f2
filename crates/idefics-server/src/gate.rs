//! Who may come in: the host that is called for, the API key, a place among the requests.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderValue, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{
    body::{DISCARD_BYTES, DISCARD_BYTES_OF_STRANGERS, discard_request},
    error::{ApiError, Kind},
    options::ServerOptions,
    pages,
    state::App,
    trace::AnswerFigures,
};

/// The one route that is open to all: it says that the process lives, and nothing else.
const OPEN: &str = "/livez";

/// Checks host and key.
pub(crate) async fn gate(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path == OPEN {
        return next.run(request).await;
    }
    if !is_host_allowed(&app.options, &request) {
        discard_request(request, DISCARD_BYTES_OF_STRANGERS).await;
        let message = "this server does not answer by that host name; see its option for allowed hosts";
        return ApiError::new(Kind::Forbidden, message).code("host_not_allowed").into_response();
    }
    if !app.options.keys.allow(request.headers()) {
        // A browser asks its user for a key only where it shows a page.
        let challenge = if pages::is_page(path) { "Basic realm=\"idefics\"" } else { "Bearer" };
        let message = "expected an API key of this server as `Authorization: Bearer KEY`";
        let mut response = ApiError::new(Kind::Unauthorized, message).code("invalid_api_key").into_response();
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        discard_request(request, DISCARD_BYTES_OF_STRANGERS).await;
        return response;
    }
    next.run(request).await
}

/// Gives a request its place, before its body is read.
pub(crate) async fn place(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let figures = request.extensions().get::<Arc<AnswerFigures>>().cloned().unwrap_or_default();
    let place = match app.service().and_then(|_| app.place(figures)) {
        Ok(place) => place,
        Err(error) => {
            discard_request(request, DISCARD_BYTES).await;
            return error.into_response();
        }
    };
    request.extensions_mut().insert(Arc::new(place));
    next.run(request).await
}

/// The answer where there is no such route.
pub(crate) async fn no_route(request: Request) -> ApiError {
    discard_request(request, DISCARD_BYTES).await;
    ApiError::new(Kind::NotFound, "there is no such route")
}

/// The answer where a route has other methods.
pub(crate) async fn no_method(request: Request) -> ApiError {
    discard_request(request, DISCARD_BYTES).await;
    ApiError::new(Kind::MethodNotAllowed, "this route has other methods")
}

/// Whether the name that was called for is one of ours.
///
/// Any web page can have a name of its own point to 127.0.0.1 and then call it as its own origin ("DNS
/// rebinding"). It cannot make a browser call it by an address or by `localhost`, so these names are safe.
fn is_host_allowed(options: &ServerOptions, request: &Request) -> bool {
    let must_check = options.address.ip().is_loopback() || !options.allowed_hosts.is_empty();
    if !must_check {
        return true;
    }
    let named = request.headers().get(header::HOST).map(|value| value.to_str().unwrap_or("?"));
    // Without a name nobody was misled by one.
    let Some(named) = named.or(request.uri().host()) else { return true };
    let Ok(authority) = named.parse::<Authority>() else { return false };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    host.parse::<IpAddr>().is_ok()
        || host == "localhost"
        || host.ends_with(".localhost")
        || options.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(&host))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn foreign_names_are_refused_on_loopback() {
        let open = ServerOptions { address: ([0, 0, 0, 0], 80).into(), ..ServerOptions::default() };
        let named = ServerOptions { allowed_hosts: vec!["idefics.example".to_owned()], ..open.clone() };
        let loopback = ServerOptions::default();
        for (host, on_loopback, by_name) in [
            ("127.0.0.1:8080", true, true),
            ("[::1]:8080", true, true),
            ("localhost", true, true),
            ("LOCALHOST:1", true, true),
            ("idefics.example", false, true),
            ("Idefics.Example:443", false, true),
            ("evil.example", false, false),
            ("localhost.evil.example", false, false),
            ("127.0.0.1.evil.example", false, false),
            ("a b", false, false),
        ] {
            let request = Request::builder().header(header::HOST, host).body(Body::empty()).unwrap();
            assert!(is_host_allowed(&open, &request), "{host}");
            assert_eq!(is_host_allowed(&loopback, &request), on_loopback, "{host}");
            assert_eq!(is_host_allowed(&named, &request), by_name, "{host}");
        }
        assert!(is_host_allowed(&loopback, &Request::new(Body::empty())), "HTTP/1.0 names no host");
    }
}
