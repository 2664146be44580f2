// A stand-in for `idefics serve`: the page's files and as much of the interface as the page uses. What it answers
// follows from the last message, so that a test can ask for any success and any failure.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { setTimeout as wait } from "node:timers/promises";

const STATIC = new URL("../../crates/idefics-server/static/", import.meta.url);
const TYPES = { html: "text/html; charset=utf-8", css: "text/css; charset=utf-8", js: "text/javascript; charset=utf-8" };
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; " +
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/** @param {{key?: string}} [options] */
export async function startStandIn({ key } = {}) {
  /** Bodies of the requests, for the tests. */
  const requests = [];
  const state = { requests, open: 0, ready: true, url: "", close: null, base: false };
  const server = createServer((request, response) => {
    handle(request, response, state, key).catch((error) => {
      response.destroy(error);
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  state.url = `http://127.0.0.1:${server.address().port}/`;
  state.close = () => {
    server.closeAllConnections();
    server.close();
  };
  return state;
}

async function handle(request, response, state, key) {
  const path = new URL(request.url, "http://x").pathname;
  if (request.method === "GET" && (path === "/" || /^\/(chat\/)?[a-z]+\.(js|css)$/.test(path))) {
    const name = path === "/" ? "index.html" : path.slice(1);
    const type = TYPES[name.split(".").at(-1)];
    response.writeHead(200, { "content-type": type, "content-security-policy": POLICY, "cache-control": "no-cache" });
    return response.end(await readFile(new URL(name, STATIC)));
  }
  if (!state.ready) return refuse(response, 503, "the model is being loaded");
  if (key && request.headers.authorization !== `Bearer ${key}`) return refuse(response, 401, "a valid API key is needed");
  if (path === "/v1/models") {
    const meta = { form: state.base ? "base" : "instruct", context_length: 2048, vocab_size: 32003, dtype: "bf16", max_images: 16 };
    return json(response, 200, { object: "list", data: [{ id: "idefics-9b-instruct", object: "model", created: 0, owned_by: "idefics", meta }] });
  }
  if (path === "/info") {
    return json(response, 200, { model_id: "idefics-9b-instruct", model_device_type: "cpu", max_total_tokens: 2048, router: "idefics-server", version: "0.1.0" });
  }
  if (path === "/v1/chat/completions" && request.method === "POST") return chat(request, response, state);
  return refuse(response, 404, "there is no such route");
}

async function chat(request, response, state) {
  let text = "";
  for await (const piece of request) text += piece;
  const body = JSON.parse(text);
  state.requests.push(body);
  const last = body.messages.findLast((message) => message.role === "user");
  const words = last.content.map((part) => (part.type === "text" ? part.text : "")).join(" ");
  if (/busy/.test(words)) return refuse(response, 429, "16 requests are waiting already.", { "retry-after": "7" });
  if (/too long/.test(words)) return refuse(response, 400, "`messages`: the prompt has 2391 tokens, and the model reads 2048.");
  if (/flaky/.test(words) && state.requests.filter((it) => JSON.stringify(it.messages) === JSON.stringify(body.messages)).length < 2) {
    return refuse(response, 500, "the model failed.");
  }
  state.open += 1;
  let isGone = false;
  response.on("close", () => {
    state.open -= 1;
    isGone = true;
  });
  response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-cache" });
  const base = { id: "chatcmpl-1", object: "chat.completion.chunk", created: 0, model: "idefics-9b-instruct" };
  const send = (more) => response.write(`data: ${JSON.stringify({ ...base, ...more })}\n\n`);
  const delta = (delta, finish_reason = null) => send({ choices: [{ index: 0, delta, finish_reason }], usage: null });
  delta({ role: "assistant", content: "" });
  // Nothing comes until the client leaves.
  if (/never/.test(words)) return;
  const pieces = answerTo(body, last, words);
  let sent = 0;
  for (const piece of pieces) {
    if (isGone) return;
    if (/slow/.test(words)) await wait(60);
    delta({ content: piece });
    sent += 1;
    // A comment keeps a connection open, and an event may come in pieces.
    if (sent === 2) response.write(": ping\n\n");
    if (/break/.test(words) && sent === 3) {
      response.write(`data: ${JSON.stringify({ error: { message: "the answer broke off.", type: "server_error", code: 500 } })}\n\n`);
      return response.end();
    }
    if (/lost/.test(words) && sent === 3) {
      // Not before what was written is on its way.
      await wait(100);
      return response.destroy();
    }
  }
  delta({}, /cut/.test(words) && body.messages.at(-1).role === "user" ? "length" : "stop");
  send({ choices: [], usage: { prompt_tokens: 30, completion_tokens: sent, total_tokens: 30 + sent, prompt_tokens_details: { cached_tokens: 12, image_tokens: 3 } } });
  response.write("data: [DONE]\n\n");
  response.end();
}

/** The pieces of an answer; by default it says what was seen, in its order. */
function answerTo(body, last, words) {
  const split = (text) => text.match(/\s*\S+/g);
  if (/slow/.test(words)) return Array.from({ length: 200 }, (_, index) => ` word${index + 1}`);
  if (/empty/.test(words)) return [];
  if (body.messages.at(-1).role === "assistant" && /word/.test(words)) return ["dle", "  ends. "];
  if (body.messages.at(-1).role === "assistant") return [" and", " the", " rest."];
  if (/say: /.test(words)) return split(` ${words.split("say: ")[1]}`);
  const seen = last.content.map((part) => (part.type === "text" ? `“${part.text}”` : `[${part.image_url.url.slice(5, 15)}]`));
  return split(` I see ${seen.join(" ")} in turn ${body.messages.filter((message) => message.role === "user").length}.`);
}

function refuse(response, status, message, headers = {}) {
  json(response, status, { error: { message, type: "error", param: null, code: null } }, headers);
}

function json(response, status, body, headers = {}) {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify(body));
}
