// The request that the page's fields describe.

import { ServerError } from "./api.js";

const $ = (id) => document.getElementById(id);

export const mode = () => document.querySelector('input[name="mode"]:checked').value;

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"];

/** A field's number; undefined where it is left to the server. Whether it is a good one is the server's to say. */
function numberIn(name) {
  const input = $(name);
  if (input.validity.badInput) throw new ServerError(`${name} is not a number`, { param: name });
  if (input.value === "") return undefined;
  const value = Number(input.value);
  if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
    throw new ServerError(`${name} has more digits than a browser keeps: ${input.value}`, { param: name });
  }
  return value;
}

export const drafting = () => ($("speculate").checked ? { num_speculative_tokens: Number($("drafts").value) } : { enabled: false });

/** The path and the body of the request that the page describes, but for what it says of drafts. */
export function described(model, turns) {
  const sampling = Object.fromEntries(SAMPLING.map((name) => [name, numberIn(name)]).filter(([, value]) => value !== undefined));
  const body = { ...sampling, model, stream: true, stream_options: { include_usage: true } };
  if (mode() === "prompt") return ["v1/completions", { ...body, prompt: $("prompt").value }];
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const messages = [...system, ...turns, { role: "user", content: $("message").value }];
  return ["v1/chat/completions", { ...body, messages }];
}
