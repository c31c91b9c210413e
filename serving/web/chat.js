// The conversation: what was said, what comes, and what a person does with it.
"use strict";

const at = (id) => document.getElementById(id);
const root = document.documentElement, log = at("log"), scroll = at("scroll"), text = at("text");
const ICONS = {
  copy: "M9 9h10v10H9zM5 15V5h10", retry: "M20 12a8 8 0 1 1-2.3-5.7M20 4v5h-5", edit: "m5 19 1-4L16 5l3 3L9 18z",
  close: "m7 7 10 10M17 7 7 17",
};
const EXAMPLES = ["Explain what a mixture of experts is, in a table.", "Write a function that merges two sorted lists.", "What is in this image?"];
const LARGEST = 1344;  // pixels of an image's longer side that are sent
let messages = [], pending = [], running = null, model = "", takesImages = true;

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function iconButton(name, label, action) {
  const button = make("button", { class: "icon", type: "button", "aria-label": label, title: label }, icon(name));
  button.addEventListener("click", () => action(button));
  return button;
}

function stored(name, value) {
  try {
    if (value === undefined) return sessionStorage.getItem(name) ?? "";
    sessionStorage.setItem(name, value);
  } catch { /* storage is off, or full */ }
  return value ?? "";
}

// Turns

function wordsOf(message) {
  return typeof message.content === "string" ? message.content : message.content.filter((part) => part.type === "text").map((part) => part.text).join("\n");
}

function picturesOf(message) {
  return typeof message.content === "string" ? [] : message.content.filter((part) => part.type === "image_url").map((part) => part.image_url.url);
}

function draw() {
  log.replaceChildren(...messages.map(drawTurn));
  at("empty").hidden = messages.length > 0;
  stored("messages", JSON.stringify(messages));
}

function drawTurn(message, number) {
  const turn = make("article", { class: "turn " + message.role }), tools = make("div", { class: "tools" });
  message.element = () => turn;
  if (message.role === "user") {
    const pictures = picturesOf(message), words = wordsOf(message);
    if (pictures.length) turn.append(make("div", { class: "pictures" }, ...pictures.map((src) => make("img", { src, alt: "Image of this message" }))));
    if (words) turn.append(make("div", { class: "body" }, words));
    tools.append(iconButton("copy", "Copy", (button) => copyText(words, button)), iconButton("edit", "Edit", () => edit(number)));
    turn.append(tools);
    return turn;
  }
  const answer = make("div", { class: "answer" });
  turn.append(answer);
  if (message.content) renderInto(answer, message.content);
  else if (!message.done) answer.append(make("span", { class: "waiting", "aria-label": "Waiting" }, make("i"), make("i"), make("i")));
  if (message.fault) turn.append(make("div", { class: "fault", role: "alert" }, message.fault));
  if (message.done) tools.append(iconButton("copy", "Copy", (button) => copyText(message.content, button)), iconButton("retry", "Try again", () => retry(number)));
  tools.append(make("span", { class: "figures" }, message.figures || ""));
  turn.append(tools);
  return turn;
}

function edit(number) {
  if (running) return;
  const message = messages[number], turn = log.children[number];
  const area = make("textarea", { class: "edit", "aria-label": "Edited message" });
  const cancel = make("button", { type: "button" }, "Cancel"), send = make("button", { type: "button", class: "primary" }, "Send");
  const finish = () => {
    const pictures = picturesOf(message);
    if (!area.value.trim() && !pictures.length) return;
    messages = messages.slice(0, number);
    ask(area.value.trim(), pictures);
  };
  area.value = wordsOf(message);
  cancel.addEventListener("click", () => { draw(); text.focus(); });
  send.addEventListener("click", finish);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); finish(); }
    if (event.key === "Escape") { event.stopPropagation(); draw(); text.focus(); }
  });
  turn.className += " editing";
  turn.replaceChildren(...turn.querySelectorAll(".pictures"), area, make("div", { class: "edit-row" }, cancel, send));
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function retry(number) {
  if (running) return;
  messages = messages.slice(0, number);
  answer();
}

// Asking

function ask(words, pictures) {
  const parts = [...pictures.map((url) => ({ type: "image_url", image_url: { url } })), ...(words ? [{ type: "text", text: words }] : [])];
  messages.push({ role: "user", content: pictures.length ? parts : words });
  answer();
}

function request() {
  const system = stored("system").trim(), temperature = parseFloat(stored("temperature")), most = parseInt(stored("max-tokens"));
  const said = messages.filter((each) => each.role === "user" || each.content).map(({ role, content }) => ({ role, content }));
  return {
    ...(model ? { model } : {}), stream: true, stream_options: { include_usage: true },
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    ...(temperature >= 0 ? { temperature } : {}), ...(most > 0 ? { max_completion_tokens: most } : {}),
  };
}

async function answer() {
  const body = request(), message = { role: "assistant", content: "", done: false };
  messages.push(message);
  running = new AbortController();
  root.classList.add("busy");
  at("send").setAttribute("aria-label", "Stop");
  at("send").title = "Stop (Esc)";
  draw();
  scroll.scrollTop = scroll.scrollHeight;
  let follows = true, frame = 0, usage = null, first = 0, last = 0, pieces = 0, reason = "";
  const started = performance.now();
  const turn = message.element(), shown = turn.querySelector(".answer"), figures = turn.querySelector(".figures");
  const watch = () => { follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60; };
  const show = () => {
    frame = 0;
    if (message.content) shown.querySelector(".waiting")?.remove();
    renderInto(shown, message.content);
    const rate = pieces > 1 ? ` · ${speed(pieces - 1, last - first)}` : "";
    figures.textContent = `${count(pieces, "token")}${rate}`;
    if (follows) scroll.scrollTop = scroll.scrollHeight;
  };
  scroll.addEventListener("scroll", watch);
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error(await faultOf(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message ?? "The server reports an error.");
      usage = event.usage ?? usage;
      const choice = event.choices?.[0], delta = choice?.delta?.content;
      reason = choice?.finish_reason ?? reason;
      if (!delta) continue;
      last = performance.now();
      first = first || last;
      pieces += 1;
      message.content += delta;
      frame = frame || requestAnimationFrame(show);
    }
    if (!reason && !usage) throw new Error("The answer ended early: the server has gone.");
  } catch (error) {
    if (running.signal.aborted) reason = "stopped";
    else message.fault = error instanceof TypeError ? "The server cannot be reached." : String(error.message || error);
  }
  cancelAnimationFrame(frame);
  scroll.removeEventListener("scroll", watch);
  message.done = true;
  message.figures = summary(usage, pieces, started, first, last, reason);
  running = null;
  root.classList.remove("busy");
  at("send").setAttribute("aria-label", "Send");
  at("send").title = "Send (Enter)";
  show();
  message.element().replaceWith(drawTurn(message, messages.indexOf(message)));
  stored("messages", JSON.stringify(messages));
  if (follows) scroll.scrollTop = scroll.scrollHeight;
  update();
}

function headers() {
  const key = stored("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function faultOf(response) {
  const said = await response.text();
  let message = `The server answers ${response.status}.`;
  try { message = JSON.parse(said).error.message ?? message; } catch { /* no JSON */ }
  if (response.status === 401 || response.status === 403) return `${message} Give an API key in the settings.`;
  const after = response.headers.get("Retry-After");
  return response.status === 429 && after ? `${message} Try again in ${after} s.` : message;
}

async function* events(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    held += decoder.decode(value ?? new Uint8Array(), { stream: !done });
    const lines = held.split(/\r\n|\n|\r(?!$)/);
    held = done ? "" : lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) return;
  }
}

const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
const speed = (tokens, milliseconds) => `${(tokens / Math.max(milliseconds, 1) * 1000).toFixed(tokens / milliseconds < 0.02 ? 1 : 0)} tokens/s`;

function summary(usage, pieces, started, first, last, reason) {
  const tokens = usage?.completion_tokens ?? pieces, parts = [count(tokens, "token")];
  if (tokens > 1 && last > first) parts.push(speed(tokens - 1, last - first));
  if (first) parts.push(`first after ${((first - started) / 1000).toFixed(2)} s`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`${cached ? `${cached.toLocaleString("en")} of ` : ""}${count(usage.prompt_tokens, "prompt token")}${cached ? " cached" : ""}`);
  if (reason === "length") parts.push("cut off by the limit");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

// Images

async function addFiles(files) {
  if (!takesImages) return notice("This model takes text only.");
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    try {
      pending.push(await smaller(file));
    } catch {
      notice(`${file.name || "The image"} cannot be read.`);
    }
  }
  drawPending();
  text.focus();
}

async function smaller(file) {
  const image = await createImageBitmap(file), scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
  const canvas = make("canvas", { width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale)) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return file.type === "image/png" && canvas.width * canvas.height < 5e5 ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.92);
}

function drawPending() {
  at("images").hidden = !pending.length;
  at("images").replaceChildren(...pending.map((src, number) => {
    const gone = make("button", { type: "button", "aria-label": "Remove this image" }, icon("close"));
    gone.addEventListener("click", () => { pending.splice(number, 1); drawPending(); });
    return make("figure", {}, make("img", { src, alt: `Image ${number + 1} to be sent` }), gone);
  }));
  update();
}

function notice(words) {
  text.setCustomValidity(words);
  text.reportValidity();
  setTimeout(() => text.setCustomValidity(""), 2500);
}

// What a person does

function send() {
  const words = text.value.trim();
  if (running || (!words && !pending.length)) return;
  const pictures = pending;
  pending = [];
  text.value = "";
  drawPending();
  grow();
  ask(words, pictures);
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  update();
}

function update() {
  at("send").disabled = !running && !text.value.trim() && !pending.length;
  at("jump").hidden = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 240;
}

function theme(choice) {
  const dark = choice ? choice === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "dark" : "light";
}

async function readModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.ok) {
      const about = (await response.json()).data?.[0];
      model = about?.id ?? "";
      takesImages = about?.input_modalities?.includes("image") ?? true;
    }
  } catch { /* the first question says so */ }
  for (const each of document.querySelectorAll(".of-images")) each.hidden = !takesImages;
  at("model").textContent = model.split("/").pop();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort(); else send();
});
text.addEventListener("input", grow);
addEventListener("resize", grow);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  const asked = messages.findLastIndex((each) => each.role === "user");
  if (event.key === "ArrowUp" && !text.value && asked >= 0) { event.preventDefault(); edit(asked); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !at("settings").open) running.abort();
  if (event.altKey && event.code === "KeyN") { event.preventDefault(); at("new").click(); }
});
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  draw();
  update();
  text.focus();
});
at("attach").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => { addFiles([...at("file").files]); at("file").value = ""; });
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
  if (files.length && takesImages) { event.preventDefault(); addFiles(files); }
});
let over = 0;
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => { if (hasFiles(event) && takesImages) { over += 1; at("drop").hidden = false; } });
document.addEventListener("dragleave", () => { over = Math.max(0, over - 1); if (!over) at("drop").hidden = true; });
document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  over = 0;
  at("drop").hidden = true;
  if (event.dataTransfer?.files.length) { event.preventDefault(); addFiles([...event.dataTransfer.files]); }
});
scroll.addEventListener("scroll", update, { passive: true });
at("jump").addEventListener("click", () => { scroll.scrollTop = scroll.scrollHeight; });
at("theme").addEventListener("click", () => theme(stored("theme", root.dataset.theme === "dark" ? "light" : "dark")));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(stored("theme")));
at("open-settings").addEventListener("click", () => {
  for (const name of ["system", "temperature", "max-tokens", "key"]) at(name).value = stored(name);
  at("settings").showModal();
});
at("settings").addEventListener("close", () => {
  for (const name of ["system", "temperature", "max-tokens", "key"]) stored(name, at(name).value);
  readModel();
  text.focus();
});

for (const words of EXAMPLES) {
  const isOfImages = /image/.test(words), button = make("button", { type: "button", ...(isOfImages ? { class: "of-images" } : {}) }, words);
  button.addEventListener("click", () => {
    if (isOfImages) { text.value = words; at("file").click(); } else { text.value = ""; ask(words, []); }
    grow();
  });
  at("examples").append(button);
}
theme(stored("theme"));
try { messages = JSON.parse(stored("messages") || "[]").map((each) => ({ ...each, done: true })); } catch { messages = []; }
draw();
grow();
readModel();
scroll.scrollTop = scroll.scrollHeight;
