// A browser for the tests, and what a person does in it.

import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export const DESKTOP = { width: 1200, height: 800 };
export const PHONE = { width: 390, height: 780 };

const RUN = mkdtempSync(join(tmpdir(), "idefics-browser-"));
process.on("exit", () => rmSync(RUN, { recursive: true, force: true, maxRetries: 3 }));

/** A new folder, which is gone when the tests end. */
export const folder = (name) => mkdtempSync(join(RUN, `${name}-`));

/** An empty profile; a page that asks anything of anywhere but `url` fails the test. */
export async function openBrowser(url, { viewport = DESKTOP, colorScheme = "light", isPhone = false, profile } = {}) {
  const context = await chromium.launchPersistentContext(profile ?? folder("profile"), {
    executablePath: process.env.CHROMIUM,
    headless: true,
    args: FLAGS,
    viewport,
    colorScheme,
    hasTouch: isPhone,
    isMobile: isPhone,
    acceptDownloads: true,
  });
  await context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const page = context.pages()[0] ?? (await context.newPage());
  // A limit for what hangs, not for slow machines.
  page.setDefaultTimeout(60_000);
  const problems = [];
  page.on("pageerror", (error) => problems.push(`error in the page: ${error.message}`));
  page.on("console", (message) => {
    // A refused request is logged by the browser; those are asked for.
    const isExpected = /Failed to load resource/.test(message.text());
    if (message.type() === "error" && !isExpected) problems.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    const isOwn = request.url().startsWith(url) || /^(blob|data):/.test(request.url());
    if (!isOwn) problems.push(`request to ${request.url()}`);
  });
  await page.goto(url);
  await page.waitForFunction(() => !document.querySelector("#model-name").textContent.startsWith("Connecting"));
  return { context, page, problems };
}

export const fixture = (name) => fileURLToPath(new URL(`../../fixtures/processor/${name}`, import.meta.url));

export const screenshot = (page, name) => page.screenshot({ path: join(process.env.SCREENSHOTS, `${name}.png`) });

/** Picks files as with the dialog of the system. */
export async function pick(page, ...names) {
  const chooser = page.waitForEvent("filechooser");
  await page.click("#pick");
  await (await chooser).setFiles(names.map((name) => (name.includes("/") ? name : fixture(name))));
}

/** Waits until so many pictures are in the field. */
export const pictures = (page, count) =>
  page.waitForFunction((count) => document.querySelectorAll(".island[data-picture]").length === count, count);

/** Drops or pastes files, as the browser would hand them over. */
export async function transfer(page, kind, selector, names, at = null) {
  const files = names.map((name) => ({ name, data: readFileSync(name.includes("/") ? name : fixture(name)).toString("base64") }));
  await page.evaluate(
    ({ kind, selector, files, at }) => {
      const data = new DataTransfer();
      for (const { name, data: base64 } of files) {
        const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
        const type = { jpg: "image/jpeg", png: "image/png", bmp: "image/bmp", webp: "image/webp", gif: "image/gif" }[name.split(".").at(-1)];
        data.items.add(new File([bytes], name.split("/").at(-1), { type }));
      }
      const target = document.querySelector(selector);
      const where = at ?? (({ x, y }) => ({ clientX: x + 20, clientY: y + 10 }))(target.getBoundingClientRect());
      const event =
        kind === "paste"
          ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
          : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true, ...where });
      target.dispatchEvent(event);
    },
    { kind, selector, files, at },
  );
}

export async function say(page, text) {
  await page.click("#composer");
  await page.keyboard.type(text);
  await page.keyboard.press("Enter");
}

/** Waits until nothing is being written, and gives the text of the last answer. */
export async function lastAnswer(page) {
  await page.waitForFunction(() => {
    const isQuiet = document.querySelector("#stop").hidden && document.querySelector("#send").ariaBusy !== "true";
    return isQuiet && document.querySelector(".from-model");
  });
  return page.locator(".from-model").last().locator(".text").innerText();
}

/** What stands in the field: words, and `@` for a picture. */
export const composed = (page, selector = "#composer") =>
  page.locator(selector).evaluate((editor) => {
    const read = (node) =>
      node.dataset?.picture ? "@" : node.nodeName === "BR" ? "\n" : node.nodeType === 3 ? node.data : [...node.childNodes].map(read).join("");
    return read(editor);
  });
