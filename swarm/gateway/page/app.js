// The chat, and when the swarm is looked at. Text from outside only ever becomes text, never HTML.
import { ask, reason } from "./key.js";
import { showSwarm } from "./swarm.js";

const POLL_MS = 2000;
const $ = (id) => document.getElementById(id);
const turns = [];
let writing = null;
let chosenRun = "";

function addTurn(role, text) {
  $("hint").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.dir = "auto";
  turn.textContent = text;
  $("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function setWriting(controller) {
  writing = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("log").setAttribute("aria-busy", String(controller !== null));
}

// The JSON of each server-sent event of a stream.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request() {
  const option = $("model").selectedOptions[0];
  const common = {
    model: option ? option.value : "",
    stream: true,
    temperature: Number($("temperature").value),
    max_tokens: Math.max(1, Math.round(Number($("tokens").value))),
  };
  if (option && option.dataset.chat === "false") {
    return ["/v1/completions", { ...common, prompt: turns[turns.length - 1].content }];
  }
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  return ["/v1/chat/completions", { ...common, messages }];
}

async function write(turn, signal) {
  const [path, body] = request();
  const answer = await ask(path, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  if (!answer.ok) throw new Error(await reason(answer));
  for await (const event of eventsOf(answer)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    const log = $("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    if (choice) turn.textContent += (choice.delta ? choice.delta.content : choice.text) || "";
    if (follows) log.scrollTop = log.scrollHeight;
  }
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || writing) return;
  $("prompt").value = "";
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  turn.classList.add("waiting");
  const controller = new AbortController();
  setWriting(controller);
  try {
    await write(turn, controller.signal);
  } catch (error) {
    if (error.name !== "AbortError") addTurn("error", error.message);
  } finally {
    turn.classList.remove("waiting");
    if (turn.textContent) turns.push({ role: "assistant", content: turn.textContent });
    else {
      turn.remove();
      turns.pop();
    }
    setWriting(null);
    $("prompt").focus();
  }
}

function fill(select, values, chosen) {
  const there = [...select.options].map((option) => option.value);
  if (JSON.stringify(there) === JSON.stringify(values)) return;
  select.replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen)));
}

async function loadModels() {
  const answer = await ask("/v1/models");
  if (!answer.ok) throw new Error(await reason(answer));
  const models = (await answer.json()).data;
  fill($("model"), models.map((model) => model.id), $("model").value);
  models.forEach((model, i) => { $("model").options[i].dataset.chat = String(model.can_chat); });
}

function setState(words, kind) {
  $("state").textContent = words;
  $("state").className = `state ${kind}`;
}

async function look() {
  const answer = await ask("/api/swarm");
  if (!answer.ok) throw new Error(await reason(answer));
  const { runs } = await answer.json();
  const known = runs.filter((run) => run.looked_at !== null);
  $("run-picker").hidden = known.length < 2;
  fill($("run"), known.map((run) => run.run), chosenRun);
  [...$("run").options].forEach((option, i) => { option.textContent = known[i].name; });
  const run = known.find((each) => each.run === $("run").value) || known[0];
  if (!run) return;
  $("title").textContent = run.name;
  document.title = `${run.name} · swarm`;
  showSwarm(run);
  const gaps = run.unserved_blocks.length;
  if (gaps) setState(`${gaps} of ${run.blocks} blocks have no holder: no text until one comes`, "bad");
  else setState(`${run.hosts.length} ${run.hosts.length === 1 ? "host holds" : "hosts hold"} all ${run.blocks} blocks`, "good");
}

async function keepLooking() {
  for (;;) {
    if (!document.hidden) {
      try {
        await loadModels();
        await look();
      } catch (error) {
        setState(error instanceof TypeError ? "the gateway does not answer" : error.message, "bad");
      }
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => writing && writing.abort());
$("clear").addEventListener("click", () => {
  if (writing) writing.abort();
  turns.length = 0;
  [...$("log").querySelectorAll(".turn")].forEach((turn) => turn.remove());
  $("hint").hidden = false;
  $("prompt").focus();
});
$("run").addEventListener("change", () => { chosenRun = $("run").value; look().catch((error) => setState(error.message, "bad")); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && writing) writing.abort(); });
keepLooking();
