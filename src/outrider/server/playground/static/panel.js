// What the engine is and does: polled while somebody looks.

import { getState } from "./api.js";

const EVERY = 1000; // milliseconds
const AFTER_A_FAILURE = 4000;

/** Tells `told` each new state, and `failed` each error; rests while the tab is hidden. */
export class Poller {
  #timer = 0;
  #asking = false;

  constructor(told, failed) {
    this.told = told;
    this.failed = failed;
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(this.#timer) : this.ask()));
  }

  async ask() {
    clearTimeout(this.#timer);
    if (this.#asking) return;
    this.#asking = true;
    let pause = EVERY;
    try {
      this.told(await getState());
    } catch (error) {
      pause = error.status === 401 ? 0 : AFTER_A_FAILURE; // a key is asked for: there is no use in asking without
      this.failed(error);
    } finally {
      this.#asking = false;
    }
    if (pause && !document.hidden) this.#timer = setTimeout(() => this.ask(), pause);
  }
}

const put = (id, text) => {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
};

/** Writes a state into the page. */
export function showState({ version, status, model, running, waiting, cache_usage: usage, watched }) {
  const drafts = model.num_speculative_tokens;
  put("served", model.id);
  put("status", { ok: "ready", draining: "going down", dead: "engine dead", restarting: "starting anew" }[status]);
  document.getElementById("status").dataset.status = status;
  put("running", String(running));
  put("waiting", String(waiting));
  put("cache", `${(100 * usage).toFixed(usage && usage < 0.1 ? 1 : 0)} %`);
  put("verdict-model", `${model.id}, ${model.dtype} on ${model.device}, up to ${model.max_model_len.toLocaleString("en")} tokens`);
  put("verdict-runner", model.runner + (model.forced ? ", as was asked for" : ", chosen by the oracle"));
  put("verdict-drafter", drafts ? `${model.method}, ${drafts} a round` : "none: every token is the target's own");
  put("verdict-verifier", model.verifier + (model.faithful ? ": the text is the target's own" : ": acceptance is made up, and the text with it"));
  put("verdict-version", version);
  const departed = watched.filter((one) => one.departed).map((one) => `temperature ${one.temperature}`);
  const unwatched = drafts ? "nothing is on record for this drafter" : "there are no drafts to watch";
  const watching = watched.length ? "no departure from what is on record" : unwatched;
  put("verdict-watchdog", departed.length ? `acceptance has fallen at ${departed.join(", ")}` : watching);
  const reasons = model.passed_over.map(({ runner, part, reason }) => `${runner}: ${part} – ${reason}`);
  const list = document.getElementById("passed-over");
  const shown = reasons.length ? reasons : ["No faster runner was passed over."];
  if (list.dataset.shown !== JSON.stringify(shown)) {
    list.dataset.shown = JSON.stringify(shown);
    list.replaceChildren(...shown.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }
}
