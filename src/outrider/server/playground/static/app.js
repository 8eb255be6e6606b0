// The page: one request at a time, run or raced, shown token by token.

import { ServerError, key, stream } from "./api.js";
import { AcceptanceChart, swatch } from "./chart.js";
import { Poller, showState } from "./panel.js";
import { race, speed } from "./race.js";
import { described, drafting, mode } from "./request.js";
import { LAST_COLOUR, Replay, TokenView, origin, watchable } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const tokens = (number) => `${count(number)} token${number === 1 ? "" : "s"}`;
const perSecond = (deliveries) => (speed(deliveries) === null ? null : `${count(Math.round(speed(deliveries)))} tokens/s`);
const ONE_COLUMN = 960; // pixels: below, the output stands under what asks for it
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const page = {
  state: null, // as the server last told it
  running: null, // AbortController of what is under way
  turns: [], // of the conversation so far
  accepted: null, // rates of the run that is shown
  shown: null, // its lanes, for a replay
  keyless: false, // whether the key dialog was sent away
};

const chart = new AcceptanceChart($("chart"), $("rates"), $("lengths"));
const views = Object.fromEntries(["tokens", "without", "with"].map((id) => [id, new TokenView($(id), inspect)]));
const replay = new Replay();
const poller = new Poller(takeState, stateFailed);

// --- asking --------------------------------------------------------------------------------------------------------

/** Sends it. `told` is given each delivery: `{ at, tokens, acceptance }`, at milliseconds by the server's clock. */
async function send([path, body], speculative, told) {
  const limits = page.state?.model.num_speculative_tokens ? speculative : {};
  let usage = null;
  let reason = null;
  let content = ""; // what is the answer in the text, without the reasoning that the server tells apart
  const request = { ...body, speculative: { ...limits, return_tokens: true } };
  for await (const chunk of stream(path, request, page.running.signal)) {
    usage = chunk.usage ?? usage;
    const [choice] = chunk.choices;
    reason = choice?.finish_reason ?? reason;
    content += choice?.delta?.content ?? "";
    if (choice?.speculative) told({ ...choice.speculative, at: 1000 * choice.speculative.seconds });
  }
  return { usage, reason, content };
}

// --- running -------------------------------------------------------------------------------------------------------

/** Does `work` with the page set to running; what goes wrong is shown in words. */
async function busy(work) {
  if (page.running) return;
  replay.stop();
  page.running = new AbortController();
  complain(null);
  for (const id of ["run", "race"]) $(id).setAttribute("aria-disabled", "true");
  $("stop").hidden = false;
  $("replaying").hidden = true;
  $("fairness").hidden = true;
  say("running");
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else {
      say("");
      complain(error);
    }
  } finally {
    if (document.activeElement === $("stop")) $("run").focus();
    page.running = null;
    for (const id of ["run", "race"]) $(id).removeAttribute("aria-disabled");
    $("stop").hidden = true;
    poller.ask();
  }
}

function run() {
  return busy(async () => {
    const request = described(page.state?.model.id, page.turns);
    const asked = mode() === "chat" ? $("message").value : null;
    lay(false);
    showTurns(asked);
    const deliveries = [];
    let drawing = 0;
    let num_drawn = 0;
    const draw = () => {
      drawing = 0;
      const fresh = deliveries.slice(num_drawn);
      num_drawn = deliveries.length;
      views.tokens.add(fresh.flatMap((delivery) => delivery.tokens));
      if (fresh.length) accept(fresh.at(-1).acceptance);
    };
    let ended;
    try {
      ended = await send(request, drafting(), (delivery) => {
        deliveries.push(delivery);
        drawing ||= requestAnimationFrame(draw);
      });
    } finally {
      cancelAnimationFrame(drawing);
      draw();
    }
    const { usage, reason, content } = ended;
    const all = deliveries.flatMap((delivery) => delivery.tokens);
    accept(usage.speculative);
    const num_accepted = all.filter((token) => token.draft_position).length;
    const { drafts, acceptance_length: length } = usage.speculative;
    const fared = drafts ? `, ${count(num_accepted)} of them accepted drafts, ${length.toFixed(2)} tokens a round` : ", all the target’s own";
    const pace = perSecond(deliveries);
    say(`${tokens(all.length)}${fared}${pace ? `, ${pace}` : ""}; ended by ${reason}`);
    offerReplay([{ view: views.tokens, deliveries, tick() {} }]);
    if (asked !== null) remember(asked, content);
  });
}

function raced() {
  return busy(async () => {
    if (!page.state?.model.num_speculative_tokens) throw new ServerError("there is nothing to race: this server drafts nothing");
    const request = described(page.state?.model.id, page.turns);
    const [, body] = request;
    if (body.temperature !== 0 && body.seed === undefined) {
      body.seed = Math.floor(Math.random() * 1e6); // one for both, or they would be two texts
      $("seed").value = body.seed;
    }
    if (!$("speculate").checked) throw new ServerError("there is nothing to race: let drafts be verified", { param: "speculate" });
    lay(true);
    let last = null;
    const result = await race(
      async (speculative) => {
        const deliveries = [];
        const { usage } = await send(request, speculative, (delivery) => deliveries.push(delivery)); // nothing is drawn meanwhile
        if (speculative.enabled !== false) last = usage.speculative;
        return deliveries;
      },
      drafting(),
      (side, number, wanted) => say(`running ${side} drafts${wanted > 1 ? `, ${number} of ${wanted}` : ""}`),
    );
    accept(last);
    showRace(result);
  });
}

function showRace(result) {
  const [slow, fast] = [speed(result.without), speed(result.with)];
  const longest = Math.max(result.without.at(-1).at, result.with.at(-1).at);
  const lanes = ["without", "with"].map((side) => ({
    view: views[side],
    deliveries: result[side],
    tick(now, over) {
      $(`${side}-track`).style.width = `${(100 * now) / longest}%`;
      $(`${side}-speed`).textContent = over ? (perSecond(result[side]) ?? "too short to time") : `${(now / 1000).toFixed(2)} s`;
    },
  }));
  const same = result.identical
    ? `the texts are identical, all ${tokens(result.numTokens)}`
    : `the texts differ from token ${result.differsAt} on`;
  const ratio = slow && fast ? `${(fast / slow).toFixed(2)}× the speed of this server with drafts off` : "too short to time";
  say(`${ratio}; ${same}`, true);
  $("fairness").textContent =
    `One after the other, as both share one engine${result.runs > 1 ? `; the medians of ${result.runs} runs each, in turn` : ""}. ` +
    "Timed by the server from the first tokens to the last, so neither the prompt nor the network counts. " +
    "With drafts off the drafter does not run, unless another request wants drafts at the same time." +
    (result.identical || page.state.model.verifier === "exact" ? "" : ` Verifier ${page.state.model.verifier} keeps the distribution of sampled texts, not the texts.`);
  $("fairness").hidden = false;
  offerReplay(lanes);
  if (calm.matches) finishLanes();
  else playBack();
}

// --- showing -------------------------------------------------------------------------------------------------------

function lay(lanes) {
  $("single").hidden = lanes;
  $("lanes").hidden = !lanes;
  for (const view of Object.values(views)) view.clear();
  for (const side of ["without", "with"]) {
    $(`${side}-track`).style.width = "0";
    $(`${side}-speed`).textContent = "";
  }
  accept(null);
  if (innerWidth < ONE_COLUMN) $("output-title").scrollIntoView();
}

function say(text, strong = false) {
  $("summary").replaceChildren(strong ? Object.assign(document.createElement("strong"), { textContent: text }) : text);
}

const FIELDS = { messages: "message", "speculative.num_speculative_tokens": "drafts", "speculative.enabled": "speculate" };

/** The input that a `param` of the server's speaks of; `messages.0.content` is in the message, as `messages` is. */
const inputOf = (param) => $(FIELDS[param] ?? FIELDS[param.split(".")[0]] ?? param.split(".")[0]);

function complain(error) {
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
  $("error").hidden = !error;
  $("error").textContent = error?.message ?? "";
  if (!error) return;
  if (!(error instanceof ServerError)) console.error(error);
  const input = error.param && inputOf(error.param);
  input?.setAttribute("aria-invalid", "true");
  input?.setAttribute("aria-describedby", "error");
  if (error.status === 401) askForKey(true);
}

function inspect(token) {
  const line = $("inspector");
  if (!token) {
    line.textContent = "Point at a token, or walk through them with the arrow keys.";
    return;
  }
  const text = Object.assign(document.createElement("code"), { textContent: token.text });
  const mark = token.position ? [swatch(token.position), " "] : [];
  line.replaceChildren(`${token.place} · `, text, ` · id ${token.id} · `, ...mark, origin(token.position));
}

function accept(acceptance) {
  page.accepted = acceptance?.drafts ? acceptance.rates : null;
  drawChart();
}

function drawChart() {
  if (!page.state) return;
  const temperature = Number($("temperature").value || 1);
  const watched = page.state.watched.find((one) => one.temperature === temperature);
  const known = page.state.watched.map((one) => one.temperature);
  const sampled = ["top_p", "top_k", "min_p"].some((name) => $(name).value !== "") && temperature > 0;
  const apart = sampled ? " What is on record was sampled without top_p, top_k and min_p." : "";
  const none = known.length ? `Temperature ${temperature} is not on record; ${known.join(" and ")} ${known.length > 1 ? "are" : "is"}.` : "Nothing is on record for what is served.";
  $("on-record").textContent = watched ? `On record for temperature ${temperature}; of late: the engine’s last 1,024 rounds at it.${apart}` : none;
  chart.show({
    positions: page.state.model.num_speculative_tokens,
    run: page.accepted ?? undefined,
    record: watched?.expected,
    recent: watched?.measured.some((rate) => rate > 0) ? watched.measured : undefined,
  });
}

function offerReplay(lanes) {
  page.shown = lanes;
  $("replaying").hidden = false;
  $("pace").value = watchable(Math.max(...lanes.map((lane) => lane.deliveries.at(-1)?.at ?? 0)));
}

function playBack() {
  replay.play(page.shown, Number($("pace").value));
}

function finishLanes() {
  for (const lane of page.shown) {
    lane.view.clear();
    lane.view.add(lane.deliveries.flatMap((delivery) => delivery.tokens));
    lane.tick(lane.deliveries.at(-1).at, true);
  }
}

// --- conversation --------------------------------------------------------------------------------------------------

/** Takes a turn into the conversation; its answer stays on show as tokens until the next one. */
function remember(asked, answer) {
  page.turns.push({ role: "user", content: asked }, { role: "assistant", content: answer });
  if ($("message").value === asked) $("message").value = "";
  $("forget").hidden = false;
}

/** The turns before the one whose answer is shown as tokens. */
function showTurns(asked = null) {
  const turns = asked === null ? page.turns : [...page.turns, { role: "user", content: asked }];
  const lines = turns.map(({ role, content }) => {
    const line = document.createElement("p");
    line.append(Object.assign(document.createElement("b"), { textContent: role === "user" ? "You" : "Model" }), content);
    return line;
  });
  $("conversation").replaceChildren(...lines);
  const none = mode() !== "chat" || !lines.length;
  $("conversation").hidden = none;
  $("forget").hidden = none || !page.turns.length;
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

function forget() {
  page.turns = [];
  lay(false);
  showTurns();
  say("");
  $("replaying").hidden = true;
  $("message").focus();
}

// --- server --------------------------------------------------------------------------------------------------------

function takeState(state) {
  const known = page.state?.model.num_speculative_tokens;
  page.state = state;
  showState(state);
  if (known !== state.model.num_speculative_tokens) setLimits(state.model.num_speculative_tokens);
  drawChart();
}

function setLimits(drafts) {
  $("drafts").max = Math.max(drafts, 1);
  $("drafts").value = drafts;
  if (!drafts) $("speculate").checked = false;
  $("speculate").disabled = !drafts;
  $("legend").lastElementChild.hidden = !drafts;
  $("swatches").replaceChildren(...Array.from({ length: Math.min(drafts, LAST_COLOUR + 1) }, (_, index) => swatch(index + 1)));
  if (drafts > LAST_COLOUR + 1) $("swatches").lastElementChild.textContent += "+";
  $("acceptance").hidden = !drafts;
  showDrafts();
}

function showDrafts() {
  const on = $("speculate").checked;
  $("drafts").disabled = !on;
  document.querySelector(".range").toggleAttribute("data-off", !on);
  $("drafts-shown").textContent = on ? $("drafts").value : "0";
}

function stateFailed(error) {
  if (error.status === 401) {
    askForKey(false);
    return;
  }
  $("status").textContent = "not answering";
  $("status").dataset.status = "away";
}

/** `insists`: the dialog opens though it was sent away before. */
function askForKey(insists) {
  $("key").hidden = false;
  $("status").textContent = "needs an API key";
  $("status").dataset.status = "away";
  if (key.get()) $("key-said").textContent = "The server does not know this key. Give another.";
  if ($("key-dialog").open || (page.keyless && !insists)) return;
  $("key-dialog").showModal();
}

// --- wiring --------------------------------------------------------------------------------------------------------

function setMode() {
  for (const field of document.querySelectorAll("[data-mode]")) field.hidden = field.dataset.mode !== mode();
  $("max_tokens").placeholder = mode() === "chat" ? "any" : "16";
  showTurns();
}

for (const view of Object.values(views)) view.list.dataset.empty = "Run it: accepted drafts come in colour, the target’s own tokens plain.";
for (const side of ["without", "with"]) views[side].list.dataset.empty = " ";
inspect(null);

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("race").addEventListener("click", raced);
$("stop").addEventListener("click", () => page.running?.abort());
$("replay").addEventListener("click", playBack);
$("forget").addEventListener("click", forget);
$("speculate").addEventListener("change", showDrafts);
$("drafts").addEventListener("input", showDrafts);
for (const name of ["temperature", "top_p", "top_k", "min_p"]) $(name).addEventListener("input", drawChart);
for (const radio of document.querySelectorAll('input[name="mode"]')) radio.addEventListener("change", setMode);

document.addEventListener("keydown", (event) => {
  if ($("key-dialog").open) return;
  if (event.key === "Escape") {
    if (page.running) page.running.abort();
    else if (replay.playing) {
      replay.stop();
      finishLanes();
    }
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (event.shiftKey) raced();
    else run();
  }
});

$("key").addEventListener("click", () => askForKey(true));
$("key-cancel").addEventListener("click", () => {
  page.keyless = true;
  $("key-dialog").close();
});
$("key-dialog").addEventListener("cancel", () => (page.keyless = true)); // by Escape
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key-value").value.trim());
  page.keyless = false;
  $("key-value").value = "";
  $("key-dialog").close();
  complain(null);
  poller.ask();
});

setMode();
poller.ask();
