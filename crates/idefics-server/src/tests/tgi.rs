//! The dialect of text-generation-inference.

use serde_json::{Value, json};

use crate::testing::{MODEL, TestServer, picture};

fn ask(inputs: &str, parameters: &Value) -> Value {
    json!({"inputs": inputs, "parameters": parameters})
}

#[tokio::test]
async fn generate_gives_text_and_details() {
    let server = TestServer::new();
    let inputs = format!("User:![]({})What is this?<end_of_utterance>\nAssistant:", picture("444.jpg"));
    let plain = server.post("/generate", &ask(&inputs, &json!({"max_new_tokens": 6}))).await;
    assert_eq!(plain.status, 200, "{}", plain.body);
    assert!(plain.json().get("details").is_none());
    let parameters = json!({"max_new_tokens": 6, "details": true, "top_n_tokens": 2, "do_sample": false,
        "temperature": null, "stop": [], "watermark": false, "grammar": null, "adapter_id": null, "seed": null});
    let detailed = server.post("/generate", &ask(&inputs, &parameters)).await.json();
    assert_eq!(detailed["generated_text"], plain.json()["generated_text"]);
    let details = &detailed["details"];
    assert_eq!(details["finish_reason"], "length");
    assert_eq!(details["generated_tokens"], 6);
    assert_eq!(details["prefill"], json!([]));
    assert_eq!(details["seed"], Value::Null);
    let tokens = details["tokens"].as_array().unwrap();
    assert_eq!((tokens.len(), details["top_tokens"].as_array().unwrap().len()), (6, 6));
    assert!(tokens[0]["logprob"].as_f64().unwrap() < 0.0 && tokens[0]["special"].is_boolean());
    // `POST /` answers a list, or a stream.
    let compat = server.post("/", &ask(&inputs, &json!({"max_new_tokens": 6}))).await.json();
    assert_eq!(compat, json!([plain.json()]));
}

#[tokio::test]
async fn a_stream_ends_with_the_whole_text() {
    let server = TestServer::new();
    let request = ask("Hello", &json!({"max_new_tokens": 7}));
    let whole = server.post("/generate", &request).await.json();
    let mut compat = request.clone();
    compat["stream"] = json!(true);
    for reply in [server.post("/generate_stream", &request).await, server.post("/", &compat).await] {
        let events: Vec<Value> =
            reply.events().iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        assert_eq!(events.len(), 7, "no [DONE] in this dialect");
        let text: String = events.iter().map(|event| event["token"]["text"].as_str().unwrap()).collect();
        assert_eq!(whole["generated_text"], text);
        let (last, others) = events.split_last().unwrap();
        assert!(others.iter().all(|it| it["generated_text"].is_null() && it["details"].is_null()));
        assert_eq!(last["generated_text"], text);
        assert_eq!(last["details"]["finish_reason"], "length");
        assert_eq!(last["details"]["generated_tokens"], 7);
        assert_eq!(
            events.iter().map(|it| it["index"].as_u64().unwrap()).collect::<Vec<_>>(),
            [1, 2, 3, 4, 5, 6, 7]
        );
    }
}

#[tokio::test]
async fn parameters_do_what_they_say() {
    let server = TestServer::new();
    let generate = async |parameters: Value| {
        let reply = server.post("/generate", &ask("Hello you", &parameters)).await;
        assert_eq!(reply.status, 200, "{parameters}: {}", reply.body);
        reply.json()
    };
    let text = generate(json!({"max_new_tokens": 12})).await["generated_text"].as_str().unwrap().to_owned();
    let full = generate(json!({"max_new_tokens": 12, "return_full_text": true})).await;
    assert_eq!(full["generated_text"], format!("Hello you{text}"));
    // The stop string is part of the answer here.
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(2).collect();
    let stopped = generate(json!({"max_new_tokens": 12, "stop": [stop], "details": true})).await;
    assert!(stopped["generated_text"].as_str().unwrap().contains(&stop));
    assert_eq!(stopped["details"]["finish_reason"], "stop_sequence");
    let drawn = json!({"max_new_tokens": 6, "do_sample": true, "seed": 5, "best_of": 3, "details": true});
    let best = generate(drawn.clone()).await;
    assert_eq!(best["details"]["seed"], 5);
    assert_eq!(best["details"]["best_of_sequences"].as_array().unwrap().len(), 2);
    assert_eq!(best, generate(drawn).await);
    let digits =
        generate(json!({"max_new_tokens": 9, "grammar": {"type": "regex", "value": "[0-9]{3}"}})).await;
    assert!(digits["generated_text"].as_str().unwrap().parse::<u32>().unwrap() < 1000, "{digits}");
    let truncated = generate(json!({"max_new_tokens": 3, "truncate": 2, "details": true})).await;
    assert_eq!(truncated["details"]["generated_tokens"], 3);
}

#[tokio::test]
async fn refusals_are_validation_errors_of_422() {
    let server = TestServer::new();
    for parameters in [
        json!({"temperature": 0}),
        json!({"top_p": 0}),
        json!({"top_k": 0}),
        json!({"max_new_tokens": 0}),
        json!({"max_new_tokens": 1e12}),
        json!({"best_of": 1000}),
        json!({"typical_p": 2}),
        json!({"repetition_penalty": -1}),
        json!({"frequency_penalty": 9}),
        json!({"truncate": 0}),
        json!({"stop": vec!["x"; 100]}),
        json!({"watermark": true}),
        json!({"grammar": {"type": "regex", "value": "(open"}}),
        json!({"grammar": {"type": "regex"}}),
        json!({"adapter_id": "x"}),
        json!({"decoder_input_details": true}),
        json!({"top_n_tokens": 1000}),
        json!({"seed": 0.5}),
        json!({"stop": "not a list"}),
    ] {
        let reply = server.post("/generate", &ask("Hi", &parameters)).await;
        assert_eq!(reply.status, 422, "{parameters}: {}", reply.body);
        let error = reply.json();
        assert_eq!(error["error_type"], "validation", "{error}");
        assert!(error["error"].as_str().unwrap().starts_with("Input validation error: "), "{error}");
    }
    let stream = server.post("/generate_stream", &ask("![](http://h/x.png)", &json!({}))).await;
    assert_eq!((stream.status, stream.json()["error_type"].as_str()), (422, Some("validation")));
}

#[tokio::test]
async fn info_and_tokens() {
    let server = TestServer::new();
    let info = server.get("/info").await.json();
    assert_eq!(info["model_id"], MODEL);
    assert_eq!(info["max_total_tokens"], 128);
    assert_eq!(info["max_input_tokens"], 127);
    for key in [
        "model_sha",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ] {
        assert!(info.get(key).is_some(), "{key}");
    }
    let tokens = server.post("/tokenize", &json!({"inputs": "Hello![](http://h/i)"})).await.json();
    let texts: Vec<&str> = tokens.as_array().unwrap().iter().map(|it| it["text"].as_str().unwrap()).collect();
    assert_eq!(texts[0], "<s>");
    let end = ["<fake_token_around_image>", "<image>", "<fake_token_around_image>"];
    assert_eq!(texts[texts.len() - 3..], end);
    assert_eq!((&tokens[0]["start"], &tokens[0]["stop"]), (&json!(0), &json!(3)));
}
