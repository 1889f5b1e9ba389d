import { computed, signal } from "@preact/signals";
import { readEvents } from "../api/events";
import { receive, RequestError, send, tell } from "../api/http";
import type { MapPoint, MapPoints, Origin, Retrieval } from "../api/types";
import { percent } from "../words";
import { announce, backbone, forcedTask, map } from "./store";

export type AskState = "waiting" | "streaming" | "done" | "stopped" | "failed";

/** One question, and everything that came back for it. */
export interface Asked {
  number: number;
  question: string;
  model: string;
  state: AskState;
  text: string;
  error: string | null;
  origin: Origin | null;
  retrieval: Retrieval | null;
  retrievalError: string | null;
  point: MapPoint | null;
  /** Version of the store whose map the point is on: another version is another plane. */
  pointVersion: number | null;
}

export interface Options {
  model: string;
  /** Longest answer; null leaves it to the server. */
  maxTokens: number | null;
  temperature: number;
}

export const asks = signal<Asked[]>([]);
export const shown = signal<number | null>(null);
export const current = computed(() => asks.value.find((ask) => ask.number === shown.value) ?? null);
export const isAnswering = computed(() =>
  asks.value.some(({ state }) => state === "waiting" || state === "streaming"),
);

const MOST_KEPT = 30;
let numAsked = 0;
let running: AbortController | null = null;

function change(number: number, changes: Partial<Asked>): void {
  asks.value = asks.value.map((ask) => (ask.number === number ? { ...ask, ...changes } : ask));
}

export function stop(): void {
  running?.abort();
}

export async function ask(question: string, options: Options): Promise<void> {
  stop();
  const number = (numAsked += 1);
  const control = (running = new AbortController());
  const asked: Asked = {
    number,
    question,
    model: options.model,
    state: "waiting",
    text: "",
    error: null,
    origin: null,
    retrieval: null,
    retrievalError: null,
    point: null,
    pointVersion: null,
  };
  asks.value = [asked, ...asks.value].slice(0, MOST_KEPT);
  shown.value = number;
  announce("Asking.");
  void retrieve(number, question, control.signal);
  try {
    await answer(number, question, options, control.signal);
    change(number, { state: "done" });
    announce(conclude(number));
  } catch (error) {
    const isStopped = control.signal.aborted;
    change(number, isStopped ? { state: "stopped" } : { state: "failed", error: tell(error) });
    announce(isStopped ? "Stopped." : "");
  } finally {
    if (running === control) running = null;
  }
}

interface Chunk {
  choices?: { delta?: { content?: string | null }; message?: { content?: string | null } }[];
  slm?: Origin;
  error?: { message?: string };
}

async function answer(number: number, question: string, options: Options, signal: AbortSignal): Promise<void> {
  const response = await send("/v1/chat/completions", {
    method: "POST",
    signal,
    json: {
      model: options.model,
      messages: [{ role: "user", content: question }],
      ...(options.maxTokens === null ? {} : { max_tokens: options.maxTokens }),
      temperature: options.temperature,
      stream: true,
    },
  });
  let text = "";
  for await (const data of readEvents(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data) as Chunk;
    if (chunk.error) throw new RequestError(chunk.error.message ?? "The answer broke off.", 0);
    text += chunk.choices?.[0]?.delta?.content ?? "";
    change(number, { state: "streaming", text, ...(chunk.slm ? { origin: chunk.slm } : {}) });
  }
}

async function retrieve(number: number, question: string, signal: AbortSignal): Promise<void> {
  const explain = async () => {
    const json = { input: question };
    const found = await receive<{ data: Retrieval[] }>("/v1/retrievals", { method: "POST", json, signal });
    if (found.data[0]) change(number, { retrieval: found.data[0] });
  };
  const place = async () => {
    const json = { input: [question] };
    const found = await receive<MapPoints>("/v1/map/points", { method: "POST", json, signal });
    if (found.data[0]) change(number, { point: found.data[0], pointVersion: found.store_version });
  };
  const results = await Promise.allSettled([explain(), place()]);
  const failed = results.find((result) => result.status === "rejected");
  if (failed && !signal.aborted) change(number, { retrievalError: tell(failed.reason) });
}

/** Put the questions asked before on a new map. */
async function placeAgain(version: number): Promise<void> {
  const stale = asks.peek().filter((asked) => asked.point && asked.pointVersion !== version);
  if (!stale.length) return;
  const json = { input: stale.map(({ question }) => question) };
  const found = await receive<MapPoints>("/v1/map/points", { method: "POST", json });
  found.data.forEach((point, i) => {
    const asked = stale[i];
    if (asked) change(asked.number, { point, pointVersion: found.store_version });
  });
}

map.subscribe(({ value }) => {
  // Without their new places they stay off the map, which is not worth a word.
  if (value) void placeAgain(value.store_version).catch(() => undefined);
});

/** Where an answer came from, in words. */
export function tellOrigin(asked: Asked): string {
  const origin = asked.origin;
  const forced = forcedTask(asked.model);
  if (forced) return `You chose ${forced}, so it answered whatever the question was.`;
  if (asked.model === backbone.value) return "You chose the frozen model, so nothing that was taught was used.";
  if (!origin) return "";
  if (origin.is_abstained || !origin.mixture.length) {
    return asked.text || asked.state !== "done"
      ? "This belongs to no task it was taught, so the frozen model answered by itself."
      : "This belongs to no task it was taught, and the frozen model, an encoder, has no words of its own.";
  }
  const [first, ...others] = origin.mixture;
  if (first && !others.length) return `Answered from ${first.task} alone.`;
  const parts = origin.mixture.map(({ task, weight }) => `${task} (${percent(weight)})`);
  return `Answered from ${parts.slice(0, -1).join(", ")} and ${parts[parts.length - 1]}.`;
}

function conclude(number: number): string {
  const asked = asks.value.find((one) => one.number === number);
  if (!asked) return "";
  return `${asked.text ? `Answer: ${asked.text}. ` : ""}${tellOrigin(asked)}`;
}
