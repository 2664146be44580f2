// Conversations and their pictures, in this browser's IndexedDB. Nothing of them leaves it but requests.
//
// A conversation is a tree: asking again or editing a message grows a branch, so that nothing is lost. A node is
// {id, parent, role, parts, status, error, usage}; `active` of a conversation names the chosen child of each node.
//
// Several tabs may have the same conversation. None overwrites another: what is saved is joined with what is there,
// node by node, and each tells the others what it saved. `revision` counts the changes of a node, `renamed` is when
// the title was changed, and `removed` are the nodes that must not come back.

const NAME = "idefics-chat";
const VERSION = 1;

let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      const pictures = request.result.createObjectStore("pictures", { keyPath: "id" });
      pictures.createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function store(name, mode) {
  return (await database()).transaction(name, mode).objectStore(name);
}

/** Conversations that were in the database: one that is there no more was deleted, by whichever tab. */
const known = new Set();

export const wasSaved = (id) => known.has(id);

/** All conversations, the latest first. */
export async function allConversations() {
  const all = await done((await store("conversations", "readonly")).getAll());
  for (const { id } of all) known.add(id);
  return all.sort((a, b) => b.updated - a.updated);
}

/** A conversation as it was last saved, by whichever tab; null if it is not there. */
export async function savedConversation(id) {
  const saved = await done((await store("conversations", "readonly")).get(id));
  if (saved) known.add(id);
  return saved ?? null;
}

/** Saves a conversation and takes over what other tabs saved of it. False if it was deleted. */
export async function saveConversation(conversation) {
  const { id } = conversation;
  const all = await store("conversations", "readwrite");
  const saved = await done(all.get(id));
  if (!saved && known.has(id)) return false;
  if (saved) join(conversation, saved);
  // As plain data: what is being written changes while it is kept.
  await done(all.put(structuredClone(conversation)));
  known.add(id);
  tell("saved", id);
  return true;
}

export async function deleteConversation(id) {
  const transaction = (await database()).transaction(["conversations", "pictures"], "readwrite");
  transaction.objectStore("conversations").delete(id);
  const pictures = transaction.objectStore("pictures");
  for (const key of await done(pictures.index("conversation").getAllKeys(id))) pictures.delete(key);
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = () => reject(transaction.error);
  });
  tell("deleted", id);
}

/** @param {{id: string, conversation: string, blob: Blob, width: number, height: number, name: string}} picture */
export async function savePicture(picture) {
  await done((await store("pictures", "readwrite")).put(picture));
}

export async function picturesOf(conversation) {
  const index = (await store("pictures", "readonly")).index("conversation");
  return done(index.getAll(conversation));
}

// ---------------------------------------------------------------- small things

/** Words that the browser keeps by name. Some refuse that, even to be asked for it; then the page remembers them. */
function words(open) {
  const memory = new Map();
  const attempt = (work, otherwise) => {
    try {
      return work(open());
    } catch {
      return otherwise();
    }
  };
  return {
    get: (key) => attempt((it) => it.getItem(key), () => null) ?? memory.get(key) ?? null,
    set: (key, text) => attempt((it) => it.setItem(key, text), () => memory.set(key, text)),
    remove: (key) => attempt((it) => it.removeItem(key), () => memory.delete(key)),
  };
}

/** For as long as the browser keeps it. */
export const local = words(() => localStorage);
/** For as long as the tab lives. */
export const session = words(() => sessionStorage);

// ---------------------------------------------------------------- other tabs

const channel = openChannel();

function openChannel() {
  try {
    return new BroadcastChannel(NAME);
  } catch {
    // Not there, or refused: then tabs learn of each other when they read and save.
    return null;
  }
}

/** Tells other tabs that a conversation was `saved` or `deleted`, or says `hello`. */
export function tell(kind, id) {
  channel?.postMessage({ kind, id });
}

/** @param {(message: {kind: string, id?: string}) => void} listener  hears what other tabs tell */
export function listen(listener) {
  channel?.addEventListener("message", (event) => listener(event.data));
}

/**
 * Takes what is newer in `saved` over into `conversation`, whose nodes stay the same objects.
 * @param {boolean} [prefersSaved]  which of two holds where neither is newer
 */
export function join(conversation, saved, prefersSaved = false) {
  const isNewer = (theirs = 0, own = 0) => theirs > own || (prefersSaved && theirs === own);
  const removed = new Set([...(conversation.removed ?? []), ...(saved.removed ?? [])]);
  const nodes = new Map(conversation.nodes.map((node) => [node.id, node]));
  for (const node of saved.nodes) {
    const own = nodes.get(node.id);
    if (!own) nodes.set(node.id, node);
    else if (isNewer(node.revision, own.revision)) Object.assign(own, node);
  }
  conversation.nodes = [...nodes.values()].filter((node) => !removed.has(node.id));
  conversation.removed = [...removed];
  conversation.active = prefersSaved ? { ...conversation.active, ...saved.active } : { ...saved.active, ...conversation.active };
  if (isNewer(saved.renamed, conversation.renamed)) Object.assign(conversation, { title: saved.title, renamed: saved.renamed });
  conversation.updated = Math.max(conversation.updated, saved.updated);
}

// ---------------------------------------------------------------- the tree

export const newId = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint32Array(4))].join("-");

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, nodes: [], active: {} };
}

const ROOT = "root";

export function childrenOf(conversation, parent) {
  return conversation.nodes.filter((node) => node.parent === (parent ?? ROOT));
}

/** The nodes that are shown, from the first to the last. */
export function pathOf(conversation) {
  const path = [];
  let at = ROOT;
  for (;;) {
    const children = childrenOf(conversation, at);
    if (!children.length) return path;
    const chosen = children.find((node) => node.id === conversation.active[at]) ?? children.at(-1);
    path.push(chosen);
    at = chosen.id;
  }
}

/** Adds a node under `parent` (none for the first message) and chooses it. */
export function addNode(conversation, parent, node) {
  const added = { id: newId(), parent: parent ?? ROOT, status: "done", revision: 1, ...node };
  conversation.nodes.push(added);
  conversation.active[added.parent] = added.id;
  conversation.updated = Date.now();
  return added;
}

/** To be called where a node is changed. */
export function touch(node) {
  node.revision = (node.revision ?? 0) + 1;
}

/** Puts another node in the place of one that failed or is of no use any more, with all that follows. */
export function removeNode(conversation, node) {
  const gone = new Set([node.id]);
  for (const other of conversation.nodes) if (gone.has(other.parent)) gone.add(other.id);
  conversation.nodes = conversation.nodes.filter((other) => !gone.has(other.id));
  conversation.removed = [...(conversation.removed ?? []), ...gone];
  if (conversation.active[node.parent] === node.id) delete conversation.active[node.parent];
}

export const textOf = (node) =>
  node.parts
    .filter((part) => part.type === "text")
    .map((part) => part.text)
    .join("");

/** Whether this is an answer that says nothing: it failed, was stopped at once, or was empty. */
export const isSilent = (node) => node?.role === "assistant" && textOf(node) === "";

/** `path` without the messages that got no words for an answer: a model that reads silence learns to be silent. */
export function answered(path) {
  return path.filter((node, index) => !isSilent(node) && !isSilent(path[index + 1]));
}
