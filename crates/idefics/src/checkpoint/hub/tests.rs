//! Downloads from a small server on this machine that speaks the hub's part of HTTP.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use tempfile::TempDir;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const INDEX: &str = r#"{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}"#;

/// A request as the server saw it.
#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

/// What the server does with one file.
#[derive(Clone, Default)]
struct Served {
    content: Vec<u8>,
    /// Instead of the file's own; a stand-in for git's tag otherwise.
    etag: Option<String>,
    /// Close the connection after so many bytes of the body, this many times.
    cut: Option<(usize, usize)>,
    /// Send the bytes from another address, as the hub does with large files.
    redirect: Option<String>,
    /// Refuse the file.
    status: Option<u16>,
    /// Answer so many requests with status 503 first.
    busy: usize,
    /// Ignore `Range`.
    no_range: bool,
}

/// A hub with one model, `org/name`, on a port of this machine.
struct Server {
    address: String,
    files: Arc<Mutex<HashMap<String, Served>>>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(files: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            files: Arc::default(),
            requests: Arc::default(),
        };
        for (name, content) in files {
            server.serve(name, Served { content: content.as_bytes().to_vec(), ..Served::default() });
        }
        let (files, requests) = (Arc::clone(&server.files), Arc::clone(&server.requests));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(&stream, &files, &requests);
            }
        });
        server
    }

    fn serve(&self, name: &str, served: Served) {
        self.files.lock().unwrap().insert(name.to_owned(), served);
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    fn hub(&self, cache: &TempDir, variables: &[(&str, &str)]) -> Hub {
        let mut hub = Hub::from_variables(&|name| {
            let set = [("HF_HUB_CACHE", cache.path().to_str().unwrap()), ("HF_ENDPOINT", &self.address)];
            let found = variables.iter().chain(&set).find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
        .unwrap();
        hub.retry_pause = Duration::from_millis(1);
        hub
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: &TcpStream, files: &Mutex<HashMap<String, Served>>, requests: &Mutex<Vec<Request>>) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_lowercase(), value.to_owned()))
    });
    let request = Request { method, path, headers: headers.collect() };
    requests.lock().unwrap().push(request.clone());

    let mut files = files.lock().unwrap();
    let response = if request.path.starts_with("/api/models/org/name/revision/") {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let sha = if request.path.ends_with("/odd") { "../../evil" } else { COMMIT };
        let body = serde_json::json!({"sha": sha, "siblings": siblings}).to_string();
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
            .into_bytes()
    } else {
        let name = request.path.rsplit('/').next().unwrap().trim_end_matches("?signature=secret");
        let in_repository = request.path.starts_with(&format!("/org/name/resolve/{COMMIT}/"));
        match files.get_mut(name).filter(|_| in_repository || request.path.starts_with("/storage/")) {
            Some(served) => content_response(&request, served),
            None => status_line(404),
        }
    };
    let _ = stream.write_all(&response);
}

/// A stand-in for git's tag of a file.
fn etag_of(content: &[u8]) -> String {
    format!("etag-{}-{}", content.len(), content.iter().map(|&byte| u32::from(byte)).sum::<u32>())
}

fn status_line(status: u16) -> Vec<u8> {
    format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").into_bytes()
}

fn content_response(request: &Request, served: &mut Served) -> Vec<u8> {
    if let Some(status) = served.status {
        return status_line(status);
    }
    if served.busy > 0 {
        served.busy -= 1;
        return status_line(503);
    }
    let total = served.content.len();
    let etag = served.etag.clone().unwrap_or_else(|| etag_of(&served.content));
    if let Some(storage) = served.redirect.as_ref().filter(|_| !request.path.starts_with("/storage/")) {
        let name = request.path.rsplit('/').next().unwrap();
        return format!(
            "HTTP/1.1 302 Found\r\nlocation: {storage}/storage/{name}?signature=secret\r\nx-linked-etag: \"{etag}\"\r\n\
             x-linked-size: {total}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        .into_bytes();
    }
    let range = request.headers.get("range").filter(|_| !served.no_range);
    let from = range.map_or(0, |range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
    let status = if from > 0 { "206 Partial" } else { "200 OK" };
    let content_range = if from > 0 {
        format!("content-range: bytes {from}-{}/{total}\r\n", total - 1)
    } else {
        String::new()
    };
    let head = format!(
        "HTTP/1.1 {status}\r\netag: W/\"{etag}\"\r\ncontent-length: {}\r\n{content_range}connection: close\r\n\r\n",
        total - from
    );
    let mut response = head.into_bytes();
    if request.method != "HEAD" {
        let mut end = total;
        if let Some((bytes, times)) = &mut served.cut
            && *times > 0
        {
            *times -= 1;
            end = (from + *bytes).min(total);
        }
        response.extend_from_slice(&served.content[from..end]);
    }
    response
}

/// The files of a small sharded model, and some that nobody needs.
fn sharded() -> Vec<(&'static str, &'static str)> {
    vec![
        ("config.json", "{}"),
        ("tokenizer.json", "{\"tokens\": 1}"),
        ("generation_config.json", "{\"a\": 1}"),
        ("model.safetensors.index.json", INDEX),
        ("model-1.safetensors", "first shard"),
        ("model-2.safetensors", "second shard!!"),
        ("pytorch_model.bin", "pickle"),
        ("README.md", "words"),
        ("other.safetensors", "not named by the index"),
    ]
}

fn id(text: &str) -> ModelId {
    text.parse().unwrap()
}

/// What was reported, as one line an event.
#[derive(Default)]
struct Log(Vec<String>);

impl Progress for Log {
    fn start(&mut self, file: &str, done: u64, total: u64) {
        self.0.push(format!("start {file} {done}/{total}"));
    }
    fn advance(&mut self, bytes: u64) {
        self.0.push(format!("+{bytes}"));
    }
    fn finish(&mut self, file: &str) {
        self.0.push(format!("finish {file}"));
    }
}

#[test]
fn a_model_is_downloaded_once() {
    let server = Server::start(&sharded());
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(&cache, &[]);
    let snapshot = hub.resolve(&id("org/name"), &mut ()).unwrap();
    assert_eq!(snapshot, cache.path().join("models--org--name/snapshots").join(COMMIT));
    let mut files: Vec<_> =
        fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    let expected = [
        "config.json",
        "generation_config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(files, expected);
    assert_eq!(fs::read_to_string(snapshot.join("model-2.safetensors")).unwrap(), "second shard!!");
    let reference = fs::read_to_string(cache.path().join("models--org--name/refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.join("model-1.safetensors")).unwrap(),
        Path::new("../../blobs").join(etag_of(b"first shard"))
    );
    assert!(
        server
            .requests()
            .iter()
            .all(|request| !request.path.contains("bin") && !request.path.contains("other"))
    );

    assert_eq!(hub.resolve(&id("org/name"), &mut ()).unwrap(), snapshot);
    assert_eq!(server.requests().len(), 0, "the cache needs no request");
    // Asked expressly, the hub is asked for the revision, and the contents are all there.
    assert_eq!(hub.download(&id("org/name"), &mut ()).unwrap(), snapshot);
    assert!(
        server.requests().iter().all(|request| request.method == "HEAD" || request.path.starts_with("/api/"))
    );
    // A pinned commit cannot change.
    assert_eq!(hub.download(&id(&format!("org/name@{COMMIT}")), &mut ()).unwrap(), snapshot);
    assert_eq!(server.requests().len(), 0);
    let offline = server.hub(&cache, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.download(&id("org/name"), &mut ()).unwrap(), snapshot);
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn a_revision_is_asked_for_by_name() {
    let server =
        Server::start(&[("config.json", "{}"), ("tokenizer.model", "t"), ("model.safetensors", "w")]);
    let cache = tempfile::tempdir().unwrap();
    let snapshot = server.hub(&cache, &[]).resolve(&id("org/name@refs/pr/3"), &mut ()).unwrap();
    assert_eq!(fs::read_to_string(snapshot.join("model.safetensors")).unwrap(), "w");
    assert_eq!(server.requests()[0].path, "/api/models/org/name/revision/refs%2Fpr%2F3");
    assert_eq!(fs::read_to_string(cache.path().join("models--org--name/refs/refs/pr/3")).unwrap(), COMMIT);
    // Another revision is another question.
    let offline = server.hub(&cache, &[("HF_HUB_OFFLINE", "1")]);
    assert!(offline.resolve(&id("org/name@refs/pr/3"), &mut ()).is_ok());
    assert!(matches!(offline.resolve(&id("org/name"), &mut ()), Err(HubError::Offline { .. })));
}

#[test]
fn a_broken_connection_is_continued() {
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "{}")]);
    let content: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let served = Served { content: content.clone(), cut: Some((400, 2)), ..Served::default() };
    server.serve("model.safetensors", served);
    let cache = tempfile::tempdir().unwrap();
    let mut log = Log::default();
    let snapshot = server.hub(&cache, &[]).resolve(&id("org/name"), &mut log).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), content);
    let ranges: Vec<Option<String>> = server
        .requests()
        .iter()
        .filter(|request| request.method == "GET" && request.path.ends_with("model.safetensors"))
        .map(|request| request.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges, [None, Some("bytes=400-".to_owned()), Some("bytes=800-".to_owned())]);
    assert!(log.0.contains(&"start model.safetensors 800/1000".to_owned()), "{:?}", log.0);
    assert_eq!(log.0.last().unwrap(), "finish model.safetensors");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "{}")]);
    server.serve("model.safetensors", Served { content: vec![7; 50], busy: 4, ..Served::default() });
    let cache = tempfile::tempdir().unwrap();
    let snapshot = server.hub(&cache, &[]).resolve(&id("org/name"), &mut ()).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), [7; 50]);
    let of_weights = |request: &&Request| request.path.ends_with("model.safetensors");
    let methods: Vec<_> = server.requests().iter().filter(of_weights).map(|r| r.method.clone()).collect();
    assert_eq!(methods, ["HEAD", "HEAD", "HEAD", "HEAD", "HEAD", "GET"]);
}

#[test]
fn a_download_that_gave_up_is_continued_by_the_next() {
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "{}")]);
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(&cache, &[]);
    server
        .serve("model.safetensors", Served { content: vec![7; 50], cut: Some((0, 99)), ..Served::default() });
    let error = hub.resolve(&id("org/name"), &mut ()).unwrap_err();
    assert!(matches!(error, HubError::BrokeOff { attempts: 5, .. }), "{error}");

    let part = cache.path().join("models--org--name/blobs").join(etag_of(&[7; 50]) + ".incomplete");
    fs::write(&part, [7; 20]).unwrap();
    server.serve("model.safetensors", Served { content: vec![7; 50], ..Served::default() });
    server.requests();
    let snapshot = hub.resolve(&id("org/name"), &mut ()).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), [7; 50]);
    assert!(
        server
            .requests()
            .iter()
            .any(|request| request.headers.get("range").is_some_and(|r| r == "bytes=20-"))
    );
    assert!(!part.exists());
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "{}")]);
    let content: Vec<u8> = (0..100).collect();
    let served = Served { content: content.clone(), no_range: true, cut: Some((60, 1)), ..Served::default() };
    server.serve("model.safetensors", served);
    let cache = tempfile::tempdir().unwrap();
    let snapshot = server.hub(&cache, &[]).resolve(&id("org/name"), &mut ()).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), content);
}

#[test]
fn the_token_stays_with_the_hub() {
    let storage = Server::start(&[("model.safetensors", "w")]);
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "{}")]);
    let served =
        Served { content: b"w".to_vec(), redirect: Some(storage.address.clone()), ..Served::default() };
    server.serve("model.safetensors", served);
    let cache = tempfile::tempdir().unwrap();
    let snapshot = server.hub(&cache, &[("HF_TOKEN", " hf_x\n")]).resolve(&id("org/name"), &mut ()).unwrap();
    assert_eq!(fs::read_to_string(snapshot.join("model.safetensors")).unwrap(), "w");
    let asked = server.requests();
    assert!(asked.iter().all(|request| request.headers["authorization"] == "Bearer hf_x"), "{asked:?}");
    let stored = storage.requests();
    assert_eq!(stored.len(), 1);
    assert_eq!(stored[0].path, "/storage/model.safetensors?signature=secret");
    assert!(!stored[0].headers.contains_key("authorization"), "{stored:?}");
}

#[test]
fn the_digest_of_large_files_is_checked() {
    let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; // SHA-256 of "abc", FIPS 180-2
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "{}")]);
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(&cache, &[]);
    let serve = |content: &str| {
        let served = Served { content: content.into(), etag: Some(digest.to_owned()), ..Served::default() };
        server.serve("model.safetensors", served);
    };
    serve("abd");
    let error = hub.resolve(&id("org/name"), &mut ()).unwrap_err();
    assert!(matches!(&error, HubError::Damaged { expected, .. } if expected == digest), "{error}");
    serve("abc");
    hub.resolve(&id("org/name"), &mut ()).unwrap();
}

#[test]
fn refusals_say_what_to_do() {
    let model = [("config.json", "{}"), ("tokenizer.json", "{}"), ("model.safetensors", "w")];
    let refused = |spoil: &dyn Fn(&Server)| {
        let server = Server::start(&model);
        spoil(&server);
        let cache = tempfile::tempdir().unwrap();
        server.hub(&cache, &[]).resolve(&id("org/name"), &mut ()).unwrap_err().to_string()
    };
    let status = |status| Served { status: Some(status), ..Served::default() };
    let etag = |etag: &str| Served { etag: Some(etag.to_owned()), content: vec![1], ..Served::default() };
    let check = |spoil: &dyn Fn(&Server), expected: &str| {
        let message = refused(spoil);
        assert!(message.contains(expected), "\n  gave     {message}\n  expected {expected}");
    };
    check(
        &|server| server.serve("config.json", status(401)),
        "refuses `org/name@main` (401): if the model is gated",
    );
    check(&|server| server.serve("config.json", status(403)), "`HF_TOKEN`");
    check(
        &|server| server.serve("config.json", status(404)),
        "the hub has no `org/name@main/config.json` (404)",
    );
    check(&|server| server.serve("config.json", status(500)), "answered with status 500");
    check(&|server| server.serve("config.json", etag("../../x")), "not the hub's: an odd `etag`");
    check(&|server| drop(server.files.lock().unwrap().remove("config.json")), "has no `config.json`");
    check(
        &|server| drop(server.files.lock().unwrap().remove("model.safetensors")),
        "has no safetensors weights",
    );
    let elsewhere = Served { redirect: Some("file:///etc".to_owned()), ..Served::default() };
    check(&|server| server.serve("config.json", elsewhere.clone()), "a redirect to an insecure address");

    let server = Server::start(&model);
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(&cache, &[]);
    let error = hub.resolve(&id("org/other"), &mut ()).unwrap_err();
    assert_eq!(error.to_string(), "the hub has no `org/other@main` (404)");
    let error = hub.resolve(&id("org/name@odd"), &mut ()).unwrap_err();
    assert!(error.to_string().ends_with("`sha` is not a commit id"), "{error}");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hub = server.hub(&cache, &[("HF_ENDPOINT", &format!("http://{nobody}"))]);
    assert!(matches!(hub.resolve(&id("org/name"), &mut ()), Err(HubError::Transport { .. })));
}

#[test]
fn hostile_indices_fetch_nothing() {
    let mut files = sharded();
    files.retain(|(name, _)| *name != "model.safetensors.index.json");
    for (shard, expected) in [
        ("../../../x.safetensors", "model.safetensors.index.json"),
        ("absent.safetensors", "has no `absent.safetensors`"),
    ] {
        let index = format!("{{\"weight_map\": {{\"x\": \"{shard}\"}}}}");
        let server = Server::start(&files);
        server.serve(
            "model.safetensors.index.json",
            Served { content: index.into_bytes(), ..Served::default() },
        );
        let cache = tempfile::tempdir().unwrap();
        let error = server.hub(&cache, &[]).resolve(&id("org/name"), &mut ()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(server.requests().iter().all(|request| !request.path.ends_with(".safetensors")));
    }
}

#[test]
fn an_interrupted_snapshot_is_not_taken_for_whole() {
    let server = Server::start(&sharded());
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(&cache, &[]);
    let snapshot = hub.resolve(&id("org/name"), &mut ()).unwrap();
    fs::remove_file(snapshot.join("model-2.safetensors")).unwrap();
    let offline = server.hub(&cache, &[("HF_HUB_OFFLINE", "true")]);
    let error = offline.resolve(&id("org/name"), &mut ()).unwrap_err();
    assert!(error.to_string().contains("`HF_HUB_OFFLINE` forbids"), "{error}");
    hub.resolve(&id("org/name"), &mut ()).unwrap();
    assert!(snapshot.join("model-2.safetensors").exists());
}

#[test]
fn the_environment_is_read_like_the_python_client_does() {
    let from = |variables: &[(&str, &str)]| {
        let map: HashMap<String, String> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Hub::from_variables(&|name| map.get(name).cloned())
    };
    let cache = |variables: &[(&str, &str)]| from(variables).unwrap().cache;
    assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), Path::new("/h/hf/hub"));
    assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
    assert_eq!(cache(&[("HF_HOME", ""), ("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
    assert!(matches!(from(&[]), Err(HubError::NoCacheDirectory)));

    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "from-file\n").unwrap();
    let hf_home = ("HF_HOME", home.path().to_str().unwrap());
    assert_eq!(from(&[hf_home]).unwrap().token.as_deref(), Some("from-file"));
    assert_eq!(from(&[hf_home, ("HF_TOKEN", "own")]).unwrap().token.as_deref(), Some("own"));
    assert_eq!(from(&[("HF_HOME", "/none")]).unwrap().token, None);

    for (value, offline) in [("1", true), ("yes", true), ("ON", true), ("0", false), ("", false)] {
        assert_eq!(from(&[hf_home, ("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
    }
    assert_eq!(from(&[hf_home]).unwrap().endpoint.as_str(), "https://huggingface.co/");
    for endpoint in ["mirror.example", "file:///etc", "ftp://mirror.example"] {
        assert!(
            matches!(from(&[hf_home, ("HF_ENDPOINT", endpoint)]), Err(HubError::BadEndpoint { .. })),
            "{endpoint}"
        );
    }
}

#[test]
fn directories_come_before_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    assert_eq!(resolve(path, &mut ()).unwrap(), directory.path());
    for name in ["no-such-directory", "./org/name", "/org/name"] {
        let error = resolve(name, &mut ()).unwrap_err();
        assert!(error.to_string().contains("is neither a directory nor a model of the hub"), "{error}");
    }
}
