// Conversations and their pictures, in this browser's IndexedDB. Nothing of them leaves it but requests.
//
// A conversation is a tree: asking again or editing a message grows a branch, so that nothing is lost. A node is
// {id, parent, role, parts, status, error, usage}; `active` of a conversation names the chosen child of each node.

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

/** All conversations, the latest first. */
export async function allConversations() {
  const all = await done((await store("conversations", "readonly")).getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export async function saveConversation(conversation) {
  // As plain data: what is being written changes while it is kept.
  await done((await store("conversations", "readwrite")).put(structuredClone(conversation)));
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
}

/** @param {{id: string, conversation: string, blob: Blob, width: number, height: number, name: string}} picture */
export async function savePicture(picture) {
  await done((await store("pictures", "readwrite")).put(picture));
}

export async function picturesOf(conversation) {
  const index = (await store("pictures", "readonly")).index("conversation");
  return done(index.getAll(conversation));
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
  const added = { id: newId(), parent: parent ?? ROOT, status: "done", ...node };
  conversation.nodes.push(added);
  conversation.active[added.parent] = added.id;
  conversation.updated = Date.now();
  return added;
}

/** Puts another node in the place of one that failed or is of no use any more, with all that follows. */
export function removeNode(conversation, node) {
  const gone = new Set([node.id]);
  for (const other of conversation.nodes) if (gone.has(other.parent)) gone.add(other.id);
  conversation.nodes = conversation.nodes.filter((other) => !gone.has(other.id));
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
