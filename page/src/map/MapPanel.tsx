import { Empty, Loading, Missing } from "../parts/parts";
import { asks, current } from "../state/asks";
import { map, refreshAll } from "../state/store";
import type { KnowledgeMap } from "../api/types";
import { count, percent } from "../words";
import { Plane } from "./Plane";
import { useWidth } from "./useWidth";

export function MapPanel() {
  const { element, width } = useWidth<HTMLDivElement>();
  const { value, error } = map.value;
  return (
    <section class="panel map-panel" id="map" aria-labelledby="map-title">
      <h2 id="map-title">Knowledge map</h2>
      <div ref={element}>
        {value && value.keys.length > 0 && width > 0 && (
          <Plane map={value} asks={asks.value} current={current.value} width={width} />
        )}
        {value && !value.keys.length && (
          <Empty title="An empty map">Every task it learns gets a place here: teach it one below.</Empty>
        )}
        {!value && !error && <Loading what="the map" lines={5} />}
      </div>
      {error && <Missing message={error} retry={() => void refreshAll()} />}
      {value && value.keys.length > 0 && <Caption map={value} />}
    </section>
  );
}

function Caption({ map }: { map: KnowledgeMap }) {
  return (
    <details class="caption">
      <summary>How to read it</summary>
      <p>
        Every mark is a key: where the requests of a task lie on average. A coloured region is where that key is the
        nearest one.{" "}
        {map.keys.some((key) => key.ellipse.length) &&
          `The outline around a key should hold ${percent(map.ellipse_share)} of its task's requests. `}
        {map.is_abstaining && "A question marked × is too far from its nearest key, so no task answers it. "}
        {tellAxes(map)}
      </p>
    </details>
  );
}

function tellAxes(map: KnowledgeMap): string {
  if (map.num_axes < 2) {
    const height = map.is_abstaining
      ? "how far beyond its limit a request lies: above the dashed line it is refused"
      : "the distance to the nearest key";
    return `So few keys need no plane: the height is ${height}.`;
  }
  if (map.is_exact) return "Nothing is left out: the regions are exact.";
  const held = percent(map.drawn_share);
  const directions = count(map.num_directions, "direction");
  return (
    `The keys differ in ${directions}. The two drawn here tell them apart best and hold ${held} of their squared ` +
    "distances, so a question may lie in one region and still be nearer to another task's key."
  );
}
