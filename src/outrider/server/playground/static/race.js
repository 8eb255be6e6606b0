// The same request without and with drafts, one after the other, and what that says.

const RUNS = 3;
const SHORT = 3000; // milliseconds; longer sides are run once

/** Tokens a second from the first delivery to the last, so that neither the prompt nor the prefix cache counts. */
export function speed(deliveries) {
  const [first, last] = [deliveries[0], deliveries.at(-1)];
  if (!first || last.at <= first.at) return null;
  const after = deliveries.slice(1).reduce((sum, delivery) => sum + delivery.tokens.length, 0);
  return (1000 * after) / (last.at - first.at);
}

const middle = (runs) => runs.toSorted((a, b) => speed(a) - speed(b))[Math.floor(runs.length / 2)];

const ids = (deliveries) => deliveries.flatMap((delivery) => delivery.tokens.map((token) => token.id));

/**
 * Runs both sides in turn. `run(speculative)` gives the deliveries of one run; `told` is called before each.
 * Of several runs of a side the one with the median speed is kept.
 */
export async function race(run, drafting, told) {
  const sides = { without: [], with: [] };
  for (let number = 1, wanted = RUNS; number <= wanted; number++) {
    for (const [side, speculative] of [["without", { enabled: false }], ["with", drafting]]) {
      told(side, number, wanted);
      sides[side].push(await run(speculative));
    }
    if (Math.max(sides.without[0].at(-1)?.at ?? 0, sides.with[0].at(-1)?.at ?? 0) > SHORT) wanted = 1;
  }
  const all = [...sides.without, ...sides.with].map(ids);
  const [one] = all;
  const other = all.find((tokens) => tokens.length !== one.length || tokens.some((id, index) => id !== one[index]));
  const differs = other ? one.findIndex((id, index) => id !== other[index]) : -1;
  return {
    without: middle(sides.without),
    with: middle(sides.with),
    runs: sides.with.length,
    identical: !other,
    // the first token that differs, counted from 1; where one text is the other's beginning, the one after its end
    differsAt: other ? (differs < 0 ? one.length : differs) + 1 : null,
    numTokens: one.length,
  };
}
