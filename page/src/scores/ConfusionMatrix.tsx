import { scaleBand, scaleLinear } from "d3-scale";
import { useState } from "preact/hooks";
import type { Evaluations } from "../api/types";
import { TaskName } from "../parts/parts";
import { useWidth } from "../map/useWidth";
import { percent } from "../words";

type Confusion = NonNullable<Evaluations["confusion"]>;

const LEAST_SHARE = 0.005;
const NUM_TOLD = 5;
const MOST_NUMBERED = 12;
const MOST_NAMED = 26;
const CHARACTER_PX = 6.7;
const SHADE = scaleLinear([0, 1], [0.1, 1]);

/** Each row a task's requests, each column where they should go; mistakes are told in words below. */
export function ConfusionMatrix({ confusion }: { confusion: Confusion }) {
  const { element, width } = useWidth<HTMLDivElement>();
  const [pointed, setPointed] = useState<[number, number] | null>(null);
  const [row, column] = pointed ?? [];
  const share = row === undefined || column === undefined ? null : confusion.shares[row]?.[column];
  return (
    <div ref={element} class="confusion">
      <p class="muted">
        Expected from the keys' own statistics, without asking anything: of a row's task, the share that goes to each
        column. The last column is refused.
      </p>
      {width > 0 && <Cells confusion={confusion} width={width} point={setPointed} />}
      <p class="map-told">
        {typeof share === "number"
          ? `${percent(share)} of ${confusion.rows[row ?? 0]} should go to ${confusion.columns[column ?? 0]}.`
          : ""}
      </p>
      <Mistakes confusion={confusion} />
    </div>
  );
}

interface CellsProps {
  confusion: Confusion;
  width: number;
  point: (cell: [number, number] | null) => void;
}

function Cells({ confusion: { rows, columns, shares }, width, point }: CellsProps) {
  const isNamed = rows.length <= MOST_NAMED;
  const longest = Math.max(...columns.map((name) => name.length));
  const room = isNamed ? Math.min(Math.ceil(longest * CHARACTER_PX) + 10, Math.round(width * 0.34)) : 8;
  const side = Math.min((width - room) / columns.length, 52);
  const x = scaleBand(columns.map((_, i) => i), [room, room + side * columns.length]).paddingInner(0.06);
  const y = scaleBand(rows.map((_, i) => i), [room, room + side * rows.length]).paddingInner(0.06);
  const fitting = Math.floor((room - 10) / CHARACTER_PX);
  return (
    <svg
      class="matrix"
      width={width}
      height={room + side * rows.length}
      role="img"
      aria-label={`Confusion of ${rows.length} tasks; the table of mistakes follows.`}
      onPointerLeave={() => point(null)}
    >
      {shares.map((line, i) =>
        line.map((share, j) => (
          <g key={`${i} ${j}`} onPointerEnter={() => point([i, j])}>
            <rect
              class={i === j ? "right" : share >= LEAST_SHARE ? "wrong" : "none"}
              x={x(j)}
              y={y(i)}
              width={x.bandwidth()}
              height={y.bandwidth()}
              rx={Math.min(4, side / 8)}
              fill-opacity={share >= LEAST_SHARE ? SHADE(i === j ? share : Math.sqrt(share)) : 1}
            />
            {rows.length <= MOST_NUMBERED && side >= 26 && share >= LEAST_SHARE && (
              <text
                class={`cell${(i === j ? share : Math.sqrt(share)) > 0.55 ? " strong" : ""}`}
                x={(x(j) ?? 0) + x.bandwidth() / 2}
                y={(y(i) ?? 0) + y.bandwidth() / 2}
              >
                {Math.round(100 * share) || "<1"}
              </text>
            )}
          </g>
        )),
      )}
      {isNamed && rows.map((name, i) => (
        <text key={name} class="row-name" x={room - 8} y={(y(i) ?? 0) + y.bandwidth() / 2}>
          {shorten(name, fitting)}
        </text>
      ))}
      {isNamed && columns.map((name, j) => (
        <text key={j} class="column-name" transform={`translate(${(x(j) ?? 0) + x.bandwidth() / 2} ${room - 8}) rotate(-90)`}>
          {shorten(name, fitting)}
        </text>
      ))}
    </svg>
  );
}

/** Beginnings and ends tell names apart. */
function shorten(name: string, most: number): string {
  if (name.length <= most) return name;
  const half = Math.max(Math.floor((most - 1) / 2), 1);
  return `${name.slice(0, Math.max(most - 1 - half, 1))}…${name.slice(-half)}`;
}

function Mistakes({ confusion: { rows, columns, shares } }: { confusion: Confusion }) {
  const mistakes = shares
    .flatMap((line, i) => line.map((share, j) => ({ from: rows[i] ?? "", to: columns[j] ?? "", share, isRight: i === j, isRefused: j === rows.length })))
    .filter(({ share, isRight }) => !isRight && share >= LEAST_SHARE)
    .sort((one, other) => other.share - one.share);
  if (!mistakes.length) return <p>No two tasks should be confused.</p>;
  return (
    <ul class="mistakes" aria-label="Most frequent mistakes">
      {mistakes.slice(0, NUM_TOLD).map(({ from, to, share, isRefused }) => (
        <li key={`${from} ${to}`}>
          <span class="number">{percent(share)}</span> of <TaskName task={from} />{" "}
          {isRefused ? "refused" : <>to <TaskName task={to} /></>}
        </li>
      ))}
    </ul>
  );
}
