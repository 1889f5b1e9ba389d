import { scaleLinear } from "d3-scale";
import { useState } from "preact/hooks";
import type { Candidate, Retrieval } from "../api/types";
import { TaskName } from "../parts/parts";
import { look } from "../state/store";
import { distance, percent } from "../words";

const NUM_SHOWN = 4;

/** Weight of every task near the question, and how far it is against how far it may be. */
export function RetrievalBars({ retrieval, isForced }: { retrieval: Retrieval; isForced: boolean }) {
  const [isWhole, setWhole] = useState(false);
  const all = ofTasks(retrieval.candidates);
  if (!all.length) return <p class="muted">There is no task to retrieve yet.</p>;
  const kept = isWhole ? all : all.slice(0, NUM_SHOWN);
  const gauge = gaugeOf(kept);
  return (
    <div class="retrieval">
      {isForced && <p class="muted">Left to itself it would have retrieved:</p>}
      <table role="table">
        <caption class="unseen">Tasks near the question, nearest first</caption>
        <thead>
          <tr>
            <th scope="col">Task</th>
            <th scope="col">Weight</th>
            <th scope="col">Distance against limit</th>
          </tr>
        </thead>
        <tbody role="rowgroup">
          {kept.map((candidate) => (
            <Row key={candidate.task} candidate={candidate} gauge={gauge} />
          ))}
        </tbody>
      </table>
      {all.length > NUM_SHOWN && (
        <button type="button" class="quiet" aria-expanded={isWhole} onClick={() => setWhole(!isWhole)}>
          {isWhole ? "Show the nearest only" : `Show all ${all.length} tasks`}
        </button>
      )}
      {retrieval.is_contested && (
        <p class="muted">Two tasks claimed it; a runoff between them set their weights.</p>
      )}
    </div>
  );
}

/** One row a task: its nearest key, and the weight of all its keys together. */
function ofTasks(candidates: Candidate[]): Candidate[] {
  const found = new Map<string, Candidate>();
  for (const candidate of candidates) {
    const nearer = found.get(candidate.task);
    if (nearer) found.set(candidate.task, { ...nearer, weight: nearer.weight + candidate.weight });
    else found.set(candidate.task, candidate);
  }
  return [...found.values()];
}

type Gauge = (value: number) => number;

/** Percent of the gauge's width; all rows share one scale, with the nearest on the left. */
function gaugeOf(candidates: Candidate[]): Gauge {
  const values = candidates
    .flatMap(({ distance, threshold }) => [distance, threshold])
    .filter((value): value is number => value !== null && Number.isFinite(value));
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low) * 0.06 || 1;
  return scaleLinear([low - room, high + room], [0, 100]).clamp(true);
}

function Row({ candidate, gauge }: { candidate: Candidate; gauge: Gauge }) {
  const { task, weight } = candidate;
  return (
    <tr role="row" data-hue={look(task).hue}>
      <th scope="row" role="rowheader">
        <TaskName task={task} />
      </th>
      <td role="cell" class="weight">
        <span class="bar" aria-hidden="true">
          <span style={{ width: `${100 * weight}%` }} />
        </span>
        <span class="number">{percent(weight)}</span>
      </td>
      <td role="cell" class="reach">
        <Reach candidate={candidate} gauge={gauge} />
      </td>
    </tr>
  );
}

function Reach({ candidate, gauge }: { candidate: Candidate; gauge: Gauge }) {
  const { distance: far, threshold } = candidate;
  if (far === null) return <span class="muted">not known</span>;
  const hasLimit = threshold !== null && Number.isFinite(threshold);
  const isWithin = !hasLimit || far <= threshold;
  return (
    <>
      <span class={`gauge${isWithin ? "" : " beyond"}`} aria-hidden="true">
        {hasLimit && <span class="gauge-allowed" style={{ width: `${gauge(threshold)}%` }} />}
        <span class="gauge-mark" style={{ left: `${gauge(far)}%` }} />
      </span>
      <span class="reach-words">
        {hasLimit
          ? `${distance(far)} of ${distance(threshold)}, ${isWithin ? "within reach" : "too far"}`
          : `${distance(far)}, no limit`}
      </span>
    </>
  );
}
