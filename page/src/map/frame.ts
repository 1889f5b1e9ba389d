import { scaleLinear, type ScaleLinear } from "d3-scale";
import type { KnowledgeMap, Place } from "../api/types";

/** How places become pixels. */
export interface Frame {
  width: number;
  height: number;
  x: ScaleLinear<number, number>;
  y: ScaleLinear<number, number>;
}

const MARGIN_PX = 26;
/** How much larger than the keys' own part of the plane the view may grow for a question. */
const MOST_GROWN = 1.5;

interface Span {
  low: number;
  high: number;
}

/** The part of the plane that is shown: keys, ellipses and, where not too far off, the questions. */
export function frame(map: KnowledgeMap, points: Place[], width: number, height: number): Frame {
  const own = map.keys.flatMap((key) => [key.place, ...key.ellipse]);
  if (map.num_axes < 2 && map.is_abstaining) own.push([own[0]?.[0] ?? 0, 0]);
  let across = grown(spanOf(own, 0), points, 0);
  let upwards = grown(spanOf(own, 1), points, 1);
  const inner = { width: width - 2 * MARGIN_PX, height: height - 2 * MARGIN_PX };
  if (map.num_axes === 2) {
    // A projection: one unit is as long in either direction.
    const unit = Math.max(length(across) / inner.width, length(upwards) / inner.height);
    across = widened(across, unit * inner.width);
    upwards = widened(upwards, unit * inner.height);
  }
  return {
    width,
    height,
    x: scaleLinear([across.low, across.high], [MARGIN_PX, width - MARGIN_PX]),
    y: scaleLinear([upwards.low, upwards.high], [height - MARGIN_PX, MARGIN_PX]),
  };
}

function spanOf(places: Place[], axis: 0 | 1): Span {
  const values = places.map((place) => place[axis]);
  const low = values.length ? values.reduce((a, b) => Math.min(a, b)) : -1;
  const high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
  const room = 0.06 * (high - low) || 1;
  return { low: low - room, high: high + room };
}

function grown(span: Span, points: Place[], axis: 0 | 1): Span {
  const most = (length(span) * (MOST_GROWN - 1)) / 2;
  const room = 0.04 * length(span);
  let { low, high } = span;
  for (const point of points) {
    low = Math.min(low, Math.max(point[axis] - room, span.low - most));
    high = Math.max(high, Math.min(point[axis] + room, span.high + most));
  }
  return { low, high };
}

function length({ low, high }: Span): number {
  return high - low;
}

function widened(span: Span, wanted: number): Span {
  const room = (wanted - length(span)) / 2;
  return { low: span.low - room, high: span.high + room };
}

export interface Spot {
  x: number;
  y: number;
  /** Whether the place lies beyond what is shown, so that the spot is only the nearest one of the edge. */
  isBeyond: boolean;
}

const EDGE_PX = 12;

export function spotOf({ x, y, width, height }: Frame, [across, upwards]: Place): Spot {
  const wanted = { x: x(across), y: y(upwards) };
  const spot = {
    x: Math.min(Math.max(wanted.x, EDGE_PX), width - EDGE_PX),
    y: Math.min(Math.max(wanted.y, EDGE_PX), height - EDGE_PX),
  };
  return { ...spot, isBeyond: Math.hypot(spot.x - wanted.x, spot.y - wanted.y) > 0.5 };
}

/** Far corners are drawn in, as browsers lose precision in the millions of pixels. */
export function polygon({ x, y }: Frame, places: Place[]): string {
  const near = (value: number) => Math.min(Math.max(value, -20_000), 20_000).toFixed(1);
  return `M${places.map(([across, upwards]) => `${near(x(across))},${near(y(upwards))}`).join("L")}`;
}
