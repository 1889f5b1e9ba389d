import { useEffect, useState } from "preact/hooks";
import type { Task } from "../api/types";
import { Empty, Loading, Missing, TaskName } from "../parts/parts";
import { isTeaching, refreshTasks, tasks } from "../state/store";
import { age, bytes, count, date, list, moment, percent, plain } from "../words";
import { ForgetDialog } from "./ForgetDialog";

type Column = "name" | "score" | "size" | "age";

const ORDERS: Record<Column, (one: Task, other: Task) => number> = {
  name: (one, other) => one.name.localeCompare(other.name),
  score: (one, other) => (other.validation_score ?? -1) - (one.validation_score ?? -1),
  size: (one, other) => other.size_bytes - one.size_bytes,
  age: (one, other) => moment(other.created).getTime() - moment(one.created).getTime(),
};
const HEADS: [Column, string][] = [
  ["name", "Task"],
  ["score", "Score"],
  ["size", "Size"],
  ["age", "Learned"],
];
const LEAST_FOR_SEARCH = 12;

export function TasksPanel() {
  const [leaving, setLeaving] = useState<Task | null>(null);
  const { value, error } = tasks.value;
  return (
    <section class="panel" id="tasks" aria-labelledby="tasks-title">
      <header class="panel-head">
        <h2 id="tasks-title">Tasks</h2>
        {value && value.length > 0 && (
          <p class="muted">
            {count(value.length, "task")}, {bytes(value.reduce((sum, task) => sum + task.size_bytes, 0))}
          </p>
        )}
      </header>
      {error && <Missing message={error} retry={() => void refreshTasks()} />}
      {!value && !error && <Loading what="the tasks" lines={4} />}
      {value?.length === 0 && (
        <Empty title="No tasks yet">
          {isTeaching.value
            ? "Drop a data file in “Teach a task”, and what it learns appears here."
            : "What it is taught appears here."}
        </Empty>
      )}
      {value && value.length > 0 && <Table all={value} leave={setLeaving} />}
      {leaving && <ForgetDialog task={leaving} close={() => setLeaving(null)} />}
    </section>
  );
}

function Table({ all, leave }: { all: Task[]; leave: (task: Task) => void }) {
  const [column, setColumn] = useState<Column>("age");
  const [search, setSearch] = useState("");
  useTicks();
  const wanted = search.trim().toLowerCase();
  const found = all.filter(({ name }) => name.toLowerCase().includes(wanted)).sort(ORDERS[column]);
  return (
    <>
      {all.length >= LEAST_FOR_SEARCH && (
        <label class="search">
          <span class="unseen">Find a task</span>
          <input
            type="search"
            placeholder="Find a task"
            value={search}
            onInput={(event) => setSearch(event.currentTarget.value)}
          />
        </label>
      )}
      <table class="tasks" role="table">
        <thead>
          <tr>
            {HEADS.map(([name, title]) => (
              <th key={name} scope="col" aria-sort={column === name ? (name === "name" ? "ascending" : "descending") : "none"}>
                <button type="button" class="sort" onClick={() => setColumn(name)}>
                  {title}
                </button>
              </th>
            ))}
            {isTeaching.value && (
              <th scope="col">
                <span class="unseen">Forget</span>
              </th>
            )}
          </tr>
        </thead>
        <tbody role="rowgroup">
          {found.map((task) => (
            <Row key={task.name} task={task} leave={leave} />
          ))}
        </tbody>
      </table>
      {!found.length && <p class="muted">No task has “{search}” in its name.</p>}
    </>
  );
}

function Row({ task, leave }: { task: Task; leave: (task: Task) => void }) {
  const learned = moment(task.created);
  return (
    <tr role="row">
      <th scope="row" role="rowheader">
        <TaskName task={task.name} />
        <span class="about">{about(task)}</span>
      </th>
      <td role="cell" data-title="Score">
        {task.validation_score === null ? <span class="muted">not measured</span> : percent(task.validation_score)}
      </td>
      <td role="cell" data-title="Size">{bytes(task.size_bytes)}</td>
      <td role="cell" data-title="Learned">
        <time dateTime={learned.toISOString()} title={date(learned)}>
          {age(learned)}
        </time>
      </td>
      {isTeaching.value && (
        <td role="cell" class="row-actions">
          <button type="button" class="quiet danger" aria-label={`Forget ${task.name}`} onClick={() => leave(task)}>
            Forget
          </button>
        </td>
      )}
    </tr>
  );
}

function about(task: Task): string {
  const examples = `${plain(task.num_examples)} examples`;
  if (!task.labels.length) return `${examples}, ${task.kind}`;
  const first = task.labels.slice(0, 3);
  const labels = task.labels.length > 3 ? `${first.join(", ")} and ${task.labels.length - 3} more` : list(first);
  return `${examples} of ${labels}`;
}

/** Ages grow while one looks at them. */
function useTicks(): void {
  const [, setNow] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 30_000);
    return () => clearInterval(timer);
  }, []);
}
