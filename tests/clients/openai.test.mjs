// The JavaScript client of OpenAI.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer, request as httpRequest } from "node:http";
import OpenAI from "openai";

const { IDEFICS_URL: url, IDEFICS_KEY: apiKey, IDEFICS_PICTURE: file } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const picture = `data:image/jpeg;base64,${readFileSync(file).toString("base64")}`;
const hello = [{ role: "user", content: "Hello" }];
const seen = [
  {
    role: "user",
    content: [
      { type: "text", text: "What is this?" },
      { type: "image_url", image_url: { url: picture } },
    ],
  },
];

const tests = {
  async models() {
    const list = await client.models.list();
    assert.equal((await client.models.retrieve(list.data[0].id)).object, "model");
  },
  async chat() {
    const answer = await client.chat.completions.create({ model: "default", messages: seen, max_tokens: 6 });
    assert.equal(answer.choices[0].message.role, "assistant");
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
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },
  async "streaming helper"() {
    const stream = client.chat.completions.stream({ model: "default", messages: hello, max_tokens: 6 });
    const final = await stream.finalChatCompletion();
    assert.ok(["stop", "length"].includes(final.choices[0].finish_reason));
  },
  async "leaving a stream"() {
    const stream = await client.chat.completions.create({ model: "default", messages: hello, max_tokens: 100, stream: true });
    for await (const _ of stream) break;
    assert.ok(stream.controller.signal.aborted);
  },
  async completions() {
    const answer = await client.completions.create({ model: "default", prompt: "Hello", max_tokens: 4 });
    assert.equal(typeof answer.choices[0].text, "string");
  },
  async errors() {
    const ask = (change, by = client) => by.chat.completions.create({ model: "default", messages: hello, ...change });
    await assert.rejects(ask({ temperature: 9 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
    await assert.rejects(ask({ model: "gpt-4" }), OpenAI.NotFoundError);
    await assert.rejects(ask({}, new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong-key", maxRetries: 0 })), OpenAI.AuthenticationError);
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
    const patient = new OpenAI({ baseURL: `http://127.0.0.1:${flaky.address().port}/v1`, apiKey, maxRetries: 2 });
    await patient.chat.completions.create({ model: "default", messages: hello, max_tokens: 2 });
    assert.equal(requests, 3);
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
