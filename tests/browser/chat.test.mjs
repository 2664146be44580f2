// What a person can do in the web chat.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { composed, fixture, folder, lastAnswer, openBrowser, PHONE, pick, pictures, say, screenshot, transfer } from "./browser.mjs";
import { startStandIn } from "./stand-in.mjs";

/** A test with a server and a fresh browser, at whose end nothing has gone wrong in the page. */
function chatTest(name, work, { browser = {}, server = {} } = {}) {
  test(name, async () => {
    const standIn = await startStandIn(server);
    const opened = await openBrowser(standIn.url, browser);
    try {
      await work(opened.page, standIn, opened);
      assert.deepEqual(opened.problems, []);
    } catch (error) {
      await screenshot(opened.page, `failed ${name}`).catch(() => {});
      throw error;
    } finally {
      await opened.context.close();
      standIn.close();
    }
  });
}

const kinds = (body) => body.messages.at(-1).content.map((part) => (part.type === "text" ? part.text : part.image_url.url.slice(5, 15)));

chatTest("pictures stay in their place in the text, picked, dropped and pasted", async (page, server) => {
  await screenshot(page, "desktop welcome");
  await page.click("#composer");
  await page.keyboard.type("Is ");
  await pick(page, "444.jpg");
  await pictures(page, 1);
  await page.keyboard.type(" older than ");
  await transfer(page, "paste", "#composer", ["rgb.png"]);
  await pictures(page, 2);
  await page.keyboard.type(" or ");
  await transfer(page, "drop", "body", ["rgb.bmp"], { clientX: 5, clientY: 400 });
  await pictures(page, 3);
  await page.keyboard.type("?");
  assert.equal(await composed(page), "Is @ older than @ or @?");
  await screenshot(page, "desktop composing");
  await page.keyboard.press("Enter");
  const answer = await lastAnswer(page);
  assert.deepEqual(kinds(server.requests[0]), ["Is", "image/jpeg", "older than", "image/png;", "or", "image/bmp;", "?"]);
  assert.ok(answer.startsWith("I see “Is” [image/jpeg]"), answer);
  assert.equal(await page.locator("#title").innerText(), "Is … older than … or … ?");
  const sent = Buffer.from(server.requests[0].messages.at(-1).content[1].image_url.url.split(",")[1], "base64");
  assert.deepEqual(sent, readFileSync(fixture("444.jpg")), "a small picture is sent as it is");
  await page.waitForFunction(() => [...document.querySelectorAll(".picture img")].every((image) => image.complete && image.naturalWidth));
  await screenshot(page, "desktop with pictures");
  await page.click(".picture");
  await page.waitForSelector("#lightbox[open]");
  await screenshot(page, "desktop lightbox");
  const box = await page.locator("#lightbox").boundingBox();
  assert.ok(box.width < 300, `it is as wide as a small picture needs: ${box.width}`);
  await page.keyboard.press("Escape");
});

chatTest("pictures are moved and removed by keyboard and mouse", async (page) => {
  await page.click("#composer");
  await page.keyboard.type("one two three");
  await pick(page, "444.jpg");
  await pictures(page, 1);
  const island = page.locator(".island");
  await island.focus();
  await page.keyboard.press("ArrowLeft");
  assert.equal(await composed(page), "one two @three");
  await page.keyboard.press("ArrowLeft");
  assert.equal(await composed(page), "one @two three");
  await page.keyboard.press("ArrowRight");
  assert.equal(await composed(page), "one two@ three");
  await page.keyboard.press("ArrowRight");
  assert.equal(await composed(page), "one two three@");
  await page.waitForFunction(() => /moved right/.test(document.querySelector("#status").textContent));
  // Dragged to the start of the text.
  const { x, y } = await page.locator("#composer").boundingBox();
  await island.dragTo(page.locator("#composer"), { targetPosition: { x: 18, y: 44 } }).catch(() => {});
  const moved = await composed(page);
  assert.match(moved.replace("@", ""), /^one two three$/, moved);
  assert.ok(moved.indexOf("@") < 13, `${moved} at ${x},${y}`);
  await island.focus();
  await page.keyboard.press("Delete");
  assert.equal(await composed(page), "one two three");
  await pick(page, "444.jpg");
  await page.click(".island-remove");
  assert.equal(await composed(page), "one two three");
  await page.keyboard.press("End");
  await pick(page, "444.jpg");
  await pictures(page, 1);
  await page.keyboard.press("Backspace");
  assert.equal(await page.locator(".island").count(), 0, "backspace takes a picture as a character");
});

chatTest("answers come as they are written, and can be stopped", async (page, server) => {
  await say(page, "slow please");
  await page.waitForFunction(() => /word5/.test(document.querySelector(".from-model .text")?.textContent));
  assert.ok(await page.isVisible("#stop"));
  await screenshot(page, "desktop streaming");
  await page.keyboard.press("Escape");
  await page.waitForSelector("text=Stopped.");
  const text = await page.locator(".from-model .text").innerText();
  assert.match(text, /^word1 word2/);
  assert.ok(!/word200/.test(text));
  await page.waitForTimeout(200);
  assert.equal(server.open, 0, "the server is told");
  await say(page, "next");
  assert.match(await lastAnswer(page), /in turn 2/);
});

chatTest("an answer goes on while another conversation is looked at", async (page) => {
  await say(page, "slow please");
  await page.waitForFunction(() => /word3/.test(document.querySelector(".from-model .text")?.textContent));
  await page.click("#new");
  await say(page, "quick");
  assert.match(await lastAnswer(page), /quick/);
  await page.click(".open:has-text('slow please')");
  await page.waitForFunction(() => /word9/.test(document.querySelector(".from-model .text")?.textContent));
  await page.click("#stop");
  await page.waitForSelector("text=Stopped.");
});

chatTest("asking again and editing keep every version", async (page, server) => {
  await say(page, "first");
  await lastAnswer(page);
  await say(page, "second");
  await lastAnswer(page);
  await page.locator(".from-model").last().getByLabel("Answer again").click();
  await lastAnswer(page);
  assert.equal(await page.locator(".from-model").last().locator(".version").innerText(), "2 / 2");
  assert.deepEqual(server.requests[1].messages, server.requests[2].messages);
  // Editing the first message starts a branch; the old one is a click away.
  await page.locator(".from-user").first().hover();
  await page.locator(".from-user").first().getByLabel("Edit").click();
  await page.keyboard.type(" changed");
  await transfer(page, "paste", ".editing .editor", ["rgb.png"]);
  await page.waitForSelector(".editing .island[data-picture]");
  await screenshot(page, "desktop editing");
  await page.click(".editing >> text=Send");
  await page.waitForSelector(".editing", { state: "detached" });
  assert.match(await lastAnswer(page), /“first changed” \[image\/png;\] in turn 1/);
  assert.equal(await page.locator(".message").count(), 2);
  await page.locator(".from-user").first().getByLabel("Earlier version").click();
  assert.equal(await page.locator(".message").count(), 4);
  assert.match(await page.locator(".from-user").first().innerText(), /^first/);
  // Escape leaves a message as it was.
  await page.locator(".from-user").last().hover();
  await page.locator(".from-user").last().getByLabel("Edit").click();
  await page.keyboard.type("zzz");
  await page.keyboard.press("Escape");
  assert.equal((await page.locator(".from-user").last().locator(".text").innerText()).trim(), "second");
});

chatTest("arrow up in an empty field edits the last message", async (page) => {
  await say(page, "hello");
  await lastAnswer(page);
  await page.click("#composer");
  await page.keyboard.press("ArrowUp");
  await page.keyboard.type(" again");
  await page.keyboard.press("Enter");
  assert.match(await lastAnswer(page), /“hello again”/);
});

chatTest("answers are copied", async (page) => {
  await say(page, "say: copy me");
  await lastAnswer(page);
  await page.locator(".from-model").getByLabel("Copy").click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "copy me");
});

chatTest("conversations are kept, renamed and deleted", async (page, server) => {
  await page.click("#composer");
  await page.keyboard.type("Look at ");
  await pick(page, "444.jpg");
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  await page.click("#new");
  await say(page, "something else");
  await lastAnswer(page);
  await page.reload();
  await page.waitForSelector(".open >> nth=1");
  assert.deepEqual(await page.locator(".open .title").allInnerTexts(), ["something else", "Look at"]);
  await page.click(".open:has-text('Look at')");
  await page.waitForFunction(() => document.querySelector(".picture img")?.naturalWidth === 33);
  await say(page, "and now?");
  assert.match(await lastAnswer(page), /in turn 2/);
  assert.equal(server.requests.at(-1).messages[0].content[1].type, "image_url", "the kept picture is sent again");
  await page.hover("li.is-current");
  await page.click("li.is-current [aria-label^=Rename]");
  await page.keyboard.type("My dog");
  await page.keyboard.press("Enter");
  assert.equal(await page.locator("#title").innerText(), "My dog");
  await page.hover("li.is-current");
  await page.click("li.is-current [aria-label^=Delete]");
  await screenshot(page, "desktop delete");
  await page.click("#confirm >> text=Keep it");
  assert.equal(await page.locator(".open").count(), 2);
  await page.hover("li.is-current");
  await page.click("li.is-current [aria-label^=Delete]");
  await page.click("#confirm button[value=delete]");
  await page.waitForFunction(() => document.querySelectorAll(".open").length === 1);
  assert.ok(await page.isVisible("#welcome"));
  const left = await page.evaluate(
    () =>
      new Promise((resolve) => {
        const request = indexedDB.open("idefics-chat");
        request.onsuccess = () => {
          const all = request.result.transaction("pictures").objectStore("pictures").count();
          all.onsuccess = () => resolve(all.result);
        };
      }),
  );
  assert.equal(left, 0, "its pictures are gone too");
});

const messages = (page, count) => page.waitForFunction((count) => document.querySelectorAll(".message").length === count, count);

/** The same chat in another tab, with the latest conversation open. */
async function openTab({ url }, { context, problems }) {
  const tab = await context.newPage();
  tab.setDefaultTimeout(60_000);
  tab.on("pageerror", (error) => problems.push(`error in a tab: ${error.message}`));
  await tab.goto(url);
  await tab.click(".open");
  await tab.waitForSelector(".message");
  return tab;
}

chatTest("tabs follow each other", async (page, server, opened) => {
  await say(page, "first");
  await lastAnswer(page);
  const tab = await openTab(server, opened);
  await pick(page, "444.jpg");
  await pictures(page, 1);
  await say(page, "second");
  await messages(tab, 4);
  await tab.waitForFunction(() => document.querySelector(".picture img")?.naturalWidth === 33);
  await say(tab, "third");
  assert.match(await lastAnswer(tab), /in turn 3/);
  await messages(page, 6);
  await page.hover("li.is-current");
  await page.click("li.is-current [aria-label^=Rename]");
  await page.keyboard.type("Ours");
  await page.keyboard.press("Enter");
  await tab.waitForSelector("#title >> text=Ours");
  // An answer of one is waited for in the other, also in one that is opened meanwhile.
  await say(page, "slow please");
  const late = await openTab(server, opened);
  for (const other of [tab, late]) {
    await other.waitForSelector("#waiting >> text=Being answered in another tab");
    await other.click("#composer");
    await other.keyboard.type("early");
    await other.keyboard.press("Enter");
    assert.ok(await other.isDisabled("#send"));
  }
  await screenshot(tab, "desktop another tab");
  await page.waitForFunction(() => /word5/.test([...document.querySelectorAll(".from-model .text")].at(-1).textContent));
  assert.equal(server.requests.length, 4);
  await page.close();
  for (const other of [tab, late]) {
    await other.waitForSelector("text=Stopped.");
    assert.match(await other.locator(".from-model .text").last().innerText(), /word1 word2 word3/);
    assert.ok(await other.isEnabled("#send"));
  }
  // What is half written outlives the conversation that it was for.
  await tab.hover("li.is-current");
  await tab.click("li.is-current [aria-label^=Delete]");
  await tab.click("#confirm button[value=delete]");
  await late.waitForSelector("#notice >> text=deleted in another tab");
  assert.equal(await composed(late), "early");
  assert.equal(await late.locator(".open").count(), 0);
  await late.click("#composer");
  await late.keyboard.press("Enter");
  assert.match(await lastAnswer(late), /“early” in turn 1/);
});

chatTest("tabs that hear nothing of each other overwrite nothing", async (page, server, opened) => {
  await opened.context.addInitScript(() => delete globalThis.BroadcastChannel);
  await page.reload();
  await say(page, "first");
  await lastAnswer(page);
  const tab = await openTab(server, opened);
  await say(page, "second");
  await lastAnswer(page);
  await messages(tab, 2);
  await say(tab, "third");
  await messages(tab, 6);
  assert.match(await lastAnswer(tab), /in turn 3/);
  await page.hover("li.is-current");
  await page.click("li.is-current [aria-label^=Rename]");
  await page.keyboard.type("Ours");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#title >> text=Ours");
  await tab.locator(".from-model").last().getByLabel("Answer again").click();
  await tab.waitForSelector(".version >> text=2 / 2");
  await lastAnswer(tab);
  await tab.reload();
  await tab.click(".open:has-text('Ours')");
  await messages(tab, 6);
  // What was deleted elsewhere does not come back.
  await tab.hover("li.is-current");
  await tab.click("li.is-current [aria-label^=Delete]");
  await tab.click("#confirm button[value=delete]");
  await tab.waitForSelector("#conversations >> text=No conversations yet.");
  await say(page, "fourth");
  await page.waitForSelector("#notice >> text=deleted in another tab");
  assert.equal(await composed(page), "fourth");
  await tab.reload();
  await tab.waitForSelector("#conversations >> text=No conversations yet.");
});

chatTest("every conversation has its own half-written message", async (page, server) => {
  await say(page, "first");
  await lastAnswer(page);
  await page.keyboard.type("half of ");
  await transfer(page, "paste", "#composer", ["444.jpg"]);
  await pictures(page, 1);
  await page.click("#new");
  assert.equal(await composed(page), "");
  await page.keyboard.type("not begun");
  await page.click(".open:has-text('first')");
  await page.waitForSelector(".message");
  assert.equal(await composed(page), "half of @");
  await page.waitForFunction(() => document.querySelector(".island img").naturalWidth === 33);
  await page.click("#new");
  assert.equal(await composed(page), "not begun");
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  assert.deepEqual(kinds(server.requests.at(-1)), ["not begun"]);
  // One that waits for its pictures is sent to where it was written.
  await readSlowly(page);
  await page.click(".open:has-text('first')");
  await page.waitForFunction(() => document.querySelector("#title").textContent === "first");
  await transfer(page, "paste", "#composer", ["rgb.png"]);
  await page.keyboard.press("Enter");
  await page.click("#new");
  await page.keyboard.type("mine");
  while (server.requests.length < 3) await page.waitForTimeout(20);
  await page.click(".open:has-text('first')");
  await page.waitForSelector(".message >> nth=3");
  assert.match(await lastAnswer(page), /in turn 2/);
  assert.equal(await composed(page), "");
  assert.deepEqual(kinds(server.requests.at(-1)).slice(0, 2), ["half of", "image/jpeg"]);
  assert.equal(server.requests.at(-1).messages.at(-1).content.length, 3);
  await page.click("#new");
  assert.equal(await composed(page), "mine");
});

chatTest("a conversation that is deleted while it is answered stays deleted", async (page, server) => {
  await say(page, "slow please");
  await page.waitForFunction(() => /word3/.test(document.querySelector(".from-model .text")?.textContent));
  await page.hover("li.is-current");
  await page.click("li.is-current [aria-label^=Delete]");
  await page.click("#confirm button[value=delete]");
  await page.waitForSelector("#conversations >> text=No conversations yet.");
  await page.waitForTimeout(300);
  assert.equal(server.open, 0, "nobody waits for its answer");
  assert.equal(await page.locator(".open").count(), 0);
  await page.reload();
  await page.waitForSelector("#conversations >> text=No conversations yet.");
  assert.ok(await page.isVisible("#send"));
});

chatTest("an answer that the page left behind is kept as far as it came", async (page) => {
  await say(page, "slow please");
  await page.waitForFunction(() => /word5/.test(document.querySelector(".from-model .text")?.textContent));
  await page.reload();
  await page.click(".open:has-text('slow please')");
  await page.waitForSelector("text=Stopped.");
  assert.match(await page.locator(".from-model .text").innerText(), /word1 word2 word3/);
});

chatTest("nobody waits for the answer of a page that crashed", async (page) => {
  // A page that crashes says nothing of what it had.
  await page.evaluate(() => (Storage.prototype.setItem = () => {}));
  await say(page, "slow please");
  await page.waitForFunction(() => /word5/.test(document.querySelector(".from-model .text")?.textContent));
  await page.reload();
  await page.click(".open:has-text('slow please')");
  await page.waitForSelector("text=Stopped.");
  await page.keyboard.type("next");
  assert.ok(await page.isHidden("#waiting"));
  await page.keyboard.press("Enter");
  assert.match(await lastAnswer(page), /“next” in turn 1/);
});

chatTest("failures are told where they happen, and can be tried again", async (page, server) => {
  await say(page, "busy?");
  await page.waitForSelector(".failure");
  assert.match(await page.locator(".failure").innerText(), /16 requests are waiting already\. Try again in 7 seconds/);
  await page.click("#new");
  await say(page, "flaky, and a message that is told about");
  await page.waitForSelector(".failure >> text=The model failed");
  await screenshot(page, "desktop error");
  await page.click(".failure >> text=Try again");
  assert.match(await lastAnswer(page), /flaky/);
  assert.equal(await page.locator(".failure").count(), 0);
  assert.equal(await page.locator(".version").count(), 0, "a failure is no version");
  for (const [words, expected] of [
    ["too long", "2391 tokens"],
    ["break off", "The answer broke off."],
    ["lost line", "connection was lost"],
  ]) {
    await page.click("#new");
    await say(page, words);
    await page.waitForSelector(`.failure >> text=${expected}`);
  }
  assert.match(await page.locator(".from-model .text").innerText(), /^I see/, "what came before the failure stays");
  server.close();
  await page.click("#new");
  await say(page, "hello?");
  await page.waitForSelector(".failure >> text=cannot be reached");
});

chatTest("a message without an answer is no part of what follows", async (page, server) => {
  await say(page, "first");
  await lastAnswer(page);
  for (const words of ["busy?", "empty"]) {
    await say(page, words);
    await page.waitForSelector(words === "busy?" ? ".failure" : "text=had nothing to say");
  }
  await say(page, "never");
  await page.click("#stop");
  await page.waitForSelector("text=Stopped.");
  await say(page, "second");
  assert.match(await lastAnswer(page), /“second” in turn 2/);
  const { messages } = server.requests.at(-1);
  assert.deepEqual(messages.map((message) => message.role), ["user", "assistant", "user"]);
  assert.ok(messages[1].content.startsWith("I see “first”"), messages[1].content);
  // What got no answer is a version of what was asked in its stead.
  const last = page.locator(".from-user").last();
  assert.equal(await last.locator(".version").innerText(), "4 / 4");
  await screenshot(page, "desktop after a failure");
  for (let step = 0; step < 3; step += 1) await page.locator(".from-user").last().getByLabel("Earlier version").click();
  assert.match(await last.innerText(), /^busy/);
  assert.ok(await page.isVisible(".failure"));
  const download = page.waitForEvent("download");
  await page.click("#export");
  const path = join(folder("file"), "answered.jsonl");
  await (await download).saveAs(path);
  assert.deepEqual(readFileSync(path, "utf8").trim().split("\n").map((line) => JSON.parse(line).content[0].text), ["first", messages[1].content]);
  await page.click("#new");
  await say(page, "busy?");
  await page.waitForSelector(".failure");
  await page.click("#export");
  await page.waitForSelector("#notice >> text=no message has an answer");
});

chatTest("answers that were cut off go on", async (page, server) => {
  await say(page, "cut this");
  await page.waitForSelector("text=Cut off at the longest length.");
  const before = await page.locator(".from-model .text").innerText();
  await page.click("text=Go on");
  await page.waitForFunction(() => !document.querySelector(".from-model .remark"));
  assert.equal(await lastAnswer(page), `${before} and the rest.`);
  assert.deepEqual(server.requests[1].messages.at(-1), { role: "assistant", content: before });
  // The cut may be within a word: nothing comes between the parts, and nothing of them is lost.
  await page.click("#new");
  await say(page, "cut within a word, say: mid");
  await page.click("text=Go on");
  await lastAnswer(page);
  assert.equal(await page.locator(".from-model .text").textContent(), "middle  ends. ");
  await say(page, "next");
  assert.match(await lastAnswer(page), /in turn 2/);
  assert.equal(server.requests.at(-1).messages[1].content, "middle  ends. ");
  // Without a word there is nothing to go on with: it is asked again.
  await page.click("#new");
  await say(page, "cut empty");
  const asked = server.requests.length;
  await page.click("text=Go on");
  while (server.requests.length === asked) await page.waitForTimeout(20);
  assert.deepEqual(server.requests.at(-1).messages.map((message) => message.role), ["user"]);
  await page.click("#new");
  await say(page, "empty");
  await page.waitForSelector("text=had nothing to say");
});

chatTest("settings are sent with each message, and kept", async (page, server) => {
  await page.click("#open-settings");
  await page.locator("#field-temperature").fill("0.7");
  await page.locator("#field-top-p").fill("0.9");
  await page.locator("#field-max-tokens").fill("77");
  await page.locator("#field-seed").fill("5");
  await page.locator("#field-system").fill("Be brief.");
  await screenshot(page, "desktop settings");
  await page.click("#settings >> text=Done");
  await page.reload();
  await say(page, "hi");
  await lastAnswer(page);
  const { messages, temperature, top_p, max_tokens, seed, stream, model } = server.requests[0];
  assert.deepEqual([temperature, top_p, max_tokens, seed, stream, model], [0.7, 0.9, 77, 5, true, "idefics-9b-instruct"]);
  assert.deepEqual(messages[0], { role: "system", content: "Be brief." });
  await page.click("#open-settings");
  await page.locator("#field-max-tokens").fill("0");
  await page.click("[data-reset]");
  await page.click("#settings >> text=Done");
  await say(page, "hi");
  await lastAnswer(page);
  assert.equal(server.requests[1].temperature, 0);
  assert.equal(server.requests[1].max_tokens, 512);
  assert.equal(server.requests[1].messages[0].role, "user");
});

chatTest(
  "a server with a key asks for it, and the key is not kept on disk",
  async (page) => {
    await page.waitForSelector("#notice >> text=wants an API key");
    await screenshot(page, "desktop key");
    await page.click("#notice >> text=Enter the key");
    await page.keyboard.type("secret");
    await page.click("#settings >> text=Done");
    await page.waitForSelector("#model-name >> text=idefics-9b-instruct");
    assert.ok(await page.isHidden("#notice"));
    await say(page, "hi");
    assert.match(await lastAnswer(page), /I see/);
    assert.ok(!JSON.stringify(await page.evaluate(() => ({ ...localStorage }))).includes("secret"));
    await page.evaluate(() => sessionStorage.clear());
    await say(page, "again");
    await page.waitForSelector(".failure >> text=valid API key");
  },
  { server: { key: "secret" } },
);

chatTest("a server that is not ready is told, and asked again", async (page, server) => {
  server.ready = false;
  await page.reload();
  await page.waitForSelector("#notice >> text=being loaded");
  server.ready = true;
  await page.click("#notice >> text=Try again");
  await page.waitForSelector("#model-name >> text=idefics-9b-instruct");
  assert.ok(await page.isHidden("#notice"));
  await page.click("#model-name");
  await page.waitForSelector("#info >> text=2048 tokens");
  await screenshot(page, "desktop model");
});

chatTest("conversations go into files and come back", async (page, server) => {
  await page.click("#composer");
  await page.keyboard.type("Look at ");
  await pick(page, "444.jpg");
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  const download = page.waitForEvent("download");
  await page.click("#export");
  const path = join(folder("file"), "look.jsonl");
  await (await download).saveAs(path);
  const lines = readFileSync(path, "utf8").trim().split("\n").map((line) => JSON.parse(line));
  assert.deepEqual(lines.map((line) => line.role), ["user", "assistant"]);
  assert.ok(lines[0].content[1].image.startsWith("data:image/jpeg;base64,"));
  const chooser = page.waitForEvent("filechooser");
  await page.click("#import");
  await (await chooser).setFiles(path);
  await page.waitForFunction(() => document.querySelectorAll(".open").length === 2);
  await page.waitForFunction(() => document.querySelector(".picture img")?.naturalWidth === 33);
  await say(page, "and then?");
  assert.match(await lastAnswer(page), /in turn 2/);
  assert.equal(server.requests.at(-1).messages[0].content[1].type, "image_url");
  writeFileSync(path, '{"role": "assistant", "content": []}\n');
  const again = page.waitForEvent("filechooser");
  await page.click("#import");
  await (await again).setFiles(path);
  await page.waitForSelector("#notice >> text=Line 1: expected a message of the user");
});

/** Lets pictures take their time to be read. */
const readSlowly = (page) =>
  page.evaluate(() => {
    const read = createImageBitmap;
    window.createImageBitmap = async (...values) => {
      await new Promise((resolve) => setTimeout(resolve, 500));
      return read(...values);
    };
  });

chatTest("typing goes on while pictures are read, and the message waits for them", async (page, server) => {
  await readSlowly(page);
  await page.click("#composer");
  await page.keyboard.type("Is ");
  await transfer(page, "paste", "#composer", ["444.jpg"]);
  await page.keyboard.type(" old?");
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  assert.deepEqual(kinds(server.requests[0]), ["Is", "image/jpeg", "old?"]);
});

chatTest("a message that waits for its pictures is sent once", async (page, server) => {
  await readSlowly(page);
  await page.click("#composer");
  await page.keyboard.type("Is ");
  await transfer(page, "paste", "#composer", ["444.jpg"]);
  await page.keyboard.press("Enter");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#waiting:visible");
  assert.ok(await page.isDisabled("#send"));
  await screenshot(page, "desktop waiting");
  await lastAnswer(page);
  assert.ok(await page.isHidden("#waiting"));
  assert.equal(await page.locator(".message").count(), 2);
  assert.equal(await page.locator(".version").count(), 0);
  await page.locator(".from-user").getByLabel("Edit").click();
  await page.keyboard.type(" and ");
  await transfer(page, "paste", ".editing .editor", ["rgb.png"]);
  await page.keyboard.press("Enter");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".editing-tools >> text=Waiting for the pictures");
  await screenshot(page, "desktop editing waits");
  await page.waitForSelector(".editing", { state: "detached" });
  await lastAnswer(page);
  assert.equal(await page.locator(".from-user .version").innerText(), "2 / 2");
  assert.equal(server.requests.length, 2);
  assert.deepEqual(kinds(server.requests[1]), ["Is", "image/jpeg", "and", "image/png;"]);
});

chatTest("a message does not leave without a picture that cannot be read", async (page, server) => {
  await readSlowly(page);
  const path = join(folder("pictures"), "words.png");
  writeFileSync(path, "no picture");
  await page.click("#composer");
  await page.keyboard.type("Is this old?");
  await transfer(page, "paste", "#composer", [path]);
  await page.keyboard.press("Enter");
  await page.waitForSelector("#notice >> text=words.png");
  await page.waitForSelector("#send:not([aria-busy=true])");
  assert.equal(server.requests.length, 0);
  assert.equal(await composed(page), "Is this old?");
  await page.keyboard.press("Enter");
  assert.match(await lastAnswer(page), /“Is this old\?” in turn 1/);
});

chatTest("huge and turned pictures are drawn anew, and what is no picture is refused", async (page, server) => {
  const made = folder("pictures");
  const huge = join(made, "huge.png");
  const data = await page.evaluate(async () => {
    const canvas = new OffscreenCanvas(5000, 2500);
    canvas.getContext("2d").fillRect(0, 0, 2500, 2500);
    const bytes = new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer());
    return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
  });
  writeFileSync(huge, Buffer.from(data, "base64"));
  const text = join(made, "words.png");
  writeFileSync(text, "no picture");
  await pick(page, text);
  await page.waitForSelector("#notice >> text=words.png");
  await page.click("#notice [aria-label=Dismiss]");
  await pick(page, huge, "orientation_6.jpg");
  await pictures(page, 2);
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  const sizes = await page.evaluate(
    (urls) =>
      Promise.all(
        urls.map(async (url) => {
          const image = new Image();
          image.src = url;
          await image.decode();
          return [image.naturalWidth, image.naturalHeight];
        }),
      ),
    server.requests[0].messages[0].content.map((part) => part.image_url.url),
  );
  assert.deepEqual(sizes[0], [2048, 1024]);
  const sent = Buffer.from(server.requests[0].messages[0].content[1].image_url.url.split(",")[1], "base64");
  assert.ok(!sent.includes("Exif"), "it is upright by itself");
});

chatTest("everything is reached by keyboard and has a name", async (page) => {
  await say(page, "hello");
  await lastAnswer(page);
  const nameless = await page.evaluate(() =>
    [...document.querySelectorAll("button, input:not([hidden]), textarea, select, [role=textbox]")]
      .filter((it) => !(it.getAttribute("aria-label") || it.textContent.trim() || it.labels?.length))
      .map((it) => it.outerHTML),
  );
  assert.deepEqual(nameless, []);
  await page.waitForFunction(() => /The model says: I see/.test(document.querySelector("#status").textContent));
  await page.keyboard.press("Escape");
  await page.locator("#title").click();
  await page.keyboard.press("/");
  assert.equal(await page.evaluate(() => document.activeElement.id), "composer");
  const reached = new Set();
  for (let step = 0; step < 40; step += 1) {
    await page.keyboard.press("Tab");
    reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.getAttribute("aria-label") || document.activeElement.className));
  }
  for (const expected of ["composer", "pick", "new", "open-settings", "model-name", "export", "Copy", "Edit", "Answer again", "log"]) {
    assert.ok(reached.has(expected), `${expected} is not reached: ${[...reached]}`);
  }
  await page.locator("#open-settings").focus();
  await page.keyboard.press("Enter");
  await page.keyboard.press("Escape");
  assert.equal(await page.evaluate(() => document.activeElement.id), "open-settings", "the focus comes back");
});

chatTest("without the browser's storage the chat still works, and says so", async (page, server) => {
  await page.addInitScript(() => {
    IDBFactory.prototype.open = () => {
      throw new DOMException("no storage", "SecurityError");
    };
  });
  await page.reload();
  await page.waitForSelector("#notice >> text=keeps nothing");
  await page.click("#composer");
  await pick(page, "444.jpg");
  await pictures(page, 1);
  await page.keyboard.type("hi");
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  await page.click("#new");
  await page.click(".open:has-text('hi')");
  await say(page, "again");
  await page.waitForFunction(() => /in turn 2/.test(document.querySelector(".message:last-child")?.textContent));
  assert.equal(server.requests.at(-1).messages[0].content[0].type, "image_url");
});

chatTest(
  "where the browser blocks what pages keep, the chat works until it is closed",
  async (page, server) => {
    await page.addInitScript(() => {
      const refuse = () => {
        throw new DOMException("Access is denied for this document.", "SecurityError");
      };
      for (const name of ["localStorage", "sessionStorage", "indexedDB"]) Object.defineProperty(window, name, { get: refuse });
      window.BroadcastChannel = function BroadcastChannel() {
        refuse();
      };
    });
    await page.reload();
    await page.click("#notice >> text=Enter the key");
    await page.keyboard.type("secret");
    await page.locator("#field-max-tokens").fill("7");
    await page.selectOption("#field-theme", "dark");
    await page.click("#settings >> text=Done");
    await page.waitForSelector("#model-name >> text=idefics-9b-instruct");
    await say(page, "hi");
    assert.match(await lastAnswer(page), /“hi” in turn 1/);
    assert.equal(server.requests[0].max_tokens, 7);
    await page.click("#open-settings");
    assert.equal(await page.inputValue("#field-key"), "secret");
    assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
    await page.locator("#field-key").fill("");
    await page.click("#settings >> text=Done");
    await page.waitForSelector("#notice >> text=wants an API key");
  },
  { server: { key: "secret" } },
);

chatTest("text is never markup, and keeps its lines", async (page) => {
  await page.click("#composer");
  await page.keyboard.type("say: <img src=x onerror=alert(1)>");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("second line");
  await page.keyboard.press("Enter");
  await lastAnswer(page);
  assert.equal(await page.locator(".message img").count(), 0);
  assert.match(await page.locator(".from-user .text").innerText(), /<img src=x onerror=alert\(1\)>\nsecond line/);
});

chatTest(
  "it follows the dark of the system",
  async (page) => {
    await page.click("#composer");
    await page.keyboard.type("What do ");
    await pick(page, "444.jpg");
    await page.keyboard.type(" and ");
    await pick(page, "rgb.png");
    await page.keyboard.type(" have in common?");
    await page.keyboard.press("Enter");
    await lastAnswer(page);
    await page.waitForFunction(() => [...document.querySelectorAll(".picture img")].every((image) => image.complete));
    await screenshot(page, "desktop dark");
    const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    assert.equal(await paper(), "rgb(26, 26, 25)");
    await page.click("#open-settings");
    await screenshot(page, "desktop dark settings");
    await page.selectOption("#field-theme", "light");
    assert.equal(await paper(), "rgb(251, 250, 248)");
    await page.selectOption("#field-theme", "dark");
    await page.click("#settings >> text=Done");
    await say(page, "busy?");
    await page.waitForSelector(".failure");
    await screenshot(page, "desktop dark error");
  },
  { browser: { colorScheme: "dark" } },
);

chatTest(
  "it works on a phone",
  async (page) => {
    await screenshot(page, "phone welcome");
    await page.tap("#composer");
    await page.keyboard.type("Who is that?");
    await page.keyboard.press("Enter");
    await page.keyboard.type("And there?");
    await pick(page, "444.jpg");
    await screenshot(page, "phone composing");
    await page.tap("#send");
    await lastAnswer(page);
    await page.waitForFunction(() => [...document.querySelectorAll(".picture img")].every((image) => image.complete));
    assert.match(await page.locator(".from-user .text").first().innerText(), /Who is that\?\nAnd there\?/);
    await screenshot(page, "phone");
    await page.tap("#menu");
    await page.waitForTimeout(300);
    await screenshot(page, "phone conversations");
    await page.tap("#scrim", { position: { x: 370, y: 400 } });
    await page.waitForTimeout(300);
    await page.tap("#open-settings");
    await screenshot(page, "phone settings");
    const done = await page.locator("#settings >> text=Done").boundingBox();
    assert.ok(done.y + done.height <= PHONE.height, `it can be left without scrolling: ${done.y}`);
    await page.selectOption("#field-theme", "dark");
    await page.tap("#settings >> text=Done");
    await page.tap("#composer");
    await page.keyboard.type("busy?");
    await page.tap("#send");
    await page.waitForSelector(".failure");
    await page.waitForTimeout(300);
    await screenshot(page, "phone dark error");
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= PHONE.width, `nothing is wider than the screen: ${width}`);
  },
  { browser: { viewport: PHONE, isPhone: true } },
);
