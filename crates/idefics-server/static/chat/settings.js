// How answers are asked for, and how the page looks. Kept in this browser, the key only for this tab.

import { apiKey } from "./api.js";
import { local } from "./store.js";

const KEY = "idefics.settings";
const DEFAULTS = { temperature: 0, topP: 1, maxTokens: 512, seed: "", system: "", theme: "auto" };

export function loadSettings() {
  let kept = {};
  try {
    kept = JSON.parse(local.get(KEY)) ?? {};
  } catch {
    // Not ours, or broken: the defaults will do.
  }
  const settings = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    if (typeof kept[name] === typeof DEFAULTS[name]) settings[name] = kept[name];
  }
  return settings;
}

export function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** The fields of a request. */
export function requestFields(settings) {
  const fields = { temperature: settings.temperature, max_tokens: settings.maxTokens };
  if (settings.temperature > 0) fields.top_p = settings.topP;
  if (settings.seed !== "") fields.seed = Number(settings.seed);
  return fields;
}

/** The dialog of settings. Changes hold at once. */
export class SettingsDialog {
  constructor(dialog, settings) {
    this.dialog = dialog;
    this.settings = settings;
    this.form = dialog.querySelector("form");
    this.form.addEventListener("input", () => this.#read());
    dialog.querySelector("[data-reset]").addEventListener("click", () => {
      Object.assign(this.settings, DEFAULTS, { theme: this.settings.theme });
      this.#write();
      this.#keep();
    });
    this.#write();
  }

  open(field) {
    this.#write();
    this.dialog.showModal();
    if (field) this.form.elements[field].focus();
  }

  #write() {
    for (const name of Object.keys(DEFAULTS)) this.form.elements[name].value = this.settings[name];
    this.form.elements.apiKey.value = apiKey.get();
    this.#outputs();
  }

  #read() {
    const fields = this.form.elements;
    apiKey.set(fields.apiKey.value.trim());
    for (const [name, start] of Object.entries(DEFAULTS)) {
      const field = fields[name];
      // A number that is being typed is taken once it is one.
      if (field.checkValidity && !field.checkValidity()) continue;
      if (typeof start === "number") {
        if (field.value !== "") this.settings[name] = Number(field.value);
      } else this.settings[name] = field.value;
    }
    this.#outputs();
    this.#keep();
  }

  #outputs() {
    this.form.querySelector("#temperature-value").textContent =
      this.settings.temperature === 0 ? "0 – always the likeliest word" : String(this.settings.temperature);
    this.form.querySelector("#top-p-value").textContent = String(this.settings.topP);
    this.form.elements.topP.disabled = this.settings.temperature === 0;
  }

  #keep() {
    local.set(KEY, JSON.stringify(this.settings));
    applyTheme(this.settings.theme);
  }
}
