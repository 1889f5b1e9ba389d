import type { ComponentChildren } from "preact";
import { isKeyWanted } from "../api/http";
import { look } from "../state/store";
import { outline } from "../looks";

/** A task's colour and symbol. */
export function Swatch({ task }: { task: string }) {
  const { hue, shape } = look(task);
  return (
    <svg class="swatch" data-hue={hue} viewBox="-8 -8 16 16" aria-hidden="true">
      <path d={outline(shape, 110)} />
    </svg>
  );
}

export function TaskName({ task }: { task: string }) {
  return (
    <span class="task-name">
      <Swatch task={task} />
      <span>{task}</span>
    </span>
  );
}

/** What stands where there is nothing to show yet. */
export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <p class="empty-title">{title}</p>
      {children && <p>{children}</p>}
    </div>
  );
}

/** Why something is not there; without a key that goes for everything, and the header asks for it. */
export function Missing({ message, retry }: { message: string; retry: () => void }) {
  if (isKeyWanted.value) return <Empty title="Waiting for a key" />;
  return <Failure message={message} retry={retry} />;
}

export function Failure({ message, retry }: { message: string; retry?: () => void }) {
  return (
    <div class="failure" role="alert">
      <p>{message}</p>
      {retry && (
        <button type="button" class="quiet" onClick={retry}>
          Try again
        </button>
      )}
    </div>
  );
}

/** Grey lines in the place of something that is on its way. */
export function Loading({ what, lines = 3 }: { what: string; lines?: number }) {
  return (
    <div class="loading" role="status">
      <span class="unseen">{`Loading ${what}`}</span>
      {Array.from({ length: lines }, (_, i) => (
        <span key={i} class="loading-line" aria-hidden="true" />
      ))}
    </div>
  );
}
