import { useMemo, useState } from "preact/hooks";
import type { KnowledgeMap, Place } from "../api/types";
import { outline } from "../looks";
import type { Asked } from "../state/asks";
import { look } from "../state/store";
import { arrange } from "./labels";
import { frame, polygon, spotOf, type Frame } from "./frame";

const ASPECT = 0.82;
const MOST_LARGE_KEYS = 60;
const LABEL_FONT = "600 12px system-ui, sans-serif";

interface Props {
  map: KnowledgeMap;
  asks: Asked[];
  current: Asked | null;
  width: number;
}

/** Regions, keys and questions. Keys are reached with the arrow keys once the map has the focus. */
export function Plane({ map, asks, current, width }: Props) {
  const [pointed, setPointed] = useState<number | null>(null);
  const height = Math.round(Math.min(Math.max(width * ASPECT, 260), 560));
  const placed = asks.filter((asked) => asked.point && asked.pointVersion === map.store_version);
  const points = placed.flatMap((asked) => (asked.point ? [asked.point.place] : []));
  const ringed = placed.find((asked) => asked.number === current?.number) ?? null;
  const shape = useMemo(() => frame(map, points, width, height), [map, width, height, JSON.stringify(points)]);
  const told = pointed === null ? null : map.keys[pointed];

  const step = (event: KeyboardEvent) => {
    const ways: Record<string, number> = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const way = ways[event.key];
    if (event.key === "Escape") setPointed(null);
    if (way === undefined) return;
    event.preventDefault();
    const from = pointed ?? (way > 0 ? -1 : 0);
    setPointed((from + way + map.keys.length) % map.keys.length);
  };

  return (
    <div class="plane">
      <svg
        width={width}
        height={height}
        viewBox={`0 0 ${width} ${height}`}
        role="img"
        tabIndex={0}
        aria-label={describe(map, current)}
        aria-describedby="map-told"
        onKeyDown={step}
        onBlur={() => setPointed(null)}
      >
        <Regions map={map} shape={shape} pointed={told?.task ?? null} />
        <Keys map={map} shape={shape} pointed={pointed} point={setPointed} ringed={ringed} />
        {placed.map((asked) => asked !== ringed && <Question key={asked.number} asked={asked} shape={shape} />)}
        {ringed && <Question asked={ringed} shape={shape} isCurrent />}
      </svg>
      <p id="map-told" class="map-told" aria-live="polite">
        {told ? tellKey(map, told.task) : tellPoint(current)}
      </p>
    </div>
  );
}

function Regions({ map, shape, pointed }: { map: KnowledgeMap; shape: Frame; pointed: string | null }) {
  return (
    <g class="regions">
      {map.regions.map(({ task, polygons }) => (
        <path
          key={task}
          class={`region${pointed === task ? " pointed" : ""}`}
          data-hue={look(task).hue}
          d={polygons.map((places) => `${polygon(shape, places)}Z`).join("")}
        />
      ))}
      <path class="borders" d={map.borders.map((border) => polygon(shape, border)).join("")} />
      {map.keys.map(({ task, ellipse }, number) =>
        ellipse.length ? (
          <path key={number} class="ellipse" data-hue={look(task).hue} d={`${polygon(shape, ellipse)}Z`} />
        ) : null,
      )}
      {map.num_axes < 2 && map.is_abstaining && (
        <line class="threshold" x1={0} x2={shape.width} y1={shape.y(0)} y2={shape.y(0)} />
      )}
    </g>
  );
}

interface KeysProps {
  map: KnowledgeMap;
  shape: Frame;
  pointed: number | null;
  point: (number: number | null) => void;
  ringed: Asked | null;
}

function Keys({ map, shape, pointed, point, ringed }: KeysProps) {
  const area = map.keys.length > MOST_LARGE_KEYS ? 40 : 110;
  const spots = map.keys.map((key) => spotOf(shape, key.place));
  const labels = useMemo(() => nameTasks(map, shape, ringed), [map, shape, ringed?.point]);
  return (
    <g class="keys">
      {map.keys.map(({ task }, number) => {
        const { hue, shape: mark } = look(task);
        const { x, y } = spots[number] ?? { x: 0, y: 0 };
        return (
          <g
            key={number}
            class={`key${pointed === number ? " pointed" : ""}`}
            data-hue={hue}
            transform={`translate(${x.toFixed(1)} ${y.toFixed(1)})`}
            onPointerEnter={() => point(number)}
            onPointerLeave={() => point(null)}
          >
            <circle class="key-target" r={14} />
            <path d={outline(mark, area)} />
          </g>
        );
      })}
      {labels.map(({ text, middleX, middleY }) => (
        <text key={text} class="key-label" x={middleX.toFixed(1)} y={middleY.toFixed(1)}>
          {text}
        </text>
      ))}
    </g>
  );
}

/** One label a task, beside the first of its keys and off the question. */
function nameTasks(map: KnowledgeMap, shape: Frame, ringed: Asked | null) {
  const first = new Map<string, Place>();
  for (const { task, place } of map.keys) if (!first.has(task)) first.set(task, place);
  const labels = [...first].map(([text, place]) => ({ text, ...spotOf(shape, place) }));
  const marks = map.keys.map((key) => ({ ...spotOf(shape, key.place), radius: 9 }));
  if (ringed?.point) marks.push({ ...spotOf(shape, ringed.point.place), radius: 16 });
  return arrange(labels, marks, shape, LABEL_FONT);
}

function Question({ asked, shape, isCurrent = false }: { asked: Asked; shape: Frame; isCurrent?: boolean }) {
  if (!asked.point) return null;
  const { x, y } = spotOf(shape, asked.point.place);
  const { hue } = look(asked.point.nearest);
  return (
    <g
      class={`asked${isCurrent ? " current" : ""}${asked.point.is_abstained ? " refused" : ""}`}
      data-hue={asked.point.is_abstained ? -1 : hue}
      transform={`translate(${x.toFixed(1)} ${y.toFixed(1)})`}
    >
      {isCurrent && <circle class="halo" r={15} />}
      {asked.point.is_abstained ? <path d="M-5,-5L5,5M-5,5L5,-5" /> : <circle class="dot" r={isCurrent ? 5.5 : 3.5} />}
    </g>
  );
}

function describe(map: KnowledgeMap, current: Asked | null): string {
  const tasks = `Map of ${map.tasks.length} tasks and ${map.keys.length} keys.`;
  return `${tasks} ${tellPoint(current)} Arrow keys go from key to key.`;
}

function tellKey(map: KnowledgeMap, task: string): string {
  const own = map.keys.filter((key) => key.task === task).length;
  return own > 1 ? `One of ${own} keys of ${task}.` : `The key of ${task}.`;
}

function tellPoint(current: Asked | null): string {
  if (!current) return "Ask something, and the question appears here.";
  const { point } = current;
  if (!point) return "";
  if (point.is_abstained) return `Your question (×) is nearest to ${point.nearest}, but too far away from it.`;
  const drawn = point.region === point.nearest ? "" : ` It is drawn in the region of ${point.region}, as two dimensions leave some out.`;
  return `Your question (ringed) is nearest to ${point.nearest}.${drawn}`;
}
