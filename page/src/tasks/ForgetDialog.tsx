import { useEffect, useRef, useState } from "preact/hooks";
import { tell } from "../api/http";
import type { Task } from "../api/types";
import { Failure } from "../parts/parts";
import { forget } from "../state/store";

export function ForgetDialog({ task, close }: { task: Task; close: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [error, setError] = useState<string | null>(null);
  const [isBusy, setBusy] = useState(false);
  useEffect(() => dialog.current?.showModal(), []);

  const confirm = async () => {
    setBusy(true);
    try {
      await forget(task.name);
      dialog.current?.close();
    } catch (failure) {
      setError(tell(failure));
      setBusy(false);
    }
  };

  return (
    <dialog ref={dialog} class="dialog" aria-labelledby="forget-title" onClose={close}>
      <h2 id="forget-title">Forget {task.name}?</h2>
      <p>
        What it learned from {task.num_examples} examples is removed from the store, and cannot be brought back except by
        teaching it again. Other tasks answer as if it had never been taught.
      </p>
      {error && <Failure message={error} />}
      <div class="dialog-actions">
        <button type="button" class="secondary" onClick={() => dialog.current?.close()}>
          Keep it
        </button>
        <button type="button" class="primary danger" disabled={isBusy} onClick={() => void confirm()}>
          {isBusy ? "Forgetting…" : "Forget it"}
        </button>
      </div>
    </dialog>
  );
}
