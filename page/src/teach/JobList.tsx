import { useState } from "preact/hooks";
import { tell } from "../api/http";
import type { Job } from "../api/types";
import { Failure } from "../parts/parts";
import { cancel, isOver, jobs, jobsError } from "../state/jobs";
import { percent } from "../words";

const NUM_SHOWN = 4;
const WORDS = {
  queued: "waiting for its turn",
  running: "learning",
  succeeded: "learned",
  failed: "not learned",
  cancelled: "cancelled",
};

export function JobList() {
  if (!jobs.value.length && !jobsError.value) return null;
  return (
    <>
      {jobsError.value && <Failure message={jobsError.value} />}
      <ul class="jobs" aria-label="Teaching">
        {jobs.value.slice(0, NUM_SHOWN).map((job) => (
          <Item key={job.id} job={job} />
        ))}
      </ul>
    </>
  );
}

function Item({ job }: { job: Job }) {
  const [error, setError] = useState<string | null>(null);
  const steps = job.step && job.num_steps ? `, step ${job.step} of ${job.num_steps}` : "";
  const isRunning = job.state === "running";
  return (
    <li class={`job ${job.state}`}>
      <div class="job-head">
        <strong>{job.task}</strong>
        <span class="muted">
          {WORDS[job.state]}
          {isRunning && `, ${percent(job.progress)}${steps}`}
        </span>
        {!isOver(job) && (
          <button
            type="button"
            class="quiet"
            aria-label={`Cancel teaching ${job.task}`}
            onClick={() => void cancel(job.id).catch((failure) => setError(tell(failure)))}
          >
            Cancel
          </button>
        )}
      </div>
      {!isOver(job) && (
        <progress
          aria-label={`Teaching ${job.task}`}
          max={1}
          {...(isRunning && job.progress > 0 ? { value: job.progress } : {})}
        />
      )}
      {(job.error || error) && <p class="wrong">{job.error ?? error}</p>}
    </li>
  );
}
