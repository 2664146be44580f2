// The messages of a conversation on the page.

import { element, icon, iconButton } from "./elements.js";
import { childrenOf, pathOf, textOf } from "./store.js";

export class Thread {
  /**
   * @param {HTMLElement} list
   * @param {{url: (picture: object) => string, pictures: Map<string, object>, onRetry, onEdit, onBranch, onContinue,
   *   onOpenPicture, announce}} how
   */
  constructor(list, how) {
    this.list = list;
    this.how = how;
    this.conversation = null;
    /** The elements of the messages that are shown, by node. */
    this.shown = new Map();
    this.pending = new Set();
  }

  /** Shows a conversation from scratch. */
  show(conversation) {
    this.conversation = conversation;
    this.shown.clear();
    const path = pathOf(conversation);
    this.list.replaceChildren(...path.map((node, index) => this.#message(node, index === path.length - 1)));
  }

  elementOf(node) {
    return this.shown.get(node.id)?.root;
  }

  /** More of an answer is there. Drawn with the next frame, however fast it comes. */
  grow(node) {
    if (this.pending.has(node.id)) return;
    this.pending.add(node.id);
    requestAnimationFrame(() => {
      this.pending.delete(node.id);
      const shown = this.shown.get(node.id);
      if (shown?.text) {
        shown.text.textContent = textOf(node);
        shown.root.classList.toggle("is-waiting", textOf(node) === "");
      }
    });
  }

  /** A node changed its state: draws it anew. */
  refresh(node) {
    const shown = this.shown.get(node.id);
    if (!shown) return;
    const hadFocus = shown.root.contains(document.activeElement);
    const isLast = shown.root === this.list.lastElementChild;
    const fresh = this.#message(node, isLast);
    shown.root.replaceWith(fresh);
    if (hadFocus) fresh.querySelector("button")?.focus();
  }

  #message(node, isLast) {
    const isUser = node.role === "user";
    const body = element("div", { class: "body" });
    const shown = { root: null, text: null };
    if (isUser) body.append(...this.#userParts(node));
    else {
      shown.text = element("div", { class: "text", text: textOf(node) });
      body.append(shown.text);
      if (node.status !== "streaming" && textOf(node) === "") body.hidden = true;
      if (node.status === "streaming") body.append(element("span", { class: "caret", "aria-hidden": "true" }));
    }
    const root = element(
      "article",
      {
        class: `message ${isUser ? "from-user" : "from-model"}`,
        "aria-label": isUser ? "You" : "Model",
        "data-status": node.status,
      },
      body,
      this.#state(node),
      this.#actions(node, isLast),
    );
    if (node.status === "streaming") root.classList.add("is-streaming");
    root.classList.toggle("is-waiting", node.status === "streaming" && textOf(node) === "");
    shown.root = root;
    this.shown.set(node.id, shown);
    return root;
  }

  /** Words and pictures in their order: a picture stands in the text where it was put. */
  #userParts(node) {
    return node.parts.map((part) => {
      if (part.type === "text") return element("span", { class: "text", text: part.text });
      const picture = this.how.pictures.get(part.id);
      if (!picture) return element("span", { class: "lost", text: "[picture lost]" });
      const image = element("img", { src: this.how.url(picture), alt: picture.name, width: picture.width, height: picture.height });
      const label = `Open picture ${picture.name}`;
      const open = () => this.how.onOpenPicture(picture);
      return element("button", { type: "button", class: "picture", "aria-label": label, on: { click: open } }, image);
    });
  }

  /** What the end of an answer needs to say. */
  #state(node) {
    if (node.status === "error") {
      const retry = element("button", { type: "button", class: "button small", text: "Try again", on: { click: () => this.how.onRetry(node) } });
      const words = element("div", {}, element("strong", { text: "This went wrong. " }), node.error?.message ?? "");
      return element("div", { class: "failure", role: "alert" }, icon("warning"), words, retry);
    }
    if (node.status === "stopped") return element("p", { class: "remark", text: "Stopped." });
    if (node.status === "length") {
      const more = element("button", { type: "button", class: "link", text: "Go on", on: { click: () => this.how.onContinue(node) } });
      return element("p", { class: "remark" }, "Cut off at the longest length. ", more);
    }
    if (node.role === "assistant" && node.status === "done" && textOf(node) === "") {
      return element("p", { class: "remark", text: "The model had nothing to say." });
    }
    return null;
  }

  #actions(node, isLast) {
    if (node.status === "streaming") return null;
    const actions = element("div", { class: `actions${isLast ? " is-last" : ""}`, role: "group", "aria-label": "What to do with this message" });
    if (textOf(node)) actions.append(iconButton("copy", "Copy", (event) => this.#copy(node, event.currentTarget)));
    if (node.role === "user") actions.append(iconButton("edit", "Edit", () => this.how.onEdit(node)));
    else if (node.status !== "error") actions.append(iconButton("retry", "Answer again", () => this.how.onRetry(node)));
    actions.append(...this.#branches(node));
    if (node.usage && node.role === "assistant") actions.append(element("span", { class: "usage", text: usageOf(node) }));
    return actions;
  }

  /** Which of several versions this is. */
  #branches(node) {
    const versions = childrenOf(this.conversation, node.parent);
    if (versions.length < 2) return [];
    const index = versions.indexOf(node);
    const go = (step) => () => this.how.onBranch(node, versions[index + step]);
    return [
      iconButton("left", "Earlier version", go(-1), { disabled: index === 0 }),
      element("span", { class: "version", text: `${index + 1} / ${versions.length}`, "aria-label": `Version ${index + 1} of ${versions.length}` }),
      iconButton("right", "Later version", go(1), { disabled: index === versions.length - 1 }),
    ];
  }

  async #copy(node, button) {
    try {
      await navigator.clipboard.writeText(textOf(node));
    } catch {
      // Without a secure connection there is no clipboard to write to; the selection always works.
      const range = document.createRange();
      range.selectNodeContents(this.elementOf(node).querySelector(".body"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      if (!document.execCommand("copy")) return;
      getSelection().removeAllRanges();
    }
    button.replaceChildren(icon("check"));
    this.how.announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  }
}

function usageOf(node) {
  const { completion_tokens: tokens, prompt_tokens_details: details } = node.usage;
  const words = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (node.seconds > 0) words.push(`${node.seconds.toFixed(1)} s`);
  if (details?.cached_tokens) words.push(`${details.cached_tokens} from cache`);
  return words.join(" · ");
}
