/** What the server sends. Only what the page reads is named. */

export interface Model {
  id: string;
}

export interface Limits {
  /** Longest answer that may be asked for; null where another server answers. */
  max_tokens: number | null;
  is_teaching: boolean;
}

export interface MixtureItem {
  task: string;
  weight: number;
}

/** The `slm` field of every answer. */
export interface Origin {
  mixture: MixtureItem[];
  is_abstained: boolean;
  store_version: number;
  confidence?: number | null;
}

export interface Candidate {
  task: string;
  weight: number;
  distance: number | null;
  threshold: number | null;
}

export interface Retrieval {
  index: number;
  is_abstained: boolean;
  is_contested: boolean;
  candidates: Candidate[];
}

export interface Task {
  name: string;
  kind: string;
  labels: string[];
  num_examples: number;
  num_keys?: number;
  size_bytes: number;
  validation_score: number | null;
  created: string | number;
}

export type JobState = "queued" | "running" | "succeeded" | "failed" | "cancelled";

export interface Job {
  id: string;
  task: string;
  state: JobState;
  progress: number;
  step?: number | null;
  num_steps?: number | null;
  error?: string | null;
}

export type Place = [number, number];

export interface KnowledgeMap {
  store_version: number;
  form: string;
  tasks: string[];
  num_axes: number;
  num_directions: number;
  drawn_share: number;
  is_exact: boolean;
  is_abstaining: boolean;
  ellipse_share: number;
  keys: { task: string; place: Place; ellipse: Place[] }[];
  regions: { task: string; polygons: Place[][] }[];
  borders: Place[][];
}

export interface MapPoints {
  store_version: number;
  data: MapPoint[];
}

export interface MapPoint {
  index: number;
  place: Place;
  region: string;
  nearest: string;
  is_abstained: boolean;
}

export interface Evaluations {
  store_version: number;
  tasks: { task: string; validation_score: number | null; validation_metric: string }[];
  confusion: { rows: string[]; columns: string[]; shares: number[][] } | null;
  reason: string | null;
}
