import { signal } from "@preact/signals";
import { readEvents } from "../api/events";
import { receive, RequestError, send, tell } from "../api/http";
import type { Job } from "../api/types";
import { announce, refreshAll } from "./store";

export const jobs = signal<Job[]>([]);
export const jobsError = signal<string | null>(null);

const POLL_MS = 1_500;
const MOST_TRIES = 40;
const followed = new Set<string>();

export function isOver(job: Job): boolean {
  return job.state === "succeeded" || job.state === "failed" || job.state === "cancelled";
}

function put(job: Job): void {
  const isKnown = jobs.value.some(({ id }) => id === job.id);
  jobs.value = isKnown ? jobs.value.map((old) => (old.id === job.id ? { ...old, ...job } : old)) : [job, ...jobs.value];
}

/** Jobs of others too, so that a page opened later shows what is going on. */
export async function loadJobs(): Promise<void> {
  try {
    const { data } = await receive<{ data: Job[] }>("/v1/jobs");
    for (const job of data) put(job);
    jobsError.value = null;
    for (const job of data) if (!isOver(job)) void follow(job.id);
  } catch (error) {
    const isClosed = error instanceof RequestError && [401, 403, 404].includes(error.status);
    jobsError.value = isClosed ? null : tell(error);
  }
}

export async function teach(name: string, file: File, numEpochs: number | null): Promise<void> {
  const form = new FormData();
  form.set("name", name);
  if (numEpochs !== null) form.set("num_epochs", String(numEpochs));
  form.set("file", file, file.name);
  const job = await receive<Job>("/v1/tasks", { method: "POST", form });
  put(job);
  announce(`Teaching ${name} has begun.`);
  void follow(job.id);
}

export async function cancel(id: string): Promise<void> {
  await send(`/v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
}

/** Watch a job to its end: its events as they come, or, where they break off, by asking again and again. */
async function follow(id: string): Promise<void> {
  if (followed.has(id)) return;
  followed.add(id);
  try {
    const last = (await listen(id)) ?? (await poll(id));
    if (last) await conclude(last);
  } finally {
    followed.delete(id);
  }
}

async function listen(id: string): Promise<Job | null> {
  try {
    for await (const data of readEvents(await send(`/v1/jobs/${encodeURIComponent(id)}/events`))) {
      if (data === "[DONE]") continue;
      const job = JSON.parse(data) as Job;
      put(job);
      if (isOver(job)) return job;
    }
  } catch {
    // Polling takes over.
  }
  return null;
}

async function poll(id: string): Promise<Job | null> {
  for (let failures = 0; failures < MOST_TRIES; ) {
    try {
      const job = await receive<Job>(`/v1/jobs/${encodeURIComponent(id)}`);
      put(job);
      if (isOver(job)) return job;
      failures = 0;
    } catch (error) {
      failures += 1;
      jobsError.value = tell(error);
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
  return null;
}

async function conclude(job: Job): Promise<void> {
  const words = { succeeded: "is learned", failed: "could not be learned", cancelled: "was cancelled" };
  if (isOver(job)) announce(`${job.task} ${words[job.state as keyof typeof words]}. ${job.error ?? ""}`);
  if (job.state === "succeeded") await refreshAll();
}
