// Conversations as files: one message a line, as `idefics chat` writes and reads them.
//
// {"role": "user", "content": [{"image": "data:image/png;base64,.."}, {"text": "Who is that?"}]}

import { fromDataUri, readPicture, toDataUri } from "./pictures.js";
import { addNode, answered, newConversation, newId, pathOf, textOf } from "./store.js";

/** A file that is no conversation, with the reason. */
export class TranscriptError extends Error {}

/** The shown branch of a conversation, up to its last answer. */
export async function toLines(conversation, pictures, system) {
  const lines = [];
  const push = (role, content) => lines.push(JSON.stringify({ role, content }));
  if (system.trim()) push("system", [{ text: system }]);
  const path = answered(pathOf(conversation));
  const end = path.findLastIndex((node) => node.role === "assistant") + 1;
  if (!end) throw new TranscriptError("There is nothing to save: no message has an answer.");
  for (const node of path.slice(0, end)) {
    if (node.role === "assistant") {
      push("assistant", [{ text: textOf(node) }]);
      continue;
    }
    const content = [];
    for (const part of node.parts) {
      if (part.type === "text") content.push({ text: part.text });
      else if (pictures.has(part.id)) content.push({ image: await toDataUri(pictures.get(part.id).blob) });
    }
    push("user", content);
  }
  return `${lines.join("\n")}\n`;
}

/** A conversation from a file's lines, checked line by line, and its pictures. */
export async function fromLines(text) {
  const conversation = newConversation();
  const pictures = [];
  let system = "";
  let parent;
  let expected = "user";
  for (const [index, line] of text.split("\n").entries()) {
    if (!line.trim()) continue;
    const fail = (reason) => {
      throw new TranscriptError(`Line ${index + 1}: ${reason}.`);
    };
    let message;
    try {
      message = JSON.parse(line);
    } catch {
      fail("this is no JSON");
    }
    const content = message?.content;
    if (!Array.isArray(content)) fail("a message has a list of content");
    if (message.role === "system" && !parent && !system) {
      system = content.map((part) => part.text ?? fail("a system message is text")).join("\n");
      continue;
    }
    if (message.role !== expected) fail(`expected a message of the ${expected}`);
    const parts = [];
    for (const part of content) {
      if (typeof part?.text === "string") parts.push({ type: "text", text: part.text });
      else if (typeof part?.image !== "string") fail("a part is a text or an image");
      else if (expected === "assistant") fail("an answer has no pictures");
      else if (!part.image.startsWith("data:")) {
        fail("the picture is not in the file; save the conversation with --embed");
      } else {
        let picture;
        try {
          picture = await readPicture(fromDataUri(part.image));
        } catch (error) {
          fail(error.message.replace(/\.$/, ""));
        }
        const id = newId();
        pictures.push({ ...picture, id, conversation: conversation.id, name: `picture ${pictures.length + 1}` });
        parts.push({ type: "image", id });
      }
    }
    parent = addNode(conversation, parent?.id, { role: expected, parts });
    expected = expected === "user" ? "assistant" : "user";
  }
  if (!parent) throw new TranscriptError("There is no conversation in the file.");
  if (expected === "assistant") throw new TranscriptError("The last message of the file has no answer.");
  return { conversation, pictures, system };
}
