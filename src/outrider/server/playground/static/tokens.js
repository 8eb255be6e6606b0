// A text as its tokens: accepted drafts in the colour of their position, the target's own plain.

export const LAST_COLOUR = 7;

export const colour = (position) => `p${Math.min(position, LAST_COLOUR + 1)}`;

const drawn = (text) => JSON.stringify(text).slice(1, -1).replaceAll(" ", "␣").replaceAll('\\"', '"');

export function origin(position) {
  return position ? `accepted draft, position ${position}` : "the target's own";
}

/** One stop of the tab key; arrows walk through the tokens, and what is pointed at is told to `inspect`. */
export class TokenView {
  constructor(list, inspect) {
    this.list = list;
    this.inspect = inspect;
    this.tokens = [];
    this.at = -1;
    list.addEventListener("keydown", (event) => this.#walk(event));
    list.addEventListener("pointerover", (event) => this.#point(event));
    list.addEventListener("click", (event) => this.#point(event));
    list.addEventListener("pointerleave", () => this.#told(this.at));
    list.addEventListener("focus", () => this.tokens.length && this.select(Math.max(this.at, 0)));
    list.addEventListener("blur", () => this.select(-1));
  }

  clear() {
    this.tokens = [];
    this.list.replaceChildren();
    this.select(-1);
  }

  add(tokens) {
    const follows = this.list.scrollTop + this.list.clientHeight >= this.list.scrollHeight - 8;
    const made = document.createDocumentFragment();
    for (const token of tokens) {
      const place = this.tokens.push(token);
      const span = document.createElement("span");
      span.id = `${this.list.id}-${place}`;
      span.className = "token";
      span.setAttribute("role", "option");
      span.setAttribute("aria-label", `${drawn(token.text) || "no text"}, id ${token.id}, ${origin(token.draft_position)}`);
      span.dataset.index = place - 1;
      span.dataset.id = token.id;
      span.dataset.position = token.draft_position;
      if (token.draft_position) span.classList.add("draft", colour(token.draft_position));
      if (!token.text) span.classList.add("textless");
      if (token.text.startsWith("\n")) span.classList.add("newline");
      span.textContent = token.text;
      made.append(span);
    }
    this.list.append(made);
    if (follows) this.list.scrollTop = this.list.scrollHeight;
  }

  select(index) {
    this.list.querySelector(".current")?.classList.remove("current");
    this.at = index;
    const span = this.list.children[index];
    span?.classList.add("current");
    span?.scrollIntoView({ block: "nearest" });
    if (span) this.list.setAttribute("aria-activedescendant", span.id);
    else this.list.removeAttribute("aria-activedescendant");
    this.#told(index);
  }

  #walk(event) {
    const last = this.tokens.length - 1;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.select(Math.min(Math.max(to, 0), last));
  }

  #point(event) {
    const index = event.target.closest(".token")?.dataset.index;
    if (index !== undefined) this.#told(Number(index));
  }

  #told(index) {
    const token = this.tokens[index];
    this.inspect(
      token && {
        place: `token ${index + 1} of ${this.tokens.length}`,
        text: drawn(token.text) || "no text of its own",
        id: token.id,
        position: token.draft_position,
      },
    );
  }
}

/** Shows recorded deliveries again, `slower` times as slowly as they came; all lanes by one clock. */
export class Replay {
  #frame = 0;

  /** `lanes`: each with `view`, `deliveries` of `{ at, tokens }` in milliseconds, and `tick(milliseconds, ended)`. */
  play(lanes, slower) {
    this.stop();
    const next = lanes.map((lane) => (lane.view.clear(), 0));
    const begun = performance.now();
    const draw = () => {
      const now = (performance.now() - begun) / slower;
      let running = false;
      lanes.forEach((lane, index) => {
        const { deliveries } = lane;
        const fresh = [];
        while (next[index] < deliveries.length && deliveries[next[index]].at <= now) {
          fresh.push(...deliveries[next[index]++].tokens);
        }
        if (fresh.length) lane.view.add(fresh);
        const over = next[index] === deliveries.length;
        lane.tick(over ? (deliveries.at(-1)?.at ?? 0) : now, over);
        running ||= !over;
      });
      this.#frame = running ? requestAnimationFrame(draw) : 0;
    };
    draw();
  }

  get playing() {
    return this.#frame !== 0;
  }

  /** Leaves what is shown as it is. */
  stop() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
  }
}

const PACES = [1, 2, 5, 10, 20, 50, 100];
const WATCHABLE = 4000; // milliseconds

/** How many times more slowly a run has to be shown for an eye to follow it. */
export const watchable = (milliseconds) => PACES.find((pace) => milliseconds * pace >= WATCHABLE) ?? PACES.at(-1);
