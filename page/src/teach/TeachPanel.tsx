import { useRef, useState } from "preact/hooks";
import { tell } from "../api/http";
import { Failure, Loading, Missing } from "../parts/parts";
import { teach } from "../state/jobs";
import { limits, refreshLimits, tasks } from "../state/store";
import { bytes, plain } from "../words";
import { JobList } from "./JobList";
import { readRows, type Rows } from "./readRows";
import { MOST_CHARACTERS, NAME, NAME_RULE, nameFrom } from "./taskName";

interface Chosen {
  file: File;
  rows: Rows;
}

export function TeachPanel() {
  const { value, error } = limits.value;
  return (
    <section class="panel" id="teach" aria-labelledby="teach-title">
      <h2 id="teach-title">Teach a task</h2>
      {error && <Missing message={error} retry={() => void refreshLimits()} />}
      {!value && !error && <Loading what="whether tasks may be taught" />}
      {value?.is_teaching === false && (
        <p class="muted">
          Teaching and forgetting are off here: run the server with <code>--allow-teaching</code> to turn them on.
        </p>
      )}
      {value?.is_teaching && <Choice />}
      <JobList />
    </section>
  );
}

function Choice() {
  const [chosen, setChosen] = useState<Chosen | null>(null);
  const [error, setError] = useState<string | null>(null);
  const [name, setName] = useState("");

  const choose = async (file: File | undefined) => {
    if (!file) return;
    setError(null);
    setChosen(null);
    try {
      setChosen({ file, rows: await readRows(file) });
      setName(nameFrom(file));
    } catch (failure) {
      setError(tell(failure));
    }
  };
  const leave = () => {
    setChosen(null);
    setError(null);
  };

  return (
    <>
      {!chosen && <DropZone choose={choose} />}
      {chosen && <Confirm chosen={chosen} name={name} setName={setName} fail={setError} leave={leave} />}
      {error && <Failure message={error} />}
    </>
  );
}

function DropZone({ choose }: { choose: (file: File | undefined) => void }) {
  const input = useRef<HTMLInputElement>(null);
  const [isOver, setOver] = useState(false);
  return (
    <div
      class={`drop${isOver ? " over" : ""}`}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        choose(event.dataTransfer?.files[0]);
      }}
    >
      <p class="drop-title">Drop a JSONL file here</p>
      <p class="muted" id="teach-format">
        One example a line: <code>{'{"text": …, "label": …}'}</code> or <code>{'{"prompt": …, "completion": …}'}</code>
      </p>
      <button
        type="button"
        class="secondary"
        aria-describedby="teach-format"
        onClick={() => input.current?.click()}
      >
        Choose a file
      </button>
      <input
        ref={input}
        class="unseen"
        type="file"
        accept=".jsonl"
        tabIndex={-1}
        aria-hidden="true"
        onChange={(event) => choose(event.currentTarget.files?.[0])}
      />
    </div>
  );
}

interface ConfirmProps {
  chosen: Chosen;
  name: string;
  setName: (name: string) => void;
  fail: (error: string | null) => void;
  leave: () => void;
}

function Confirm({ chosen, name, setName, fail, leave }: ConfirmProps) {
  const [epochs, setEpochs] = useState("");
  const [isBusy, setBusy] = useState(false);
  const { file, rows } = chosen;
  const wrong = wrongName(name);

  const begin = async () => {
    if (wrong) return;
    setBusy(true);
    fail(null);
    try {
      await teach(name, file, epochs ? Number(epochs) : null);
      leave();
    } catch (failure) {
      fail(tell(failure));
      setBusy(false);
    }
  };

  return (
    <form
      class="confirm"
      onSubmit={(event) => {
        event.preventDefault();
        void begin();
      }}
    >
      <p>
        <strong>{file.name}</strong>{" "}
        <span class="muted">
          {rows.isPartial ? "more than " : ""}
          {plain(rows.numRows)} examples, {bytes(file.size)}
        </span>
      </p>
      <Preview rows={rows} />
      <div class="fields">
        <label>
          Name of the task
          <input
            value={name}
            required
            maxLength={MOST_CHARACTERS}
            autocomplete="off"
            spellcheck={false}
            aria-invalid={Boolean(wrong)}
            aria-describedby="name-hint"
            onInput={(event) => setName(event.currentTarget.value)}
          />
        </label>
        <label>
          Epochs
          <input
            type="number"
            min={1}
            max={100}
            placeholder="as set"
            value={epochs}
            onInput={(event) => setEpochs(event.currentTarget.value)}
          />
        </label>
      </div>
      <p id="name-hint" class={wrong ? "wrong" : "muted"}>
        {wrong ?? "It learns beside the others; none of them changes."}
      </p>
      <div class="actions">
        <button type="button" class="quiet" onClick={leave}>
          Cancel
        </button>
        <button type="submit" class="primary" disabled={isBusy || Boolean(wrong)}>
          {isBusy ? "Sending…" : "Teach it"}
        </button>
      </div>
    </form>
  );
}

function wrongName(name: string): string | null {
  if (!NAME.test(name)) return NAME_RULE;
  const isTaken = tasks.value.value?.some((task) => task.name === name);
  return isTaken ? "There is a task of this name already: forget it first, or choose another name." : null;
}

function Preview({ rows }: { rows: Rows }) {
  return (
    <ul class="preview" aria-label="First examples">
      {rows.examples.map(({ question, answer }, number) => (
        <li key={number}>
          <span class="preview-question">{question}</span>
          <span class="preview-answer">{answer}</span>
        </li>
      ))}
    </ul>
  );
}
