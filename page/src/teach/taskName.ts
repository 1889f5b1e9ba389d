/** What a task may be called: the server's own rule (`check_name` in `slm/tasks/task.py`). */

export const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;
export const MOST_CHARACTERS = 64;
export const NAME_RULE =
  "Use 1 to 64 of a-z, 0-9, dot, hyphen and underscore, the first one a letter or a digit.";

/** A task's name from a file's: `My data (2).jsonl` becomes `my-data-2`. */
export function nameFrom(file: File): string {
  const stem = file.name.replace(/\.[^.]*$/, "").toLowerCase();
  const allowed = stem.replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "");
  return allowed.slice(0, MOST_CHARACTERS).replace(/-+$/, "");
}
