import { useEffect, useRef, useState } from "preact/hooks";

/** Width of an element in pixels, kept up to date; 0 until it is known. */
export function useWidth<E extends HTMLElement>() {
  const element = useRef<E>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watched = element.current;
    if (!watched) return;
    const watcher = new ResizeObserver(([entry]) => setWidth(Math.floor(entry?.contentRect.width ?? 0)));
    watcher.observe(watched);
    return () => watcher.disconnect();
  }, []);
  return { element, width };
}
