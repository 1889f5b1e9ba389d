import type { Evaluations } from "../api/types";
import { Empty, Loading, Missing, TaskName } from "../parts/parts";
import { evaluations, look, refreshAll } from "../state/store";
import { percent } from "../words";
import { ConfusionMatrix } from "./ConfusionMatrix";

export function ScoresPanel() {
  const { value, error } = evaluations.value;
  return (
    <section class="panel" id="scores" aria-labelledby="scores-title">
      <h2 id="scores-title">Scores</h2>
      {error && <Missing message={error} retry={() => void refreshAll()} />}
      {!value && !error && <Loading what="the scores" lines={4} />}
      {value && !value.tasks.length && <Empty title="Nothing to score yet">Scores appear with the first task.</Empty>}
      {value && value.tasks.length > 0 && (
        <div class="scores">
          <Accuracy evaluations={value} />
          <Confused evaluations={value} />
        </div>
      )}
    </section>
  );
}

function Accuracy({ evaluations }: { evaluations: Evaluations }) {
  const metric = evaluations.tasks[0]?.validation_metric ?? "score";
  const name = metric.charAt(0).toUpperCase() + metric.slice(1);
  return (
    <div>
      <h3>{name} on validation rows</h3>
      <p class="muted">Measured once, when the task was learned, on rows kept aside.</p>
      <table class="accuracy">
        <caption class="unseen">{name} of each task on its validation rows</caption>
        <tbody>
          {evaluations.tasks.map(({ task, validation_score: score }) => (
            <tr key={task} data-hue={look(task).hue}>
              <th scope="row">
                <TaskName task={task} />
              </th>
              <td>
                {score === null ? (
                  <span class="muted">not measured</span>
                ) : (
                  <>
                    <span class="bar" aria-hidden="true">
                      <span style={{ width: `${100 * score}%` }} />
                    </span>
                    <span class="number">{percent(score)}</span>
                  </>
                )}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Confused({ evaluations }: { evaluations: Evaluations }) {
  const { confusion, reason } = evaluations;
  return (
    <div>
      <h3>Confusion that the keys imply</h3>
      {confusion ? (
        <ConfusionMatrix confusion={confusion} />
      ) : (
        <p class="muted">{reason ? `${reason.charAt(0).toUpperCase()}${reason.slice(1)}.` : "Not known."}</p>
      )}
    </div>
  );
}
