// The field where messages are written: text with pictures in it, in their place.
//
// An editable element. A picture is an island in the text (`contenteditable="false"`) that can be dragged, moved
// with the arrow keys and removed. What counts is read from the elements: parts() walks them in their order.

import { icon } from "./elements.js";

export class Composer {
  /**
   * @param {HTMLElement} editor
   * @param {{onSubmit: () => void, onChange: () => void, onFiles: (files: File[]) => void,
   *   onCancel?: () => void, announce: (text: string) => void, url: (picture: object) => string}} how
   */
  constructor(editor, how) {
    this.editor = editor;
    this.how = how;
    /** Where a picture goes if the field has lost the focus to a dialog of files. */
    this.lastRange = null;
    editor.addEventListener("keydown", (event) => this.#onKey(event));
    editor.addEventListener("paste", (event) => this.#onPaste(event));
    editor.addEventListener("input", () => this.#changed());
    editor.addEventListener("dragstart", (event) => this.#onDragStart(event));
    editor.addEventListener("dragend", () => this.#endDrag());
    document.addEventListener("selectionchange", this.#remember);
  }

  /** To be called before the element goes. */
  close() {
    document.removeEventListener("selectionchange", this.#remember);
  }

  #remember = () => {
    const selection = getSelection();
    if (selection.rangeCount && this.editor.contains(selection.anchorNode)) {
      this.lastRange = selection.getRangeAt(0).cloneRange();
    }
  };

  /** Takes what is written out of the field, to be put back later. Pictures that are being read find their place in it. */
  take() {
    const draft = document.createDocumentFragment();
    draft.append(...this.editor.childNodes);
    this.clear();
    return draft;
  }

  /** @param {DocumentFragment} [draft]  what `take` gave; none for an empty field */
  put(draft) {
    this.clear();
    if (draft) this.editor.append(draft);
    this.#changed();
  }

  /** What is written, pictures and words. */
  parts() {
    return partsOf(this.editor);
  }

  isEmpty() {
    return this.parts().length === 0;
  }

  clear() {
    this.editor.replaceChildren();
    this.lastRange = null;
    this.#changed();
  }

  /** Puts a message in, to be changed. */
  fill(parts, pictures) {
    this.editor.replaceChildren();
    for (const part of parts) {
      if (part.type === "image") {
        const picture = pictures.get(part.id);
        if (picture) this.editor.append(this.#island(picture));
      } else {
        part.text.split("\n").forEach((line, index) => {
          if (index) this.editor.append(document.createElement("br"));
          this.editor.append(line);
        });
      }
    }
    this.#changed();
  }

  /** @param {FocusOptions} [options] */
  focusAtEnd(options) {
    this.editor.focus(options);
    const selection = getSelection();
    selection.selectAllChildren(this.editor);
    selection.collapseToEnd();
  }

  /** Keeps a place for a picture where the caret is, or was, while it is read and the writer goes on. */
  reserve(name) {
    const range = this.#place();
    this.editor.focus();
    range.deleteContents();
    const place = document.createElement("span");
    place.className = "island is-loading";
    place.contentEditable = "false";
    place.title = name;
    range.insertNode(place);
    this.#caretBehind(place);
    this.#changed();
    return place;
  }

  /** Puts a picture into its place, unless that was deleted meanwhile; without a picture the place goes. */
  settle(place, picture) {
    if (!place.parentNode) return;
    if (picture) {
      // The element stays: putting another in its stead would move the caret in front of it.
      this.#island(picture, place);
      if (place.isConnected) this.how.announce(`Picture added: ${picture.name}`);
    } else place.remove();
    this.#changed();
  }

  insertText(text) {
    this.editor.focus();
    document.execCommand("insertText", false, text);
  }

  #place() {
    // What is remembered may lag behind what is typed.
    if (document.activeElement === this.editor) this.#remember();
    if (this.lastRange && this.editor.contains(this.lastRange.commonAncestorContainer)) return this.lastRange;
    const range = document.createRange();
    range.selectNodeContents(this.editor);
    range.collapse(false);
    // A break that only keeps an empty field open is no line.
    if (this.editor.childNodes.length === 1 && this.editor.firstChild.nodeName === "BR") {
      range.selectNodeContents(this.editor);
    }
    return range;
  }

  #caretBehind(node) {
    const range = document.createRange();
    range.setStartAfter(node);
    range.collapse(true);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    this.lastRange = range.cloneRange();
  }

  #island(picture, island = document.createElement("span")) {
    island.className = "island";
    island.removeAttribute("title");
    island.contentEditable = "false";
    island.draggable = true;
    island.dataset.picture = picture.id;
    island.tabIndex = 0;
    island.setAttribute("role", "group");
    island.setAttribute("aria-label", `Picture ${picture.name}. Left and right arrow move it, Delete removes it.`);
    const image = document.createElement("img");
    image.src = this.how.url(picture);
    image.alt = picture.name;
    image.draggable = false;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "island-remove";
    remove.tabIndex = -1;
    remove.setAttribute("aria-label", `Remove picture ${picture.name}`);
    remove.append(icon("close"));
    remove.addEventListener("click", () => this.#remove(island));
    island.addEventListener("keydown", (event) => this.#onIslandKey(event, island));
    island.append(image, remove);
    return island;
  }

  #remove(island) {
    this.#caretBehind(island);
    island.remove();
    this.editor.focus();
    this.#changed();
    this.how.announce("Picture removed");
  }

  /** One step: past a picture, or past a word. */
  #move(island, direction) {
    const before = direction < 0;
    let neighbour = before ? island.previousSibling : island.nextSibling;
    while (neighbour?.nodeType === Node.TEXT_NODE && neighbour.data === "") {
      const empty = neighbour;
      neighbour = before ? empty.previousSibling : empty.nextSibling;
      empty.remove();
    }
    if (!neighbour) return;
    if (neighbour.nodeType === Node.TEXT_NODE) {
      const text = neighbour.data;
      const step = before ? text.search(/\S+\s*$/) : text.length - text.replace(/^\s*\S+/, "").length;
      const at = step <= 0 && before ? 0 : step || text.length;
      const rest = neighbour.splitText(at);
      rest.before(island);
    } else if (before) neighbour.before(island);
    else neighbour.after(island);
    this.editor.normalize();
    island.focus();
    this.#changed();
    this.how.announce(`Picture moved ${before ? "left" : "right"}`);
  }

  #onIslandKey(event, island) {
    const action = {
      ArrowLeft: () => this.#move(island, -1),
      ArrowRight: () => this.#move(island, 1),
      Delete: () => this.#remove(island),
      Backspace: () => this.#remove(island),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  #onKey(event) {
    if (event.key === "Escape" && this.how.onCancel) {
      event.stopPropagation();
      this.how.onCancel();
    } else if (event.key === "Enter" && !event.isComposing) {
      event.preventDefault();
      // On a phone the key is the only way to a new line.
      const isPhone = matchMedia("(hover: none) and (pointer: coarse)").matches;
      const sends = event.ctrlKey || event.metaKey || (!event.shiftKey && !isPhone);
      if (sends) this.how.onSubmit();
      else document.execCommand("insertLineBreak");
    }
  }

  #onPaste(event) {
    event.preventDefault();
    const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (files.length) {
      this.how.onFiles(files);
      return;
    }
    const text = event.clipboardData.getData("text/plain").replaceAll("\r\n", "\n");
    text.split("\n").forEach((line, index) => {
      if (index) document.execCommand("insertLineBreak");
      if (line) document.execCommand("insertText", false, line);
    });
  }

  // ---------------------------------------------------------------- dragging a picture within the text

  #onDragStart(event) {
    this.dragged = event.target.closest?.(".island") ?? null;
    if (this.dragged) {
      event.dataTransfer.effectAllowed = "move";
      event.dataTransfer.setData("text/plain", "");
      this.dragged.classList.add("dragged");
    }
  }

  #endDrag() {
    this.dragged?.classList.remove("dragged");
    this.dragged = null;
  }

  /** Takes what is dropped at a point: a picture of this field is moved there, files are added there. */
  drop(event) {
    const range = rangeAt(event.clientX, event.clientY);
    const isInside = range && this.editor.contains(range.startContainer);
    if (this.dragged) {
      if (isInside && !this.dragged.contains(range.startContainer)) {
        range.insertNode(this.dragged);
        this.#caretBehind(this.dragged);
        this.editor.normalize();
        this.#changed();
      }
      this.#endDrag();
      return;
    }
    if (isInside && !range.startContainer.parentElement?.closest(".island")) {
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      this.lastRange = range;
    }
    const files = [...event.dataTransfer.files];
    if (files.length) this.how.onFiles(files);
    else if (event.dataTransfer.getData("text/plain")) this.insertText(event.dataTransfer.getData("text/plain"));
  }

  #changed() {
    // A lone break is what browsers leave in an empty field; it would hide the placeholder.
    const only = this.editor.childNodes.length === 1 ? this.editor.firstChild : null;
    if (only?.nodeName === "BR") only.remove();
    this.editor.classList.toggle("is-empty", this.editor.childNodes.length === 0);
    this.how.onChange();
  }
}

/** Text and pictures of a field, or of a draft, in their order; neighbouring texts are one. */
export function partsOf(root) {
  const parts = [];
  const text = (more) => {
    if (parts.at(-1)?.type === "text") parts.at(-1).text += more;
    else parts.push({ type: "text", text: more });
  };
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) text(node.data.replaceAll("\u00a0", " ").replaceAll("\u200b", ""));
    else if (node.dataset?.picture) parts.push({ type: "image", id: node.dataset.picture });
    else if (node.classList?.contains("is-loading")) return;
    else if (node.nodeName === "BR") text("\n");
    else {
      // Lines that a browser wraps in blocks of their own.
      if (node.nodeName === "DIV" && node !== root && parts.length) text("\n");
      node.childNodes.forEach(walk);
    }
  };
  walk(root);
  return parts
    .map((part) => (part.type === "text" ? { ...part, text: part.text.replace(/^[ \t]+|[ \t]+$/g, "") } : part))
    .map((part, index, all) => trimEnds(part, index, all.length))
    .filter((part) => part.type !== "text" || part.text !== "");
}

function trimEnds(part, index, length) {
  if (part.type !== "text") return part;
  let { text } = part;
  if (index === 0) text = text.trimStart();
  if (index === length - 1) text = text.trimEnd();
  return { ...part, text };
}

function rangeAt(x, y) {
  if (document.caretPositionFromPoint) {
    const position = document.caretPositionFromPoint(x, y);
    if (!position) return null;
    const range = document.createRange();
    range.setStart(position.offsetNode, position.offset);
    return range;
  }
  return document.caretRangeFromPoint?.(x, y) ?? null;
}
