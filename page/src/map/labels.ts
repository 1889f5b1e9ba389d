/** Names beside points without one lying on another. */

export interface Label {
  text: string;
  x: number;
  y: number;
}

export interface Placed extends Label {
  middleX: number;
  middleY: number;
}

interface Box {
  left: number;
  top: number;
  right: number;
  bottom: number;
}

const LINE_PX = 17;
const MARK_PX = 9;
const GAPS_PX = [0, 12, 28];
const TURNS: [number, number][] = [
  [0, -1],
  [0, 1],
  [1, 0],
  [-1, 0],
  [1, -1],
  [-1, -1],
  [1, 1],
  [-1, 1],
];

let pen: CanvasRenderingContext2D | null = null;

function widthOf(text: string, font: string): number {
  pen ??= document.createElement("canvas").getContext("2d");
  if (!pen) return 7 * text.length;
  pen.font = font;
  return pen.measureText(text).width;
}

/** Labels take the first free place near their point, in order; one that finds none is left out. */
export function arrange(
  labels: Label[],
  marks: { x: number; y: number; radius: number }[],
  size: { width: number; height: number },
  font: string,
): Placed[] {
  const taken = marks.map(({ x, y, radius }) => around(x, y, radius, radius));
  const placed: Placed[] = [];
  for (const label of labels) {
    const half = widthOf(label.text, font) / 2 + 3;
    const found = places(label, half).find(({ box }) => fits(box, size) && !taken.some((other) => overlap(box, other)));
    if (!found) continue;
    taken.push(found.box);
    placed.push({ ...label, middleX: found.x, middleY: found.y });
  }
  return placed;
}

function places(label: Label, half: number): { x: number; y: number; box: Box }[] {
  return GAPS_PX.flatMap((gap) =>
    TURNS.map(([turnX, turnY]) => {
      const isBeside = turnX !== 0 && turnY === 0;
      const x = label.x + turnX * (isBeside ? MARK_PX + 4 + half + gap : half * 0.7 + gap);
      const y = label.y + turnY * (MARK_PX + LINE_PX / 2 + 1 + gap);
      return { x, y, box: around(x, y, half, LINE_PX / 2) };
    }),
  );
}

function around(x: number, y: number, halfWidth: number, halfHeight: number): Box {
  return { left: x - halfWidth, top: y - halfHeight, right: x + halfWidth, bottom: y + halfHeight };
}

function fits(box: Box, size: { width: number; height: number }): boolean {
  return box.left >= 4 && box.top >= 4 && box.right <= size.width - 4 && box.bottom <= size.height - 4;
}

function overlap(one: Box, other: Box): boolean {
  return one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
}
