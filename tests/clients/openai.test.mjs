// The JavaScript client of OpenAI.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer, request as httpRequest } from "node:http";
import { connect } from "node:net";
import OpenAI from "openai";

const { IDEFICS_URL: url, IDEFICS_NARROW_URL: narrowUrl, IDEFICS_KEY: apiKey, IDEFICS_PICTURE: file } = process.env;
// Nothing here takes long; what hangs is a failure.
setTimeout(() => {
  console.error("FAIL it takes too long");
  process.exit(1);
}, 240_000).unref();

const clientOf = (url, options = {}) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 60_000, ...options });
const client = clientOf(url);
const bytes = readFileSync(file);
const picture = `data:image/jpeg;base64,${bytes.toString("base64")}`;
const hello = [{ role: "user", content: "Hello" }];
const see = (...urls) => [
  { role: "user", content: [{ type: "text", text: "What is this?" }, ...urls.map((url) => ({ type: "image_url", image_url: { url } }))] },
];
const seen = see(picture);

/** Takes the one place of the narrow server: a request whose body never comes. */
function fullServer() {
  const { hostname, port } = new URL(narrowUrl);
  const socket = connect(Number(port), hostname);
  socket.write(
    `POST /generate HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer ${apiKey}\r\n` +
      "content-type: application/json\r\ncontent-length: 10\r\nexpect: 100-continue\r\n\r\n",
  );
  // The server asks for the body once the request has its place.
  return new Promise((resolve, reject) => {
    socket.once("data", (data) => (data.toString().startsWith("HTTP/1.1 100") ? resolve(socket) : reject(new Error(String(data)))));
    socket.once("error", reject);
    socket.setTimeout(20_000, () => reject(new Error("the place was not taken")));
  });
}

const tests = {
  async models() {
    const list = await client.models.list();
    assert.deepEqual(list.data.map((model) => model.id), ["tiny"]);
    assert.equal((await client.models.retrieve("tiny")).object, "model");
  },
  async chat() {
    const answer = await client.chat.completions.create({ model: "default", messages: seen, max_tokens: 6 });
    assert.equal(answer.choices[0].message.role, "assistant");
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 6);
    assert.match(answer._request_id, /^req-/);
    assert.equal(answer.usage.prompt_tokens_details.image_tokens, 3);
  },
  async streaming() {
    const options = { model: "default", messages: seen, max_tokens: 6 };
    const whole = await client.chat.completions.create(options);
    let text = "";
    let usage;
    const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.ok(text);
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },
  async "streaming helper"() {
    const stream = client.chat.completions.stream({ model: "default", messages: hello, max_tokens: 6 });
    let deltas = "";
    stream.on("content", (delta) => (deltas += delta));
    const final = await stream.finalChatCompletion();
    const whole = await client.chat.completions.create({ model: "default", messages: hello, max_tokens: 6 });
    assert.equal(final.choices[0].finish_reason, "length");
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
    assert.equal(deltas, whole.choices[0].message.content);
  },
  async "leaving a stream"() {
    // With one place, the next answer shows that this one was given up.
    const narrow = clientOf(narrowUrl, { maxRetries: 8 });
    const stream = await narrow.chat.completions.create({ model: "default", messages: hello, max_tokens: 100, stream: true });
    for await (const _ of stream) break;
    assert.ok(stream.controller.signal.aborted);
    assert.equal((await narrow.completions.create({ model: "default", prompt: "Hello", max_tokens: 1 })).usage.completion_tokens, 1);
  },
  async completions() {
    const answer = await client.completions.create({ model: "default", prompt: "Hello", max_tokens: 4 });
    assert.equal(answer.usage.completion_tokens, 4);
    let text = "";
    for await (const chunk of await client.completions.create({ model: "default", prompt: "Hello", max_tokens: 4, stream: true })) {
      text += chunk.choices[0].text;
    }
    assert.ok(text);
    assert.equal(text, answer.choices[0].text);
  },
  async errors() {
    const ask = (change, by = client) => by.chat.completions.create({ model: "default", messages: hello, ...change });
    await assert.rejects(ask({ temperature: 9 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
    await assert.rejects(ask({ model: "gpt-4" }), OpenAI.NotFoundError);
    await assert.rejects(ask({ temperature: 9, stream: true }), OpenAI.BadRequestError);
    for (const [address, status, code] of [
      ["https://pictures.example/cat.jpg", 400, "remote_images_disabled"],
      ["data:image/png;base64,AA==", 415, "unsupported_image"],
      [`data:image/jpeg;base64,${bytes.subarray(0, bytes.length / 5).toString("base64")}`, 422, "invalid_image"],
    ]) {
      await assert.rejects(ask({ messages: see(address) }), (error) => error.status === status && error.code === code);
    }
    await assert.rejects(ask({ messages: see(...Array(17).fill(picture)) }), (error) => error.status === 413);
  },
  async keys() {
    for (const wrong of ["wrong-key", apiKey.slice(1), `${apiKey}x`]) {
      const stranger = clientOf(url, { apiKey: wrong });
      await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
      await assert.rejects(stranger.chat.completions.create({ model: "default", messages: hello, stream: true }), OpenAI.AuthenticationError);
    }
  },
  async "a full server"() {
    const socket = await fullServer();
    const ask = (by) => by.chat.completions.create({ model: "default", messages: hello, max_tokens: 2 });
    await assert.rejects(ask(clientOf(narrowUrl)), (error) => error instanceof OpenAI.RateLimitError && error.headers.get("retry-after") >= 1);
    setTimeout(() => socket.destroy(), 300);
    assert.equal((await ask(clientOf(narrowUrl, { maxRetries: 8 }))).usage.completion_tokens, 2);
  },
  async retries() {
    let requests = 0;
    const flaky = createServer((incoming, outgoing) => {
      requests += 1;
      if (requests < 3) {
        incoming.resume();
        outgoing.writeHead(429, { "retry-after": "0" }).end();
        return;
      }
      const { authorization } = incoming.headers;
      const headers = { authorization, "content-type": "application/json" };
      const onward = httpRequest(`${url}${incoming.url}`, { method: "POST", headers }, (reply) => {
        outgoing.writeHead(reply.statusCode, reply.headers);
        reply.pipe(outgoing);
      });
      incoming.pipe(onward);
    });
    await new Promise((resolve) => flaky.listen(0, "127.0.0.1", resolve));
    const patient = clientOf(`http://127.0.0.1:${flaky.address().port}`, { maxRetries: 2 });
    const answer = await patient.chat.completions.create({ model: "default", messages: hello, max_tokens: 2 });
    assert.equal(requests, 3);
    assert.equal(answer.usage.completion_tokens, 2);
    flaky.close();
    flaky.closeAllConnections();
  },
};

let failed = 0;
for (const [name, test] of Object.entries(tests)) {
  try {
    await test();
    console.log(`ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}`);
    console.error(error);
  }
}
process.exit(failed ? 1 : 0);
