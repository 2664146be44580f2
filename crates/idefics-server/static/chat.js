// The web chat: conversations with the model of this server. No build step, and no request to anywhere else.
//
// What is where: api.js talks to the server, store.js keeps conversations in the browser, composer.js is the field
// for words and pictures, thread.js shows messages, and this file joins them.

import { ApiError, apiKey, describeModel, streamChat } from "./chat/api.js";
import { Composer, partsOf } from "./chat/composer.js";
import { element, iconButton } from "./chat/elements.js";
import { PictureError, readPicture, toDataUri } from "./chat/pictures.js";
import { applyTheme, loadSettings, requestFields, SettingsDialog } from "./chat/settings.js";
import { Sidebar } from "./chat/sidebar.js";
import * as store from "./chat/store.js";
import { Thread } from "./chat/thread.js";
import { fromLines, toLines, TranscriptError } from "./chat/transcript.js";

const $ = (id) => document.getElementById(id);

const settings = loadSettings();
applyTheme(settings.theme);

const state = {
  conversations: [],
  conversation: store.newConversation(),
  /** Pictures of the conversations that were opened and of messages being written, by id. */
  pictures: new Map(),
  /** Answers that are being written: conversation id -> {controller, node}. */
  running: new Map(),
  model: null,
  info: {},
};

// ---------------------------------------------------------------- small things

const urls = new Map();
/** An address of a picture's data, for as long as the page lives. */
function urlOf(picture) {
  if (!urls.has(picture.id)) urls.set(picture.id, URL.createObjectURL(picture.blob));
  return urls.get(picture.id);
}

/** Says something to those who do not see the page change. */
function announce(text) {
  const place = $("status");
  place.textContent = "";
  // A change is what is read out, also when the words are the same again.
  requestAnimationFrame(() => (place.textContent = text));
}

function showNotice(message, action) {
  const notice = $("notice");
  notice.replaceChildren(
    element("span", { text: message }),
    ...(action ? [element("button", { type: "button", class: "button small", text: action.label, on: { click: action.run } })] : []),
    iconButton("close", "Dismiss", hideNotice),
  );
  notice.hidden = false;
}

function hideNotice() {
  $("notice").hidden = true;
}

/** Shows what went wrong outside of an answer. */
function tell(error) {
  if (error instanceof ApiError && error.status === 401) {
    const label = apiKey.get() ? "The API key is not right." : "This server wants an API key.";
    showNotice(label, { label: "Enter the key", run: () => openSettings("apiKey") });
  } else if (error instanceof ApiError && error.status === 503) {
    showNotice(`The server is not ready: ${error.message.replace(/[.]$/, "")}.`, { label: "Try again", run: connect });
  } else if (error instanceof ApiError) {
    showNotice(asSentence(error.message), { label: "Try again", run: connect });
  } else if (error instanceof PictureError || error instanceof TranscriptError) {
    showNotice(error.message);
  } else {
    console.error(error);
    showNotice(`Something went wrong in this page: ${error.message}`);
  }
}

const guarded =
  (work) =>
  (...values) =>
    Promise.resolve(work(...values)).catch(tell);

// ---------------------------------------------------------------- the model

const connect = guarded(async () => {
  try {
    const { model, info } = await describeModel();
    Object.assign(state, { model, info });
    // What is told of other things stays.
    if ($("notice").querySelector("button:not(.icon-button)")) hideNotice();
    const isBase = model.meta?.form === "base";
    $("model-name").textContent = model.id;
    $("model-name").title = model.id;
    $("base-note").hidden = !isBase;
    document.title = `${model.id} – chat`;
  } finally {
    $("model-name").classList.toggle("is-missing", !state.model);
    if (!state.model) $("model-name").textContent = "No model";
  }
});

function openInfo() {
  const { model, info } = state;
  const meta = model?.meta ?? {};
  const rows = [
    ["Model", model?.id],
    ["Kind", { base: "base: continues texts", instruct: "instruct: answers in dialogues" }[meta.form]],
    ["Reads at most", info.max_total_tokens && `${info.max_total_tokens} tokens, prompt and answer together`],
    ["Pictures at most", meta.max_images && `${meta.max_images} in a request`],
    ["Vocabulary", meta.vocab_size && `${meta.vocab_size} tokens`],
    ["Numbers", meta.dtype ?? info.model_dtype],
    ["Runs on", info.model_device_type],
    ["Server", info.version && `${info.router ?? ""} ${info.version}`.trim()],
  ];
  $("info-rows").replaceChildren(
    ...rows.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", { text: name }), element("dd", { text: String(value) })]),
  );
  $("info").showModal();
}

// ---------------------------------------------------------------- conversations

let isForgetful = false;

/** What the browser's storage does. Without one the chat works, until the page is closed. */
async function kept(work) {
  try {
    return await work;
  } catch (error) {
    console.warn(error);
    if (!isForgetful) showNotice("This browser keeps nothing for this page: conversations end with it.");
    isForgetful = true;
    return undefined;
  }
}

function drawList() {
  sidebar.show(state.conversations, state.conversation.id, isBusy);
}

async function keep(conversation = state.conversation) {
  // In the list first: one that is deleted while it is saved does not come back into it.
  const others = state.conversations.filter((it) => it.id !== conversation.id);
  state.conversations = [conversation, ...others].sort((a, b) => b.updated - a.updated);
  drawList();
  if ((await kept(store.saveConversation(conversation))) === false) forget(conversation.id);
}

/**
 * Takes over what other tabs did to a conversation. False if one of them deleted it.
 * @param {boolean} [isTold]  whether a tab has just said so: then an answer that is being written is one
 */
async function catchUp(conversation, isTold = false) {
  const { id } = conversation;
  const saved = await kept(store.savedConversation(id));
  if (saved === null && store.wasSaved(id)) {
    forget(id);
    return false;
  }
  for (const picture of (await kept(store.picturesOf(id))) ?? []) state.pictures.set(picture.id, picture);
  // While an answer is written here, this is the latest.
  if (!saved || state.running.has(id)) return true;
  // Of a tab that crashed nobody says that it writes.
  const statusOf = (node) => conversation.nodes.find((it) => it.id === node.id)?.status ?? "stopped";
  if (!isTold) for (const node of saved.nodes) if (node.status === "streaming") node.status = statusOf(node);
  store.join(conversation, saved, true);
  return true;
}

/** Lets go of a conversation that another tab deleted. */
function forget(id) {
  state.conversations = state.conversations.filter((it) => it.id !== id);
  state.running.get(id)?.controller.abort();
  if (state.conversation.id !== id) {
    drafts.delete(id);
    drawList();
    return;
  }
  showNotice("This conversation was deleted in another tab.");
  // What is half written stays where it is.
  if (composer.editor.childNodes.length) unbegun = state.conversation = store.newConversation();
  else turnTo(unbegunConversation());
  draw();
}

/** Another tab saved a conversation. */
async function follow(id) {
  const isNew = !state.conversations.some((it) => it.id === id);
  const saved = isNew && (await kept(store.savedConversation(id)));
  if (saved && !isListed(saved)) state.conversations.push(saved);
  const conversation = state.conversations.find((it) => it.id === id);
  if (!conversation || !(await catchUp(conversation, true))) return;
  state.conversations.sort((a, b) => b.updated - a.updated);
  // A message that is being edited is not taken away.
  if (!isShown(conversation) || $("messages").querySelector(".editing")) return drawList();
  draw();
  followEnd();
}

store.listen(
  guarded(async ({ kind, id }) => {
    if (kind === "saved") await follow(id);
    else if (kind === "deleted") forget(id);
    // A new tab takes answers that are being written for left behind until it is told.
    else for (const running of state.running.keys()) store.tell("saved", running);
  }),
);

/** Whether a conversation is being answered, here or in another tab. */
const isBusy = (conversation) =>
  state.running.has(conversation.id) || conversation.nodes.some((node) => node.status === "streaming");

const isShown = (conversation) => conversation.id === state.conversation.id;

const isListed = (conversation) => state.conversations.some((it) => it.id === conversation.id);

/** Half-written messages of the conversations that are not shown, by their ids. */
const drafts = new Map();

/** The conversation that has not begun. What was written for it waits there, too. */
let unbegun = state.conversation;

function unbegunConversation() {
  if (unbegun.nodes.length) unbegun = store.newConversation();
  return unbegun;
}

/** Turns to another conversation; each has its own half-written message. */
function turnTo(conversation) {
  if (isShown(conversation)) return;
  drafts.set(state.conversation.id, composer.take());
  state.conversation = conversation;
  composer.put(drafts.get(conversation.id));
  drafts.delete(conversation.id);
}

async function openConversation(id) {
  const running = state.running.get(id);
  const found = running?.conversation ?? state.conversations.find((it) => it.id === id);
  if (!found) return;
  turnTo(found);
  if (!(await catchUp(found)) || !isShown(found)) return;
  draw();
  closeSidebar();
  scrollToEnd();
  composer.focusAtEnd({ preventScroll: true });
}

function startConversation() {
  turnTo(unbegunConversation());
  draw();
  closeSidebar();
  composer.focusAtEnd();
}

function draw() {
  const { conversation } = state;
  thread.show(conversation);
  const isEmpty = conversation.nodes.length === 0;
  $("welcome").hidden = !isEmpty;
  $("title").textContent = conversation.title || "New conversation";
  $("export").disabled = isEmpty;
  drawList();
  drawButtons();
}

function drawButtons() {
  const isRunning = state.running.has(state.conversation.id);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("send").disabled = composer.isEmpty() || sending.has(state.conversation.id) || isBusy(state.conversation);
  $("send").setAttribute("aria-busy", sending.has(state.conversation.id));
  const isElsewhere = !isRunning && isBusy(state.conversation);
  const waits = isWaiting(state.conversation) ? "Waiting for the pictures…" : isElsewhere ? "Being answered in another tab…" : "";
  $("hint").hidden = waits !== "";
  $("waiting").hidden = waits === "";
  $("waiting").textContent = waits;
}

const sidebar = new Sidebar($("conversations"), {
  onOpen: guarded(openConversation),
  onRename: guarded(async (conversation, title) => {
    // The latest name counts, in whichever tab it was given.
    if (title !== conversation.title) Object.assign(conversation, { title, renamed: Date.now() });
    if (isShown(conversation)) $("title").textContent = title;
    await keep(conversation);
  }),
  onDelete: guarded(async (conversation) => {
    if (!(await confirmDelete(conversation))) return;
    // Out of the list first: an answer that ends keeps its conversation if that is in it.
    state.conversations = state.conversations.filter((it) => it.id !== conversation.id);
    state.running.get(conversation.id)?.controller.abort();
    if (isShown(conversation)) startConversation();
    else drawList();
    drafts.delete(conversation.id);
    await kept(store.deleteConversation(conversation.id));
    announce("Conversation deleted");
  }),
});

function confirmDelete(conversation) {
  const dialog = $("confirm");
  $("confirm-text").textContent = `“${conversation.title || "New conversation"}” and its pictures will be gone from this browser.`;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true }));
}

/** A few words by which a conversation is found again. */
function titleOf(parts) {
  // A picture between words leaves a gap that is shown; one before or behind them does not.
  const words = parts
    .map((part) => (part.type === "text" ? part.text : "\uFFFC"))
    .join(" ")
    .replace(/^[\s\uFFFC]+|[\s\uFFFC]+$/g, "")
    .replace(/\s*\uFFFC[\s\uFFFC]*/g, " … ")
    .replace(/\s+/g, " ");
  return words.length > 60 ? `${words.slice(0, 59)}…` : words || "Picture";
}

// ---------------------------------------------------------------- writing a message

/** Files that are being read, and whether they could be: a message does not leave without its pictures. */
const reading = new Set();

async function addFiles(target, files) {
  const work = Promise.all(files.map((file) => addFile(target, file)));
  const settled = work.then(() => true, () => false).finally(() => reading.delete(settled));
  reading.add(settled);
  await work;
}

async function addFile(target, file) {
  if (/\.jsonl$/i.test(file.name)) {
    await importFile(file);
    return;
  }
  const place = target.reserve(file.name);
  let picture;
  try {
    picture = { ...(await readPicture(file)), id: store.newId() };
    state.pictures.set(picture.id, picture);
  } finally {
    target.settle(place, picture);
  }
}

/** Pictures are kept with the conversation once they are part of it. */
async function keepPictures(conversation, parts) {
  for (const part of parts) {
    const picture = part.type === "image" && state.pictures.get(part.id);
    if (picture && picture.conversation !== conversation.id) {
      picture.conversation = conversation.id;
      await kept(store.savePicture(picture));
    }
  }
}

const composer = new Composer($("composer"), {
  onSubmit: guarded(submit),
  onChange: () => drawButtons(),
  onFiles: guarded((files) => addFiles(composer, files)),
  announce,
  url: urlOf,
});

/** Conversations that are about to be answered: a message that waits for its pictures is not sent again. */
const sending = new Set();

const isWaiting = (conversation) => sending.has(conversation.id) && reading.size > 0;

/**
 * Asks what `take` hands out once all pictures are read.
 * @param {() => object[]} take  the parts of the message, taken out of its field
 * @param {() => string | undefined} parentOf  what the message follows
 */
async function send(conversation, take, parentOf) {
  const parts = await prepare(conversation, async () => {
    if (reading.size) {
      announce("The message waits for its pictures");
      const areRead = await Promise.all(reading);
      // Why is shown. Whether to send the rest is for the writer to say.
      if (areRead.includes(false)) return [];
    }
    if (!(await isReady(conversation))) return [];
    const taken = take();
    await keepPictures(conversation, taken);
    return taken;
  });
  if (!parts?.length) return;
  const question = store.addNode(conversation, parentOf(), { role: "user", parts });
  conversation.title ||= titleOf(parts);
  await ask(conversation, question);
}

/** Does what comes before an answer, for each conversation one thing at a time. */
async function prepare(conversation, work) {
  if (sending.has(conversation.id)) return undefined;
  sending.add(conversation.id);
  drawButtons();
  try {
    return await work();
  } finally {
    sending.delete(conversation.id);
    drawButtons();
  }
}

/** Whether a conversation, as it is now in all tabs, can be answered. */
async function isReady(conversation) {
  const isThere = (await catchUp(conversation)) && (isListed(conversation) || !conversation.nodes.length);
  return isThere && !isBusy(conversation);
}

async function submit() {
  const { conversation } = state;
  const take = () => {
    // Who turned to another conversation meanwhile left the message with the drafts.
    const draft = isShown(conversation) ? composer.take() : drafts.get(conversation.id);
    drafts.delete(conversation.id);
    return draft ? partsOf(draft) : [];
  };
  // A message that nobody answered is followed by its answer, not by a second message: that is another version of it.
  const parentOf = () => {
    const last = store.answered(store.pathOf(conversation)).at(-1);
    return last?.role === "user" ? last.parent : last?.id;
  };
  await send(conversation, take, parentOf);
}

// ---------------------------------------------------------------- answers

/** The request for an answer to the last of `path`. */
async function messagesOf(path) {
  const messages = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  for (const node of store.answered(path)) {
    if (node.role === "assistant") {
      messages.push({ role: "assistant", content: store.textOf(node) });
      continue;
    }
    const content = [];
    for (const part of node.parts) {
      if (part.type === "text") content.push({ type: "text", text: part.text });
      else {
        const picture = state.pictures.get(part.id);
        if (!picture) throw new PictureError("A picture of this conversation is lost; edit the message to go on.");
        content.push({ type: "image_url", image_url: { url: await toDataUri(picture.blob) } });
      }
    }
    messages.push({ role: "user", content });
  }
  return messages;
}

/** Answers `question` with a new node; its earlier answers stay as versions. */
async function ask(conversation, question) {
  const answer = store.addNode(conversation, question.id, {
    role: "assistant",
    parts: [{ type: "text", text: "" }],
    status: "streaming",
  });
  await write(conversation, answer, untilNode(conversation, question));
}

/** The shown messages up to `node`. */
function untilNode(conversation, node) {
  const path = store.pathOf(conversation);
  return path.slice(0, path.indexOf(node) + 1);
}

/** Lets the model write into `answer`. `path` is what it reads, which may end with the start of the answer. */
async function write(conversation, answer, path) {
  const controller = new AbortController();
  state.running.set(conversation.id, { controller, node: answer, conversation });
  hideNotice();
  draw();
  if (isShown(conversation)) scrollToEnd();
  announce("The model is answering");
  const start = performance.now();
  const text = answer.parts[0];
  let isStart = text.text === "";
  try {
    await keep(conversation);
    const body = { messages: await messagesOf(path), ...requestFields(settings) };
    if (state.model) body.model = state.model.id;
    const result = await streamChat(body, {
      signal: controller.signal,
      onText: (piece) => {
        // The space behind "Assistant:" belongs to the form of the prompt.
        text.text += isStart ? piece.trimStart() : piece;
        isStart = text.text === "";
        thread.grow(answer);
        followEnd();
      },
    });
    answer.status = result.finishReason === "length" ? "length" : "done";
    answer.usage = result.usage;
  } catch (error) {
    if (error.name === "AbortError") answer.status = "stopped";
    else {
      answer.status = "error";
      answer.error = { message: messageOf(error) };
      if (error.status === 401) tell(error);
      if (!(error instanceof ApiError || error instanceof PictureError)) console.error(error);
    }
  }
  store.touch(answer);
  answer.seconds = (performance.now() - start) / 1000;
  state.running.delete(conversation.id);
  conversation.updated = Date.now();
  if (isListed(conversation)) await keep(conversation);
  if (isShown(conversation)) {
    thread.refresh(answer);
    drawButtons();
    followEnd();
    announce(answer.status === "error" ? "" : `The model says: ${text.text || "nothing"}`);
  }
}

/** Servers write their reasons in lower case. */
function asSentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}

function messageOf(error) {
  const message = asSentence(error.message);
  return error instanceof ApiError && error.retryAfter ? `${message} Try again in ${error.retryAfter} seconds.` : message;
}

/** Another answer in the place of `node`. One that failed is replaced, others stay as versions. */
async function retry(node) {
  const { conversation } = state;
  if (!(await prepare(conversation, () => isReady(conversation)))) return;
  const question = conversation.nodes.find((it) => it.id === node.parent);
  if (node.status === "error" && store.textOf(node) === "") store.removeNode(conversation, node);
  await ask(conversation, question);
}

/** Goes on with an answer that was cut off. */
async function goOn(node) {
  const { conversation } = state;
  if (!(await prepare(conversation, () => isReady(conversation)))) return;
  // Another tab may have gone on with it.
  if (node.status !== "length") return draw();
  const path = untilNode(conversation, node);
  if (store.isSilent(node)) path.pop();
  node.status = "streaming";
  store.touch(node);
  await write(conversation, node, path);
}

function stop() {
  state.running.get(state.conversation.id)?.controller.abort();
  composer.editor.focus();
}

// ---------------------------------------------------------------- editing a message

/** Turns a message into a field; sending it grows a branch. */
function edit(node) {
  if (isBusy(state.conversation)) return;
  const message = thread.elementOf(node);
  const field = element("div", {
    class: "editor",
    contenteditable: "true",
    role: "textbox",
    "aria-multiline": "true",
    "aria-label": "Edit the message",
  });
  const { conversation } = state;
  let isCancelled = false;
  const close = () => {
    isCancelled = true;
    editor.close();
    thread.refresh(node);
    thread.elementOf(node)?.querySelector("[aria-label=Edit]")?.focus();
  };
  const ready = element("button", { type: "button", class: "button primary small", text: "Send" });
  const take = () => {
    const parts = isCancelled ? [] : editor.parts();
    if (parts.length) editor.close();
    return parts;
  };
  const drawReady = () => {
    ready.disabled = field.childNodes.length === 0 || sending.has(conversation.id);
    ready.textContent = isWaiting(conversation) ? "Waiting for the pictures…" : "Send";
  };
  const editor = new Composer(field, {
    onSubmit: guarded(async () => {
      const sent = send(conversation, take, () => node.parent);
      drawReady();
      await sent;
      drawReady();
    }),
    onCancel: close,
    onChange: drawReady,
    onFiles: guarded((files) => addFiles(editor, files)),
    announce,
    url: urlOf,
  });
  ready.addEventListener("click", () => editor.how.onSubmit());
  const cancel = element("button", { type: "button", class: "button small", text: "Cancel", on: { click: close } });
  const pick = iconButton("picture", "Add pictures", () => pickFiles(editor));
  message.replaceChildren(element("div", { class: "editing" }, field, element("div", { class: "editing-tools" }, pick, cancel, ready)));
  acceptDrops(message, editor);
  editor.fill(node.parts, state.pictures);
  editor.focusAtEnd();
}

function chooseBranch(node, other) {
  state.conversation.active[node.parent] = other.id;
  draw();
  guarded(keep)();
  thread.elementOf(other)?.scrollIntoView({ block: "nearest" });
  thread.elementOf(other)?.querySelector(".actions button:not(:disabled)")?.focus();
}

const thread = new Thread($("messages"), {
  url: urlOf,
  pictures: state.pictures,
  onRetry: guarded(retry),
  onContinue: guarded(goOn),
  onEdit: edit,
  onBranch: chooseBranch,
  onOpenPicture: (picture) => {
    const image = $("lightbox-image");
    image.src = urlOf(picture);
    image.alt = picture.name;
    $("lightbox-name").textContent = `${picture.name} · ${picture.width} × ${picture.height}`;
    $("lightbox").showModal();
  },
  announce,
});

// ---------------------------------------------------------------- scrolling

const log = $("log");
let follows = true;

function scrollToEnd() {
  follows = true;
  requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
}

/** Stays at the end while an answer grows, unless the reader went up. */
function followEnd() {
  if (follows) scrollToEnd();
}

log.addEventListener(
  "scroll",
  () => {
    follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    $("to-end").hidden = follows;
  },
  { passive: true },
);
$("to-end").addEventListener("click", scrollToEnd);

// ---------------------------------------------------------------- files

function pickFiles(target) {
  const input = $("file");
  input.onchange = () => {
    const files = [...input.files];
    input.value = "";
    target.editor.focus();
    guarded(addFiles)(target, files);
  };
  input.click();
}

/** Files that are dropped on `area` go into `target`. */
function acceptDrops(area, target) {
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = target.dragged ? "move" : "copy";
    if (!target.dragged) document.body.classList.add("is-dropping");
  });
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    document.body.classList.remove("is-dropping");
    target.drop(event);
  });
}

acceptDrops(document.body, composer);
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("is-dropping");
});

const exportFile = guarded(async () => {
  const lines = await toLines(state.conversation, state.pictures, settings.system);
  const link = element("a", {
    href: URL.createObjectURL(new Blob([lines], { type: "application/jsonl" })),
    download: `${(state.conversation.title || "conversation").replace(/[^\p{L}\p{N} _-]+/gu, "").trim() || "conversation"}.jsonl`,
  });
  link.click();
  URL.revokeObjectURL(link.href);
});

async function importFile(file) {
  const { conversation, pictures, system } = await fromLines(await file.text());
  const first = store.pathOf(conversation)[0];
  conversation.title = titleOf(first.parts);
  for (const picture of pictures) {
    state.pictures.set(picture.id, picture);
    await kept(store.savePicture(picture));
  }
  await keep(conversation);
  await openConversation(conversation.id);
  if (system && system !== settings.system) showNotice(`The file has a system text: “${system}”. It can be set in the settings.`);
}

// ---------------------------------------------------------------- the frame

const settingsDialog = new SettingsDialog($("settings"), settings);
let keyBefore = "";

function openSettings(field) {
  keyBefore = apiKey.get();
  settingsDialog.open(field);
}

$("settings").addEventListener("close", () => {
  if (apiKey.get() !== keyBefore) connect();
});

function openSidebar() {
  document.body.classList.add("has-sidebar");
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeSidebar() {
  document.body.classList.remove("has-sidebar");
  $("menu").setAttribute("aria-expanded", "false");
}

const clicks = {
  new: startConversation,
  send: () => composer.how.onSubmit(),
  stop,
  pick: () => pickFiles(composer),
  import: () => pickFiles(composer),
  export: exportFile,
  "open-settings": () => openSettings(),
  "model-name": openInfo,
  menu: () => (document.body.classList.contains("has-sidebar") ? closeSidebar() : openSidebar()),
  scrim: closeSidebar,
};
for (const [id, run] of Object.entries(clicks)) $(id).addEventListener("click", run);

for (const dialog of document.querySelectorAll("dialog")) {
  // A click beside the dialog closes it.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
}

for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    composer.focusAtEnd();
    composer.insertText(example.textContent);
  });
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input, textarea, select, [contenteditable=true], dialog");
  if (event.key === "Escape" && !event.target.closest?.("dialog")) {
    if (document.body.classList.contains("has-sidebar")) {
      closeSidebar();
      $("menu").focus();
    } else stop();
  } else if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    composer.focusAtEnd();
  } else if (event.key === "ArrowUp" && event.target === composer.editor && composer.editor.childNodes.length === 0) {
    const last = store.pathOf(state.conversation).findLast((node) => node.role === "user");
    if (last) {
      event.preventDefault();
      edit(last);
    }
  }
});

// What is there of an answer is kept when the page goes away. The database would be too late then.
const UNFINISHED = "idefics.unfinished";

addEventListener("pagehide", () => {
  if (!state.running.size) return;
  const unfinished = [...state.running.values()].map(({ node }) => [node.id, store.textOf(node)]);
  store.local.set(UNFINISHED, JSON.stringify([...leftBehind(), ...unfinished]));
});

const leftBehind = () => JSON.parse(store.local.get(UNFINISHED) ?? "[]");

/** Ends the answers that pages were writing which are gone. */
async function settle() {
  const unfinished = new Map(leftBehind());
  store.local.remove(UNFINISHED);
  for (const conversation of state.conversations) {
    const left = conversation.nodes.filter((node) => node.status === "streaming" && unfinished.has(node.id));
    for (const node of left) {
      node.status = "stopped";
      node.parts = [{ type: "text", text: unfinished.get(node.id) }];
      store.touch(node);
    }
    if (left.length) await kept(store.saveConversation(conversation));
  }
}

addEventListener(
  "storage",
  guarded(async ({ key, newValue }) => {
    // Another tab went away while it was writing an answer.
    if (key !== UNFINISHED || !newValue) return;
    await settle();
    draw();
  }),
);

const begin = guarded(async () => {
  state.conversations = (await kept(store.allConversations())) ?? [];
  await settle();
  // Of a page that crashed there is what it kept last. One that is still there says so, and then its answer goes on.
  for (const { nodes } of state.conversations) for (const node of nodes) if (node.status === "streaming") node.status = "stopped";
  store.tell("hello");
  draw();
});

composer.clear();
begin();
connect();
composer.editor.focus();
