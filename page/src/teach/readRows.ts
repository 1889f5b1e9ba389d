/** A first look at a data file before it is sent, so that mistakes show at once. */

export interface Rows {
  numRows: number;
  /** Whether the file was too long to be read whole here. */
  isPartial: boolean;
  examples: { question: string; answer: string }[];
}

const MOST_READ_BYTES = 8_000_000;
const NUM_EXAMPLES = 3;

export class RowError extends Error {}

export async function readRows(file: File): Promise<Rows> {
  if (!/\.jsonl$/i.test(file.name)) {
    throw new RowError(`${file.name} is no .jsonl file: one JSON object a line, such as {"text": …, "label": …}`);
  }
  const isPartial = file.size > MOST_READ_BYTES;
  const lines = (await file.slice(0, MOST_READ_BYTES).text()).split("\n");
  if (isPartial) lines.pop();
  const examples: Rows["examples"] = [];
  let numRows = 0;
  lines.forEach((line, number) => {
    if (!line.trim()) return;
    const example = readLine(line, number + 1);
    numRows += 1;
    if (examples.length < NUM_EXAMPLES) examples.push(example);
  });
  if (!numRows) throw new RowError(`${file.name} has no rows.`);
  return { numRows, isPartial, examples };
}

function readLine(line: string, number: number): { question: string; answer: string } {
  let row: unknown;
  try {
    row = JSON.parse(line);
  } catch {
    throw new RowError(`Line ${number} is no JSON.`);
  }
  if (typeof row !== "object" || row === null || Array.isArray(row)) {
    throw new RowError(`Line ${number} is no JSON object.`);
  }
  const found = understand(row as Record<string, unknown>);
  if (found) return found;
  const fields = Object.keys(row).join(", ") || "nothing";
  throw new RowError(`Line ${number} has ${fields}: text and label, prompt and completion, or messages are needed.`);
}

function understand(row: Record<string, unknown>): { question: string; answer: string } | null {
  if (Array.isArray(row.messages)) {
    const contents = row.messages.map((message) => String((message as { content?: unknown })?.content ?? ""));
    return { question: contents.slice(0, -1).join("\n"), answer: contents[contents.length - 1] ?? "" };
  }
  const pairs: [string, string][] = [
    ["text", "label"],
    ["prompt", "completion"],
    ["instruction", "output"],
  ];
  for (const [asks, answers] of pairs) {
    if (row[asks] !== undefined && row[answers] !== undefined) {
      const input = row.input ? `\n${String(row.input)}` : "";
      return { question: String(row[asks]) + input, answer: String(row[answers]) };
    }
  }
  return null;
}
