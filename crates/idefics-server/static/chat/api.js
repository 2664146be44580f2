// The server's interface, as far as the page needs it: the model, and answers as they are written.

import { session } from "./store.js";

/** A request that failed, in words for the person who asked. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, retryAfter?: number}} [details]
   */
  constructor(message, { status = 0, retryAfter } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "idefics.apiKey";

/** The key lives as long as the tab: never on disk, never in the history. */
export const apiKey = {
  get: () => session.get(KEY) ?? "",
  set: (key) => (key ? session.set(KEY, key) : session.remove(KEY)),
};

function headers(more = {}) {
  const key = apiKey.get();
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** What the body of a refused request says, whichever dialect it speaks. */
async function refusal(response) {
  let text = "";
  try {
    const body = await response.json();
    text = typeof body.error === "string" ? body.error : (body.error?.message ?? "");
  } catch {
    // A proxy's page says nothing that helps.
  }
  const retryAfter = Number(response.headers.get("retry-after")) || undefined;
  return new ApiError(text || `The server answered with status ${response.status}.`, {
    status: response.status,
    retryAfter,
  });
}

/** The model: what `/v1/models` and `/info` say of it. */
export async function describeModel() {
  const list = await (await request("/v1/models")).json();
  const model = list.data?.[0];
  if (!model) throw new ApiError("The server has no model.");
  let info = {};
  try {
    info = await (await request("/info")).json();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    // Another server of this dialect may lack it; the name is enough.
  }
  return { model, info };
}

/**
 * One answer. `onText` gets each piece; the result says why it ended and what it took.
 * @param {object} body  the request, without `stream`
 * @param {{signal: AbortSignal, onText: (text: string) => void}} how
 */
export async function streamChat(body, { signal, onText }) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const result = { finishReason: null, usage: null };
  let isComplete = false;
  for await (const data of events(response.body)) {
    if (data.startsWith("[DONE]")) {
      isComplete = true;
      break;
    }
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent something that is no answer.");
    }
    if (chunk.error) {
      const { message, code } = chunk.error;
      throw new ApiError(message || "The answer broke off.", { status: Number(code) || 500 });
    }
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    if (choice?.finish_reason) result.finishReason = choice.finish_reason;
    if (chunk.usage) result.usage = chunk.usage;
  }
  if (!isComplete && !result.finishReason) throw new ApiError("The connection was lost before the answer ended.");
  return result;
}

/** The data of server-sent events. Lines end in any of three ways; comments are keep-alives. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      buffer += value;
      // A return at the very end may be the first half of a line's end.
      const end = buffer.endsWith("\r") ? buffer.length - 1 : buffer.length;
      const lines = buffer.slice(0, end).split(/\r\n|\r|\n/);
      buffer = lines.pop() + buffer.slice(end);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
    if (data.length) yield data.join("\n");
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
