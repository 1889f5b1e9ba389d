import { Empty, Failure, TaskName } from "../parts/parts";
import { asks, current, shown, tellOrigin, type Asked } from "../state/asks";
import { backbone, forcedTask, isTeaching, tasks } from "../state/store";
import { percent } from "../words";
import { RetrievalBars } from "./RetrievalBars";

export function Answer() {
  const asked = current.value;
  if (!asked) {
    const isUntaught = tasks.value.value?.length === 0;
    const end = isTeaching.value ? "you teach it a task below" : "it is taught a task";
    return (
      <Empty title={isUntaught ? "Nothing taught yet" : "Nothing asked yet"}>
        {isUntaught
          ? `Questions go to the frozen model until ${end}.`
          : "The answer appears here, with the tasks it was drawn from, and your question takes its place on the map."}
      </Empty>
    );
  }
  return (
    <article class="answer" aria-label="Answer">
      <p class="question">{asked.question}</p>
      <AnswerText asked={asked} />
      <Origin asked={asked} />
    </article>
  );
}

function AnswerText({ asked }: { asked: Asked }) {
  const isRunning = asked.state === "waiting" || asked.state === "streaming";
  if (asked.state === "failed" && asked.error) return <Failure message={asked.error} />;
  return (
    <div class={`answer-text${isRunning ? " running" : ""}`} aria-busy={isRunning}>
      {asked.text}
      {asked.state === "waiting" && <span class="muted">Reading the question…</span>}
      {asked.state === "stopped" && <span class="muted">{asked.text ? " (stopped)" : "Stopped before it began."}</span>}
      {asked.state === "done" && !asked.text && <span class="muted">No answer</span>}
    </div>
  );
}

function Origin({ asked }: { asked: Asked }) {
  const words = tellOrigin(asked);
  const confidence = asked.origin?.confidence;
  const isForced = Boolean(forcedTask(asked.model)) || asked.model === backbone.value;
  return (
    <section class="origin" aria-label="What was retrieved">
      {words && (
        <p class={`origin-words${asked.origin?.is_abstained ? " abstained" : ""}`}>
          {words}
          {asked.state === "done" && asked.text && typeof confidence === "number" && (
            <span class="muted"> Confidence {percent(confidence)}.</span>
          )}
        </p>
      )}
      {asked.retrieval && <RetrievalBars retrieval={asked.retrieval} isForced={isForced} />}
      {asked.retrievalError && asked.state !== "failed" && (
        <p class="muted">What was retrieved is not known: {asked.retrievalError}</p>
      )}
    </section>
  );
}

/** Questions asked before, to go back to. */
export function Earlier() {
  const others = asks.value.filter((asked) => asked.number !== shown.value);
  if (!others.length) return null;
  return (
    <nav class="earlier" aria-label="Earlier questions">
      <h3>Earlier</h3>
      <ul>
        {others.slice(0, 8).map((asked) => (
          <li key={asked.number}>
            <button type="button" onClick={() => (shown.value = asked.number)}>
              <span class="earlier-question">{asked.question}</span>
              <span class="earlier-origin">
                {asked.origin?.mixture[0] ? <TaskName task={asked.origin.mixture[0].task} /> : "no task"}
              </span>
            </button>
          </li>
        ))}
      </ul>
    </nav>
  );
}
