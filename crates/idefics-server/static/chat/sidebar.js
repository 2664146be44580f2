// The list of conversations: open, rename, delete.

import { element, iconButton } from "./elements.js";

export class Sidebar {
  /** @param {HTMLElement} list */
  constructor(list, { onOpen, onRename, onDelete }) {
    this.list = list;
    this.how = { onOpen, onRename, onDelete };
  }

  /** @param {(conversation: object) => boolean} isBusy  whether it is being answered */
  show(conversations, current, isBusy) {
    const groups = new Map();
    for (const conversation of conversations) {
      const day = dayOf(conversation.updated);
      if (!groups.has(day)) groups.set(day, []);
      groups.get(day).push(conversation);
    }
    this.list.replaceChildren(
      ...[...groups].map(([day, members]) =>
        element(
          "section",
          { "aria-label": day },
          element("h2", { text: day }),
          element("ul", {}, ...members.map((it) => this.#entry(it, it.id === current, isBusy(it)))),
        ),
      ),
    );
    if (!conversations.length) this.list.replaceChildren(element("p", { class: "nothing", text: "No conversations yet." }));
  }

  #entry(conversation, isCurrent, isRunning) {
    const title = conversation.title || "New conversation";
    const open = element(
      "button",
      { type: "button", class: "open", "aria-current": isCurrent ? "true" : false, on: { click: () => this.how.onOpen(conversation.id) } },
      element("span", { class: "title", text: title }),
      isRunning ? element("span", { class: "running", role: "img", "aria-label": "is being answered" }) : null,
    );
    const entry = element("li", { class: isCurrent ? "is-current" : "" }, open);
    entry.append(
      iconButton("edit", `Rename ${title}`, () => this.#rename(entry, conversation)),
      iconButton("delete", `Delete ${title}`, () => this.how.onDelete(conversation)),
    );
    return entry;
  }

  #rename(entry, conversation) {
    const field = element("input", { type: "text", "aria-label": "New name", value: conversation.title, maxlength: "120" });
    let isDone = false;
    const finish = (keeps) => {
      if (isDone) return;
      isDone = true;
      const name = keeps ? field.value.trim() : "";
      this.how.onRename(conversation, name || conversation.title);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
      event.stopPropagation();
    });
    field.addEventListener("blur", () => finish(true));
    entry.replaceChildren(field);
    field.focus();
    field.select();
  }
}

function dayOf(time) {
  const start = new Date().setHours(0, 0, 0, 0);
  const day = 24 * 60 * 60 * 1000;
  if (time >= start) return "Today";
  if (time >= start - day) return "Yesterday";
  if (time >= start - 7 * day) return "Last seven days";
  return new Date(time).toLocaleDateString(undefined, { month: "long", year: "numeric" });
}

