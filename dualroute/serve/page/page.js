"use strict";
// The page of `dualroute serve`: a chat with one model, or with two at the same time.  Texts are put in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const models = [];
let chats = []; // one for each pane: {model, messages, list}
let running = null; // AbortController while an answer comes

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

async function refused(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function findModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) {
    $("panes").replaceChildren(element("p", "pane error", await refused(response)));
    return;
  }
  models.splice(0, models.length, ...(await response.json()).data.filter((model) => model.writes));
  $("model").replaceChildren(...models.map((model) => new Option(model.id)));
  $("beside-label").hidden = models.length < 2;
  begin();
}

function begin() {
  stop();
  const first = models[$("model").selectedIndex];
  const shown = $("beside").checked ? [first, ...models.filter((model) => model !== first)] : [first];
  chats = shown.filter(Boolean).map((model) => {
    const list = element("section", "pane");
    list.append(element("h2", "", model.chats ? model.id : `${model.id} (continues texts)`));
    return { model, messages: [], list };
  });
  $("panes").replaceChildren(...chats.map((chat) => chat.list));
  $("text").focus();
}

function settings() {
  const given = { stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"]) {
    if ($(name).value !== "") given[name] = Number($(name).value);
  }
  return given;
}

function shownAtEnd(list, change) {
  const near = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
  change();
  if (near) list.scrollTop = list.scrollHeight;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function answer(chat, text, signal) {
  const system = $("system").value.trim();
  chat.messages.push({ role: "user", content: text });
  const turn = element("div", "turn assistant");
  const note = element("p", "note", "…");
  shownAtEnd(chat.list, () => chat.list.append(element("div", "turn user", text), turn, note));
  const body = { model: chat.model.id, ...settings() };
  if (chat.model.chats) body.messages = [...(system ? [{ role: "system", content: system }] : []), ...chat.messages];
  else body.prompt = text;
  const began = performance.now();
  let first = 0, tokens = 0, reason = "", written = "";
  try {
    const path = chat.model.chats ? "/v1/chat/completions" : "/v1/completions";
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await refused(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices?.[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const piece = choice.delta?.content ?? choice.text ?? "";
      if (piece) {
        first ||= performance.now();
        written += piece;
        shownAtEnd(chat.list, () => turn.append(piece));
      }
    }
    const seconds = (performance.now() - (first || began)) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = first ? `, first after ${((first - began) / 1000).toFixed(2)} s` : "";
    note.textContent = `${tokens} tokens${rate}${wait}${reason === "length" ? ", cut off at the limit" : ""}`;
  } catch (error) {
    const stopped = error.name === "AbortError";
    note.textContent = stopped ? "stopped" : error.message;
    note.classList.toggle("error", !stopped);
    if (!written) {
      chat.messages.pop(); // the question may be asked again
      return;
    }
  }
  chat.messages.push({ role: "assistant", content: written });
}

async function send() {
  const text = $("text").value;
  if (running || !text.trim() || !chats.length) return;
  running = new AbortController();
  $("text").value = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  await Promise.all(chats.map((chat) => answer(chat, text, running.signal)));
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("text").focus();
}

function stop() {
  running?.abort();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", begin);
$("model").addEventListener("change", begin);
$("beside").addEventListener("change", begin);
$("key").addEventListener("change", findModels);
$("toggle").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
});
findModels();
