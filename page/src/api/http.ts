import { signal } from "@preact/signals";

/** A request that did not succeed; its message is fit to be read. */
export class RequestError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

const KEY_NAME = "slm-key";

/** The bearer key: kept for this tab only, and never anywhere else. */
export const bearerKey = signal(sessionStorage.getItem(KEY_NAME) ?? "");
/** Version of the store that the newest answer came from. */
export const storeVersion = signal<number | null>(null);
/** Whether the server last refused for want of a (valid) key. */
export const isKeyWanted = signal(false);

export function keepKey(key: string): void {
  bearerKey.value = key.trim();
  if (bearerKey.value) sessionStorage.setItem(KEY_NAME, bearerKey.value);
  else sessionStorage.removeItem(KEY_NAME);
  isKeyWanted.value = false;
}

export interface Ask {
  method?: string;
  json?: unknown;
  form?: FormData;
  signal?: AbortSignal;
}

/** Send a request; whatever is no success becomes a RequestError. */
export async function send(path: string, ask: Ask = {}): Promise<Response> {
  const headers = new Headers();
  if (bearerKey.value) headers.set("Authorization", `Bearer ${bearerKey.value}`);
  if (ask.json !== undefined) headers.set("Content-Type", "application/json");
  const body = ask.json !== undefined ? JSON.stringify(ask.json) : (ask.form ?? null);
  let response: Response;
  try {
    const init: RequestInit = { method: ask.method ?? "GET", headers, body, cache: "no-store" };
    if (ask.signal) init.signal = ask.signal;
    response = await fetch(path, init);
  } catch (error) {
    if (ask.signal?.aborted) throw error;
    throw new RequestError("The server cannot be reached. Is it still running?", 0);
  }
  const version = Number(response.headers.get("X-SLM-Store-Version"));
  if (version > 0) storeVersion.value = version;
  if (response.ok) return response;
  throw await explain(response);
}

export async function receive<T>(path: string, ask: Ask = {}): Promise<T> {
  const response = await send(path, ask);
  return (await response.json()) as T;
}

async function explain(response: Response): Promise<RequestError> {
  let message = "";
  try {
    const body = (await response.json()) as { error?: { message?: unknown }; detail?: unknown };
    message = String(body.error?.message ?? (typeof body.detail === "string" ? body.detail : ""));
  } catch {
    // No JSON: the status says what there is to say.
  }
  const { status } = response;
  if (status === 401) {
    isKeyWanted.value = true;
    message = bearerKey.value
      ? "The server does not know this key. Enter another one."
      : "This server asks for a key. Enter yours to go on.";
  }
  if (status === 429) {
    const wait = response.headers.get("Retry-After");
    message = `The server is busy${wait ? `: try again in ${wait} s` : ""}.`;
  }
  return new RequestError(message || `The server answered with status ${status}.`, status);
}

export function tell(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
