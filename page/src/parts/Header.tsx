import { useEffect, useRef, useState } from "preact/hooks";
import { bearerKey, isKeyWanted, keepKey } from "../api/http";
import { loadJobs } from "../state/jobs";
import { backbone, refreshAll, tasks } from "../state/store";
import { count } from "../words";
import { ThemeButton } from "./ThemeButton";

const SECTIONS: [string, string][] = [
  ["ask", "Ask"],
  ["map", "Map"],
  ["tasks", "Tasks"],
  ["teach", "Teach"],
  ["scores", "Scores"],
];

export function Header() {
  const [isOpen, setOpen] = useState(false);
  useEffect(() => {
    if (isKeyWanted.value) setOpen(true);
  }, [isKeyWanted.value]);
  return (
    <header class="top">
      <div class="top-row">
        <p class="brand">
          slm
          <span class="brand-about">{tellStore()}</span>
        </p>
        <nav aria-label="Sections">
          {SECTIONS.map(([id, title]) => (
            <a key={id} href={`#${id}`}>
              {title}
            </a>
          ))}
        </nav>
        <div class="top-actions">
          <ThemeButton />
          <button
            type="button"
            class={`quiet${isKeyWanted.value ? " wanted" : ""}`}
            aria-expanded={isOpen}
            aria-controls="key-form"
            onClick={() => setOpen(!isOpen)}
          >
            {bearerKey.value ? "Key set" : "Key"}
          </button>
        </div>
      </div>
      {isOpen && <KeyForm close={() => setOpen(false)} />}
    </header>
  );
}

function tellStore(): string {
  const known = tasks.value.value;
  const parts = [backbone.value, known && count(known.length, "task")].filter(Boolean);
  return parts.join(", ");
}

function KeyForm({ close }: { close: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  const [key, setKey] = useState(bearerKey.value);
  useEffect(() => field.current?.focus(), []);
  return (
    <form
      id="key-form"
      class="key-form"
      onSubmit={(event) => {
        event.preventDefault();
        keepKey(key);
        close();
        void refreshAll();
        void loadJobs();
      }}
      onKeyDown={(event) => event.key === "Escape" && close()}
    >
      <label>
        Key of this server
        <input
          ref={field}
          type="password"
          autocomplete="off"
          spellcheck={false}
          value={key}
          aria-describedby="key-hint"
          onInput={(event) => setKey(event.currentTarget.value)}
        />
      </label>
      <button type="submit" class="primary">
        Use it
      </button>
      {bearerKey.value && (
        <button
          type="button"
          class="quiet"
          onClick={() => {
            keepKey("");
            setKey("");
          }}
        >
          Remove it
        </button>
      )}
      <p id="key-hint" class={isKeyWanted.value ? "wrong" : "muted"}>
        {isKeyWanted.value
          ? "This server answers only with a key it knows."
          : "Kept in this tab only; it is gone when the tab is closed."}
      </p>
    </form>
  );
}
