//! `OpenAI`'s dialect: shapes, streams, options, refusals.

use std::ops::ControlFlow;

use idefics::{
    Processor, Segment,
    dialogue::{DIALOGUE_END_OF_UTTERANCE, Form, Role, Turn, dialogue},
    generate::{GenerationConfig, generate},
    processor::{ImageSource, ProcessOptions},
};
use idefics_testing::fixture;
use serde_json::{Value, json};

use crate::testing::{MODEL, Reply, TestServer, picture};

const CHAT: &str = "/v1/chat/completions";

fn question(words: &str) -> Value {
    json!([{"role": "user", "content": words}])
}

fn with_picture(name: &str) -> Value {
    json!([{"role": "user", "content": [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": picture(name), "detail": "auto"}},
    ]}])
}

/// What the library answers to turns, without a server or its engine.
fn by_the_library(turns: &[Turn], max_new_tokens: usize) -> String {
    let directory = fixture("tiny");
    let processor = Processor::from_pretrained(&directory).unwrap();
    let model = idefics::Idefics::from_pretrained(&directory, &idefics::LoadOptions::default()).unwrap();
    let options = ProcessOptions { add_end_of_utterance: DIALOGUE_END_OF_UTTERANCE, ..Default::default() };
    let inputs = processor.process(&[dialogue(Form::Instruct, turns)], &options).unwrap();
    let config = GenerationConfig {
        max_new_tokens: Some(max_new_tokens),
        top_k: 0,
        stop_strings: vec!["\nUser:".to_owned()],
        trim_stop_strings: true,
        ..model.default_generation(Some(processor.special_tokens())).unwrap()
    };
    let answers =
        generate(&model, Some(&processor), &inputs, &config, |_| ControlFlow::Continue(())).unwrap();
    answers[0].sequences[0].text.as_deref().unwrap().trim_start().to_owned()
}

/// The text of a stream, its roles and its finish reasons.
fn joined(chunks: &[Value], index: usize) -> (String, usize, Vec<String>) {
    let choices: Vec<&Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().unwrap())
        .filter(|choice| choice["index"] == index)
        .collect();
    let text = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    let roles = choices.iter().filter(|choice| choice["delta"].get("role").is_some()).count();
    let reasons =
        choices.iter().filter_map(|choice| choice["finish_reason"].as_str()).map(str::to_owned).collect();
    (text, roles, reasons)
}

#[tokio::test]
async fn answers_are_the_librarys() {
    let server = TestServer::new();
    let reply =
        server.post(CHAT, &json!({"model": MODEL, "messages": question("Hello"), "max_tokens": 12})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let answer = reply.json();
    let expected = by_the_library(&[Turn::text(Role::User, "Hello")], 12);
    assert_eq!(
        answer["choices"][0]["message"],
        json!({"role": "assistant", "content": expected, "refusal": null})
    );
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], MODEL);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 12);
    assert_eq!(usage["prompt_tokens"].as_u64().unwrap() + 12, usage["total_tokens"].as_u64().unwrap());
}

#[tokio::test]
async fn pictures_and_words_keep_their_order() {
    let server = TestServer::new();
    let path = |name: &str| Segment::Image(ImageSource::Path(fixture(&format!("processor/{name}"))));
    let (a, b) = ("444.jpg", "420.jpg");
    let turns = [
        Turn::text(Role::System, "Be brief."),
        Turn { role: Role::User, content: vec![path(a), Segment::text("and"), path(b), Segment::text("?")] },
        Turn::text(Role::Assistant, "Two."),
        Turn { role: Role::User, content: vec![Segment::text("Again"), path(a)] },
    ];
    let messages = json!([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": picture(a)}},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": picture(b)},
            {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [
            {"type": "text", "text": "Again"}, {"type": "image_url", "image_url": {"url": picture(a)}}]},
    ]);
    let reply = server.post(CHAT, &json!({"messages": messages, "max_tokens": 8})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let answer = reply.json();
    assert_eq!(answer["choices"][0]["message"]["content"], by_the_library(&turns, 8));
    // Each picture, and one token around it on either side.
    assert_eq!(answer["usage"]["prompt_tokens_details"]["image_tokens"], 9);
}

#[tokio::test]
async fn a_stream_joined_is_the_answer() {
    let server = TestServer::new();
    for logprobs in [false, true] {
        let mut request =
            json!({"messages": with_picture("444.jpg"), "max_tokens": 10, "logprobs": logprobs});
        let whole = server.post(CHAT, &request).await.json();
        request["stream"] = json!(true);
        request["stream_options"] = json!({"include_usage": true});
        let reply = server.post(CHAT, &request).await;
        assert_eq!(reply.headers["content-type"], "text/event-stream");
        assert_eq!(reply.headers["cache-control"], "no-cache");
        let mut chunks = reply.chunks();
        let last = chunks.pop().unwrap();
        assert_eq!(last["choices"], json!([]));
        for counted in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(last["usage"][counted], whole["usage"][counted], "{counted}");
        }
        assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        for chunk in &chunks {
            assert_eq!(chunk["id"], chunks[0]["id"]);
            assert_eq!(chunk["object"], "chat.completion.chunk");
            assert_eq!(chunk["usage"], Value::Null);
        }
        let (text, roles, reasons) = joined(&chunks, 0);
        assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());
        assert_eq!((roles, reasons), (1, vec!["length".to_owned()]));
        let streamed: Vec<&Value> = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
            .flatten()
            .collect();
        let all = whole["choices"][0]["logprobs"]["content"].as_array();
        assert_eq!(streamed.len(), if logprobs { 10 } else { 0 });
        assert_eq!(all.map_or(Vec::new(), |all| all.iter().collect()), streamed);
    }
}

#[tokio::test]
async fn an_answer_that_goes_on_keeps_its_space() {
    let server = TestServer::new();
    // A word of its own, by which every answer begins.
    let tokens = server.post("/tokenize", &json!({"inputs": "see see"})).await.json();
    let mut tokens = tokens.as_array().unwrap().iter();
    let word = tokens.rfind(|token| token["text"].as_str().unwrap().starts_with(' ')).unwrap().clone();
    for (open, has_space) in [
        (Some("I see a"), true),
        (Some("I see a "), false),
        (Some(" "), false),
        (Some(""), false),
        (None, false),
    ] {
        let mut messages = question("Hello");
        if let Some(words) = open {
            messages.as_array_mut().unwrap().push(json!({"role": "assistant", "content": words}));
        }
        let bias = json!({word["id"].to_string(): 100});
        let mut request = json!({"messages": messages, "max_tokens": 2, "logit_bias": bias});
        let whole = server.post(CHAT, &request).await.json();
        let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
        assert_eq!(text.starts_with(' '), has_space, "{open:?}: {text:?}");
        request["stream"] = json!(true);
        let chunks = server.post(CHAT, &request).await.chunks();
        assert_eq!(joined(&chunks, 0).0, text, "{open:?}");
    }
}

#[tokio::test]
async fn several_answers_differ_by_seed_and_repeat() {
    let server = TestServer::new();
    let request = json!({"messages": question("Hi"), "max_tokens": 8, "n": 3, "temperature": 1.5, "seed": 7});
    let texts = |reply: &Reply| -> Vec<String> {
        let answer = reply.json();
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.iter().map(|it| it["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
        choices.iter().map(|it| it["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let first = texts(&server.post(CHAT, &request).await);
    assert!(first[0] != first[1] || first[1] != first[2], "{first:?}");
    assert_eq!(first, texts(&server.post(CHAT, &request).await));
    let mut streamed = request.clone();
    streamed["stream"] = json!(true);
    let chunks = server.post(CHAT, &streamed).await.chunks();
    for (index, text) in first.iter().enumerate() {
        let (joined, roles, reasons) = joined(&chunks, index);
        assert_eq!((&joined, roles, reasons.len()), (text, 1, 1));
    }
    // Greedy search has one answer, which is every answer.
    let greedy = json!({"messages": question("Hi"), "max_tokens": 8, "n": 3, "temperature": 0});
    let texts = texts(&server.post(CHAT, &greedy).await);
    assert!(texts[0] == texts[1] && texts[1] == texts[2]);
    let mut streamed = greedy;
    streamed["stream"] = json!(true);
    let chunks = server.post(CHAT, &streamed).await.chunks();
    assert_eq!(joined(&chunks, 2).0, texts[2]);
}

#[tokio::test]
async fn a_stop_string_ends_an_answer_and_is_not_in_it() {
    let server = TestServer::new();
    let ask = |more: Value| {
        let mut request = json!({"messages": question("Hello"), "max_tokens": 20});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    };
    let whole = server.post(CHAT, &ask(json!({}))).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(2).collect();
    let expected = &text[..text.find(&stop).unwrap()];
    for stop in [json!(stop), json!(["never there", stop])] {
        let reply = server.post(CHAT, &ask(json!({"stop": stop}))).await.json();
        assert_eq!(reply["choices"][0]["message"]["content"], expected);
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        let streamed = server.post(CHAT, &ask(json!({"stop": stop, "stream": true}))).await.chunks();
        let (joined, _, reasons) = joined(&streamed, 0);
        assert_eq!((joined.as_str(), reasons), (expected, vec!["stop".to_owned()]));
    }
}

#[tokio::test]
async fn log_probabilities_have_tokens_bytes_and_rivals() {
    let server = TestServer::new();
    let request =
        json!({"messages": question("Hello"), "max_tokens": 5, "logprobs": true, "top_logprobs": 3});
    let answer = server.post(CHAT, &request).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 5);
    for token in &content {
        let bytes: Vec<u8> = serde_json::from_value(token["bytes"].clone()).unwrap();
        assert_eq!(token["token"], String::from_utf8_lossy(&bytes).into_owned());
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[tokio::test]
async fn a_bias_rules_tokens_out_and_in() {
    let server = TestServer::new();
    let plain = json!({"messages": question("Hello"), "max_tokens": 6, "logprobs": true});
    let tokens = |reply: &Reply| -> Vec<Value> {
        let answer = reply.json();
        let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
        content.iter().map(|token| token["token"].clone()).collect()
    };
    let mut banned = plain.clone();
    let biases: serde_json::Map<String, Value> = (3..440).map(|id| (id.to_string(), json!(-100))).collect();
    banned["logit_bias"] = Value::Object(biases);
    let before = tokens(&server.post(CHAT, &plain).await);
    let after = tokens(&server.post(CHAT, &banned).await);
    assert!(after.iter().all(|token| !before.contains(token)), "{before:?} {after:?}");
    let mut favoured = plain;
    favoured["logit_bias"] = json!({"100": 100});
    let favoured = tokens(&server.post(CHAT, &favoured).await);
    assert!(favoured.windows(2).all(|pair| pair[0] == pair[1]), "{favoured:?}");
}

#[tokio::test]
async fn answers_keep_to_a_schema() {
    let server = TestServer::new();
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["ok"],
        "properties": {"ok": {"type": "boolean"}}});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
    let request = json!({"messages": question("Hello"), "max_tokens": 40, "temperature": 1, "n": 4, "seed": 1,
        "response_format": format});
    let answer = server.post(CHAT, &request).await.json();
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let content: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(content["ok"].is_boolean() && content.as_object().unwrap().len() == 1, "{content}");
    }
    let request = json!({"prompt": "Hi", "response_format": format, "max_tokens": 40});
    let answer = server.post("/v1/completions", &request).await.json();
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(text).unwrap()["ok"].is_boolean(), "{text}");
}

#[tokio::test]
async fn unknown_fields_and_harmless_values_pass() {
    let server = TestServer::new();
    let request = json!({"model": "other-name", "messages": question("Hi"), "max_completion_tokens": 2.0,
        "max_tokens": 99, "tools": [], "tool_choice": "none", "functions": null, "user": "u", "metadata": {"a": 1},
        "response_format": {"type": "text"}, "parallel_tool_calls": true, "modalities": ["text"], "stop": null,
        "logit_bias": {}, "presence_penalty": 0.5, "frequency_penalty": -0.5, "top_p": 1, "seed": -3,
        "reasoning_effort": "low", "store": false});
    let reply = server.post(CHAT, &request).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.json()["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn every_number_is_bounded_and_every_refusal_names_its_field() {
    let server = TestServer::new();
    let part = |part: Value| json!([{"role": "user", "content": [part]}]);
    let rows = [
        (json!({"temperature": 2.5}), 400, "temperature"),
        (json!({"temperature": -1}), 400, "temperature"),
        (json!({"temperature": "hot"}), 400, "temperature"),
        (json!({"top_p": 1.5}), 400, "top_p"),
        (json!({"n": 0}), 400, "n"),
        (json!({"n": 1_000_000_000}), 400, "n"),
        (json!({"n": 1.5}), 400, "n"),
        (json!({"max_tokens": 0}), 400, "max_tokens"),
        (json!({"max_tokens": 1e18}), 400, "max_tokens"),
        (json!({"max_completion_tokens": -5}), 400, "max_completion_tokens"),
        (json!({"logprobs": true, "top_logprobs": 1_000_000}), 400, "top_logprobs"),
        (json!({"top_logprobs": 2}), 400, "top_logprobs"),
        (json!({"presence_penalty": 3}), 400, "presence_penalty"),
        (json!({"frequency_penalty": -3}), 400, "frequency_penalty"),
        (json!({"repetition_penalty": 0}), 400, "repetition_penalty"),
        (json!({"seed": 1.5}), 400, "seed"),
        (json!({"logit_bias": {"451": 1}}), 400, "logit_bias"),
        (json!({"logit_bias": {"secret": 1}}), 400, "logit_bias"),
        (json!({"logit_bias": {"1": 1000}}), 400, "logit_bias"),
        (json!({"stop": ""}), 400, "stop"),
        (json!({"stop": vec!["x"; 100]}), 400, "stop"),
        (json!({"min_tokens": 30}), 400, "min_tokens"),
        (json!({"top_k": -1}), 400, "top_k"),
        (json!({"min_p": 2}), 400, "min_p"),
        (json!({"tools": [{"type": "function"}]}), 400, "tools"),
        (json!({"response_format": {"type": "secret"}}), 400, "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), 400, "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}),
            400,
            "response_format",
        ),
        (json!({"modalities": ["audio"]}), 400, "modalities"),
        (json!({"messages": []}), 400, "messages"),
        (json!({"messages": [{"role": "secret", "content": "x"}]}), 400, "messages[0].role"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), 400, "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), 400, "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), 400, "messages[0].content"),
        (json!({"messages": part(json!({"type": "secret"}))}), 400, "messages[0].content[0].type"),
        (json!({"messages": part(json!({"type": "text"}))}), 400, "messages[0].content[0].text"),
        (
            json!({"messages": part(json!({"type": "image_url", "image_url": "file:///secret"}))}),
            400,
            "messages[0].content[0].image_url",
        ),
        (json!({"model": "secret"}), 404, "model"),
    ];
    for (change, status, param) in rows {
        let mut request = json!({"messages": question("secret"), "max_tokens": 20});
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let reply = server.post(CHAT, &request).await;
        assert_eq!(reply.status, status, "{change}: {}", reply.body);
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{change}: {error}");
        assert!(error["message"].as_str().unwrap().contains(param), "{error}");
        assert!(!reply.body.contains("secret"), "nothing of a request is repeated: {}", reply.body);
        assert!(error.get("code").is_some() && error["type"].is_string());
    }
}

#[tokio::test]
async fn bad_pictures_have_their_statuses() {
    let server = TestServer::new();
    let ask = |url: &str| {
        json!({"max_tokens": 1, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}]}]})
    };
    // A BMP that says it has 60000 by 60000 pixels.
    let bomb =
        "data:image/bmp;base64,Qk02AAAAAAAAADYAAAAoAAAAYOoAAGDqAAABABgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let rows = [
        ("data:image/png;base64,!!!!", 422, "invalid_image"),
        ("data:image/png;base64,", 422, "invalid_image"),
        ("data:text/html,<svg xmlns='x'/>", 415, "unsupported_image"),
        ("data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/2wBD", 422, "invalid_image"),
        (bomb, 413, "image_too_large"),
        ("http://127.0.0.1/x.png", 400, "remote_images_disabled"),
        ("https://example.com/x.png", 400, "remote_images_disabled"),
    ];
    for (url, status, code) in rows {
        let reply = server.post(CHAT, &ask(url)).await;
        assert_eq!(
            (reply.status, reply.json()["error"]["code"].as_str()),
            (status, Some(code)),
            "{url}: {}",
            reply.body
        );
    }
    let many: Vec<Value> =
        (0..17).map(|_| json!({"type": "image_url", "image_url": {"url": "data:,x"}})).collect();
    let reply = server.post(CHAT, &json!({"messages": [{"role": "user", "content": many}]})).await;
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (413, Some("too_many_images")));
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_refused_with_its_length() {
    let server = TestServer::new();
    let reply = server.post(CHAT, &json!({"messages": question(&"word ".repeat(500))})).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (400, Some("context_length_exceeded"))
    );
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("128 tokens"), "{}", reply.body);
}

#[tokio::test]
async fn words_that_never_fit_are_refused_before_they_are_made_tokens() {
    let server = TestServer::new();
    let words = "word ".repeat(100_000);
    for (path, request, status) in [
        (CHAT, json!({"messages": question(&words)}), 400),
        ("/v1/completions", json!({"prompt": words}), 400),
        ("/generate", json!({"inputs": words}), 422),
        ("/tokenize", json!({"inputs": words}), 422),
    ] {
        let reply = server.post(path, &request).await;
        assert_eq!(reply.status, status, "{path}: {}", reply.body);
        assert!(reply.body.contains(" bytes of words"), "{path}: {}", reply.body);
    }
    // What is cut to its end anyhow may be as long as it likes.
    let parameters = json!({"max_new_tokens": 2, "truncate": 9});
    let cut = json!({"inputs": "word ".repeat(2000), "parameters": parameters});
    let reply = server.post("/generate", &cut).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let tokens = server.post("/tokenize", &json!({"inputs": "word"})).await;
    assert_eq!(tokens.headers["content-type"], "application/json");
}

#[tokio::test]
async fn base_models_chat_in_plain_lines() {
    let server = TestServer::base();
    let reply = server.post(CHAT, &json!({"messages": question("Hello"), "max_tokens": 4})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(server.get("/v1/models").await.json()["data"][0]["meta"]["form"], "base");
}

#[tokio::test]
async fn completions_take_every_form_of_prompt() {
    let server = TestServer::new();
    let ask = async |more: Value| {
        let mut request = json!({"max_tokens": 4});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let reply = server.post("/v1/completions", &request).await;
        assert_eq!(reply.status, 200, "{more}: {}", reply.body);
        let answer = reply.json();
        assert_eq!(answer["object"], "text_completion");
        answer
    };
    let one = ask(json!({"prompt": "Hello"})).await;
    let text = one["choices"][0]["text"].as_str().unwrap();
    assert_eq!(one["usage"]["completion_tokens"], 4);
    let ids: Vec<u32> = {
        let tokens = server.post("/tokenize", &json!({"inputs": "Hello"})).await.json();
        tokens.as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap() as u32).collect()
    };
    assert_eq!(ask(json!({"prompt": ids})).await["choices"][0]["text"], text);
    let two = ask(json!({"prompt": ["Hello", "Other words"]})).await;
    assert_eq!(two["choices"][0]["text"], text);
    assert_eq!(two["choices"][1]["index"], 1);
    assert_eq!(two["usage"]["completion_tokens"], 8);
    assert_eq!(ask(json!({"prompt": [ids, [1, 5]]})).await["choices"][0]["text"], text);
    assert_eq!(
        ask(json!({"prompt": "Hello", "echo": true})).await["choices"][0]["text"],
        format!("Hello{text}")
    );
    let data = picture("444.jpg");
    let bare = data.split_once(',').unwrap().1;
    let form =
        |data: &str| json!({"prompt": {"prompt_string": "See<__media__>now", "multimodal_data": [data]}});
    let seen = ask(form(&data)).await;
    assert_eq!(seen["choices"][0]["text"], ask(form(bare)).await["choices"][0]["text"]);
    assert_eq!(seen["usage"]["prompt_tokens_details"]["image_tokens"], 3);
    let best = ask(json!({"prompt": "Hello", "temperature": 1, "seed": 1, "n": 2, "best_of": 6})).await;
    assert_eq!(best["choices"].as_array().unwrap().len(), 2);

    // The best of several is one of several draws, whether or not anything else shapes them.
    let plain = ask(json!({"prompt": "Hello", "max_tokens": 12})).await;
    let best = ask(json!({"prompt": "Hello", "max_tokens": 12, "seed": 1, "best_of": 6})).await;
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert!(best["choices"][0]["logprobs"].is_null());
    assert!(best["usage"]["completion_tokens"].as_u64() > Some(12), "more than one answer was written");
    let greedy = json!({"prompt": "Hello", "max_tokens": 12, "temperature": 0, "best_of": 6});
    assert_eq!(ask(greedy).await["choices"][0]["text"], plain["choices"][0]["text"]);

    for bad in
        [json!([]), json!(""), json!([451]), json!([["x", 1]]), json!(7), json!(null), json!(vec!["x"; 99])]
    {
        let reply = server.post("/v1/completions", &json!({"prompt": bad})).await;
        // No words are still `<s>`, from which something follows.
        let expected = if bad == json!("") { 200 } else { 400 };
        assert_eq!(reply.status, expected, "{bad}: {}", reply.body);
    }
}

#[tokio::test]
async fn completions_stream_all_prompts_at_once() {
    let server = TestServer::new();
    let request =
        json!({"prompt": ["Hello", "Other words"], "max_tokens": 5, "logprobs": 2, "n": 2, "seed": 7});
    let whole = server.post("/v1/completions", &request).await.json();
    let mut streamed = request;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let mut chunks = server.post("/v1/completions", &streamed).await.chunks();
    let usage = chunks.pop().unwrap()["usage"].clone();
    for counted in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage[counted], whole["usage"][counted], "{counted}");
    }
    for choice in whole["choices"].as_array().unwrap() {
        let parts: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|part| part["index"] == choice["index"])
            .collect();
        let text: String = parts.iter().map(|part| part["text"].as_str().unwrap()).collect();
        assert_eq!(choice["text"], text);
        let reasons: Vec<&Value> =
            parts.iter().map(|part| &part["finish_reason"]).filter(|reason| !reason.is_null()).collect();
        assert_eq!(reasons, [&choice["finish_reason"]]);
        let tokens: Vec<&Value> = parts.iter().filter_map(|part| part["logprobs"]["tokens"].get(0)).collect();
        assert_eq!(tokens, choice["logprobs"]["tokens"].as_array().unwrap().iter().collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let server = TestServer::new();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["object"], "model");
    assert_eq!(list["data"][0]["meta"]["context_length"], 128);
    assert_eq!(server.get("/v1/models/tiny").await.json(), list["data"][0]);
    let missing = server.get("/v1/models/gpt/4").await;
    assert_eq!((missing.status, missing.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
}

#[tokio::test]
async fn a_second_question_reads_neither_picture_nor_prompt_again() {
    let server = TestServer::new();
    let ask = async |messages: Value| {
        let reply = server.post(CHAT, &json!({"messages": messages, "max_tokens": 4})).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    };
    let mut messages = with_picture("444.jpg");
    let first = ask(messages.clone()).await;
    let (encoded, read) =
        (server.engine.stats().images_encoded, first["usage"]["prompt_tokens"].as_u64().unwrap());
    assert_eq!(encoded, 1);
    let turns = messages.as_array_mut().unwrap();
    turns.push(json!({"role": "assistant", "content": first["choices"][0]["message"]["content"]}));
    turns.push(json!({"role": "user", "content": "And?"}));
    let second = ask(messages).await;
    assert_eq!(server.engine.stats().images_encoded, encoded, "no vision or perceiver run");
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= read, "the {read} tokens of the first prompt were not read again: {cached}");
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.contains("idefics_engine_images_encoded_total 1.0\n"), "{metrics}");
    assert!(metrics.contains("idefics_cached_images_total 1\n"), "{metrics}");
}
