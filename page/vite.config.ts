import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import { defineConfig, type Plugin } from "vite";

const ROOT = import.meta.dirname;
const BUILT = join(ROOT, "../src/slm/serving/page");

const sha256 = (bytes: Uint8Array | string) => createHash("sha256").update(bytes).digest("hex");

function filesUnder(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(ROOT, join(entry.parentPath, entry.name)).replaceAll("\\", "/"));
}

/** sha256 over every source, so that a test can tell a stale bundle without npm. */
function hashSources(): string {
  const single = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"];
  const names = [...single, ...filesUnder(join(ROOT, "src"))].sort((a, b) => (a < b ? -1 : 1));
  return sha256(names.map((name) => `${name}\0${sha256(readFileSync(join(ROOT, name)))}\n`).join(""));
}

/** Writes build.json: what was built, from what. The server serves only what it lists. */
function manifest(): Plugin {
  return {
    name: "manifest",
    apply: "build",
    closeBundle() {
      const names = readdirSync(BUILT).filter((name) => name !== "build.json").sort();
      const files = Object.fromEntries(names.map((name) => [name, sha256(readFileSync(join(BUILT, name)))]));
      writeFileSync(join(BUILT, "build.json"), JSON.stringify({ sources: hashSources(), files }, null, 2) + "\n");
    },
  };
}

export default defineConfig({
  base: "/page/",
  plugins: [manifest()],
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/ready": "http://127.0.0.1:8000" } },
  build: {
    outDir: BUILT,
    emptyOutDir: true,
    assetsDir: "",
    assetsInlineLimit: 0,
    target: "es2022",
    cssTarget: "esnext",
    cssCodeSplit: false,
    modulePreload: false,
    rollupOptions: {
      output: { entryFileNames: "page-[hash].js", assetFileNames: "page-[hash][extname]" },
    },
  },
});
