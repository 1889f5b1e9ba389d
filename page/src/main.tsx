import { render } from "preact";
import { useEffect } from "preact/hooks";
import { Answer, Earlier } from "./ask/Answer";
import { Composer } from "./ask/Composer";
import { MapPanel } from "./map/MapPanel";
import { Header } from "./parts/Header";
import { ScoresPanel } from "./scores/ScoresPanel";
import { loadJobs } from "./state/jobs";
import { announcement, watchStore } from "./state/store";
import "./styles/base.css";
import "./styles/layout.css";
import "./styles/parts.css";
import "./styles/plots.css";
import { TasksPanel } from "./tasks/TaskTable";
import { TeachPanel } from "./teach/TeachPanel";

function App() {
  useEffect(() => {
    watchStore();
    void loadJobs();
  }, []);
  return (
    <>
      <a class="skip" href="#question">
        Skip to the question
      </a>
      <Header />
      <main>
        <h1 class="unseen">Ask a model that keeps learning</h1>
        <div class="pair">
          <section class="panel" id="ask" aria-labelledby="ask-title">
            <h2 id="ask-title">Ask</h2>
            <Composer />
            <Answer />
            <Earlier />
          </section>
          <MapPanel />
        </div>
        <div class="pair wide-left">
          <TasksPanel />
          <TeachPanel />
        </div>
        <ScoresPanel />
      </main>
      <p class="unseen" role="status" aria-live="polite">
        {announcement.value}
      </p>
    </>
  );
}

const root = document.getElementById("app");
if (root) render(<App />, root);
