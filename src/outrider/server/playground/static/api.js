// Speaks with the server: the key, errors in words, streams of server-sent events.

const KEY = "outrider.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class ServerError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

function told(record, status) {
  const { message = `the server answered with status ${status}`, param = null } = record?.error ?? {};
  return new ServerError(message, { status, param });
}

/** A response with a good status. Paths are relative to the page, so that a proxy may show it anywhere. */
async function answered(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server does not answer: is it still running?");
  }
  if (!response.ok) throw told(await response.json().catch(() => null), response.status);
  return response;
}

export const getState = async () => (await answered("playground/state")).json();

/** The JSON of each event of a stream. A stream that ends without [DONE] has broken off, which is an error. */
export async function* stream(path, body, signal) {
  const response = await answered(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("the stream broke off: the server went away");
    });
    if (done) throw new ServerError("the stream broke off before its end");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith(":")) continue; // a comment keeps a connection alive
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const record = JSON.parse(data);
      if (record.error) throw told(record, 0);
      yield record;
    }
  }
}
