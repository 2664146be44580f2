use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use super::*;

/// A server on the loopback address that answers every connection with `answer`; returns its `host:port`.
fn serve(answer: impl Fn(TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                request.push(byte[0]);
            }
            answer(stream);
        }
    });
    address
}

fn serve_text(text: impl Into<String>) -> String {
    let text = text.into();
    serve(move |mut stream| {
        let _ = stream.write_all(text.as_bytes());
    })
}

/// The loopback address and its random ports count as allowed, nothing else changes.
fn loopback_policy() -> FetchPolicy {
    FetchPolicy {
        allowed_addresses: vec!["127.0.0.1".parse().unwrap()],
        allow_any_port: true,
        timeout: Duration::from_secs(10),
        ..FetchPolicy::default()
    }
}

fn check_error(address: &str, policy: &FetchPolicy, expected: &str) {
    assert_eq!(fetch(address, policy).unwrap_err().to_string(), expected, "{address}");
}

#[test]
fn a_body_is_fetched() {
    let host = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    assert_eq!(fetch(&format!("http://{host}/a.png"), &loopback_policy()).unwrap(), b"hello");
    let chunked =
        serve_text("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
    assert_eq!(fetch(&format!("http://{chunked}/"), &loopback_policy()).unwrap(), b"abcde");
}

#[test]
fn addresses_that_are_not_public_are_refused_by_default() {
    let host = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    let port = host.rsplit_once(':').unwrap().1;
    let policy = FetchPolicy { allow_any_port: true, ..FetchPolicy::default() };
    // The last four are other spellings of 127.0.0.1 and of 169.254.169.254.
    let hosts = [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("10.0.0.1", "10.0.0.1"),
        ("[::1]", "[::1]"),
        ("[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
        ("[64:ff9b::7f00:1]", "[64:ff9b::7f00:1]"),
        ("0.0.0.0", "0.0.0.0"),
        ("0", "0.0.0.0"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("0xa9fea9fe", "169.254.169.254"),
    ];
    for (written, named) in hosts {
        let expected = format!("host `{named}` has an address that is not public");
        check_error(&format!("http://{written}:{port}/"), &policy, &expected);
    }
    let private = FetchPolicy { allow_private: true, ..policy };
    assert!(fetch(&format!("http://{host}/"), &private).is_ok(), "allowed on request");
}

#[test]
fn addresses_are_checked_before_anything_is_sent() {
    let policy = FetchPolicy::default();
    check_error("http://127.0.0.1:8080/", &policy, "port 8080 is refused (accepted: 80, 443)");
    check_error("https://h.example:22/", &policy, "port 22 is refused (accepted: 80, 443)");
    check_error("http://u:p@h.example/", &policy, "URL with credentials is refused");
    check_error("http://u@h.example/", &policy, "URL with credentials is refused");
    check_error("file:///etc/passwd", &policy, "scheme `file` is refused (accepted: http, https)");
    check_error("ftp://h.example/f", &policy, "scheme `ftp` is refused (accepted: http, https)");
    check_error("no address", &policy, "not a valid URL");
    check_error("http://", &policy, "not a valid URL");
    check_error("http://h.example/", &FetchPolicy::disabled(), "fetching remote images is disabled");
}

#[test]
fn every_redirect_is_checked() {
    let redirect_to = |target: &str| {
        let head = format!("HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n");
        format!("http://{}/", serve_text(head))
    };
    let policy = loopback_policy();
    let target = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(fetch(&redirect_to(&format!("http://{target}/x")), &policy).unwrap(), b"ok");

    let cases = [
        ("http://127.0.0.2/", "host `127.0.0.2` has an address that is not public"),
        ("http://169.254.169.254/latest", "host `169.254.169.254` has an address that is not public"),
        ("//10.1.2.3/x", "host `10.1.2.3` has an address that is not public"),
        ("file:///etc/passwd", "scheme `file` is refused (accepted: http, https)"),
        ("http://u:p@h.example/", "URL with credentials is refused"),
    ];
    for (target, expected) in cases {
        check_error(&redirect_to(target), &policy, expected);
    }
    let no_location = serve_text("HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n");
    check_error(
        &format!("http://{no_location}/"),
        &policy,
        "host `127.0.0.1` sent a redirect without a usable location",
    );
}

#[test]
fn redirects_are_counted() {
    let host = serve_text("HTTP/1.1 307 Again\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n");
    check_error(&format!("http://{host}/"), &loopback_policy(), "more than 3 redirects");
    let none = FetchPolicy { max_redirects: 0, ..loopback_policy() };
    check_error(&format!("http://{host}/"), &none, "more than 0 redirects");
}

#[test]
fn answers_other_than_success_are_errors_without_their_body() {
    for (status, words) in [(404, "Not Found"), (500, "secret of the database"), (304, "Not Modified")] {
        let host = serve_text(format!("HTTP/1.1 {status} {words}\r\nContent-Length: 6\r\n\r\nsecret"));
        check_error(
            &format!("http://{host}/"),
            &loopback_policy(),
            &format!("host `127.0.0.1` answered with status {status}"),
        );
    }
    let nonsense = serve_text("SSH-2.0-OpenSSH\r\n");
    check_error(&format!("http://{nonsense}/"), &loopback_policy(), "connection to `127.0.0.1` failed");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    check_error(&format!("http://{closed}/"), &loopback_policy(), "connection to `127.0.0.1` failed");
}

#[test]
fn bodies_are_cut_at_the_limit() {
    let policy = FetchPolicy { max_bytes: 10_000, ..loopback_policy() };
    let expected = "body has more than 10000 bytes, the limit";
    let announced = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n");
    check_error(&format!("http://{announced}/"), &policy, expected);
    let endless = serve(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
    });
    check_error(&format!("http://{endless}/"), &policy, expected);
    let exact = serve_text(format!("HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n{}", "x".repeat(10_000)));
    assert_eq!(fetch(&format!("http://{exact}/"), &policy).unwrap().len(), 10_000);
}

#[test]
fn slow_answers_run_out_of_time() {
    let policy = FetchPolicy { timeout: Duration::from_millis(400), ..loopback_policy() };
    let drip = serve(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n");
        while stream.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let silent = serve(|stream| {
        thread::sleep(Duration::from_secs(5));
        drop(stream);
    });
    for host in [drip, silent] {
        let started = Instant::now();
        check_error(&format!("http://{host}/"), &policy, "not finished within 0.4 seconds");
        assert!(started.elapsed() < Duration::from_secs(4));
    }
}

#[test]
fn a_body_cut_short_is_an_error() {
    let host = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello");
    check_error(&format!("http://{host}/"), &loopback_policy(), "connection to `127.0.0.1` failed");
}
