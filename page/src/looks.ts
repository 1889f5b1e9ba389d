import {
  symbol,
  symbolCircle,
  symbolCross,
  symbolDiamond,
  symbolSquare,
  symbolStar,
  symbolTriangle,
  symbolWye,
  type SymbolType,
} from "d3-shape";

/** A task is known by colour and symbol together, so 56 tasks differ. */
const NUM_HUES = 8;
const SYMBOLS: SymbolType[] = [
  symbolCircle,
  symbolSquare,
  symbolTriangle,
  symbolDiamond,
  symbolStar,
  symbolCross,
  symbolWye,
];

export interface Look {
  hue: number;
  shape: SymbolType;
}

export function lookOf(number: number): Look {
  const shape = SYMBOLS[number % SYMBOLS.length] ?? symbolCircle;
  return { hue: number < 0 ? -1 : number % NUM_HUES, shape };
}

export function outline(shape: SymbolType, area: number): string {
  return symbol(shape, area)() ?? "";
}
