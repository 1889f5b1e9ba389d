import { computed, signal } from "@preact/signals";
import { receive, send, storeVersion, tell } from "../api/http";
import type { Evaluations, KnowledgeMap, Limits, Model, Task } from "../api/types";
import { lookOf, type Look } from "../looks";

/** Something fetched: not yet there, there, or why not. What was there stays while it is fetched again. */
export interface Fetched<T> {
  value: T | null;
  error: string | null;
}

const nothing = { value: null, error: null };

export const tasks = signal<Fetched<Task[]>>(nothing);
export const models = signal<Fetched<Model[]>>(nothing);
export const map = signal<Fetched<KnowledgeMap>>(nothing);
export const evaluations = signal<Fetched<Evaluations>>(nothing);
export const limits = signal<Fetched<Limits>>(nothing);
/** What the polite live region says. */
export const announcement = signal("");

/** Whether tasks may be taught and forgotten here; no, until the server has said so. */
export const isTeaching = computed(() => limits.value.value?.is_teaching ?? false);

/** The frozen backbone: the one model that is neither `auto` nor has a task in its name. */
export const backbone = computed(
  () => models.value.value?.find(({ id }) => id !== "auto" && !forcedTask(id))?.id ?? null,
);

const numbers = computed(() => new Map((tasks.value.value ?? []).map((task, number) => [task.name, number])));

export function look(task: string): Look {
  return lookOf(numbers.value.get(task) ?? -1);
}

/** Task of a model id like `minilm:billing`; empty for the others. */
export function forcedTask(id: string): string {
  const names = tasks.value.value?.map((task) => task.name) ?? [];
  return names.find((name) => id.endsWith(`:${name}`)) ?? "";
}

export function announce(words: string): void {
  announcement.value = words;
}

async function refresh<T>(into: { value: Fetched<T> }, load: () => Promise<T>): Promise<void> {
  try {
    into.value = { value: await load(), error: null };
  } catch (error) {
    into.value = { value: into.value.value, error: tell(error) };
  }
}

export async function refreshTasks(): Promise<void> {
  await refresh(tasks, async () => {
    const { data, store_version } = await receive<{ data: Task[]; store_version: number }>("/v1/tasks");
    storeVersion.value = store_version;
    return data;
  });
}

export async function refreshLimits(): Promise<void> {
  await refresh(limits, () => receive<Limits>("/v1/limits"));
}

/** Everything that follows from what the store holds, and what the server allows. */
export async function refreshAll(): Promise<void> {
  await refreshTasks();
  await Promise.all([
    refreshLimits(),
    refresh(models, async () => (await receive<{ data: Model[] }>("/v1/models")).data),
    refresh(map, () => receive<KnowledgeMap>("/v1/map")),
    refresh(evaluations, () => receive<Evaluations>("/v1/evaluations")),
  ]);
}

export async function forget(task: string): Promise<void> {
  await send(`/v1/tasks/${encodeURIComponent(task)}`, { method: "DELETE" });
  announce(`${task} is forgotten.`);
  await refreshAll();
}

const POLL_MS = 20_000;

/** Load now, and again whenever another version of the store shows up. */
export function watchStore(): void {
  let seen: number | null = null;
  storeVersion.subscribe((version) => {
    if (version === null || version === seen) return;
    const isFirst = seen === null;
    seen = version;
    if (!isFirst) void refreshAll();
  });
  void refreshAll();
  setInterval(() => {
    // The answer carries the store's version; a new one makes everything else be asked for again.
    if (!document.hidden && tasks.value.error === null) void refreshTasks();
  }, POLL_MS);
}
