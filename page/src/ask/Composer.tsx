import { useRef, useState } from "preact/hooks";
import { ask, isAnswering, stop, type Options } from "../state/asks";
import { backbone, forcedTask, limits, models } from "../state/store";

const DEFAULTS: Options = { model: "auto", maxTokens: null, temperature: 0 };

export function Composer() {
  const [question, setQuestion] = useState("");
  const [options, setOptions] = useState(DEFAULTS);
  const field = useRef<HTMLTextAreaElement>(null);

  const submit = () => {
    const words = question.trim();
    if (!words) {
      field.current?.focus();
      return;
    }
    void ask(words, options);
    setQuestion("");
  };

  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        submit();
      }}
    >
      <label for="question" class="unseen">
        Your question
      </label>
      <textarea
        id="question"
        ref={field}
        rows={3}
        value={question}
        placeholder="Ask anything. Nobody has to say which task it belongs to."
        aria-describedby="question-hint"
        onInput={(event) => setQuestion(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          submit();
        }}
      />
      <div class="composer-row">
        <ModelChoice options={options} choose={setOptions} />
        <span id="question-hint" class="hint wide-only">
          Shift + Enter for a new line
        </span>
        {isAnswering.value && (
          <button type="button" class="secondary" onClick={stop}>
            Stop
          </button>
        )}
        <button type="submit" class="primary">
          Ask
        </button>
      </div>
      <MoreOptions options={options} choose={setOptions} />
    </form>
  );
}

interface ChoiceProps {
  options: Options;
  choose: (options: Options) => void;
}

function ModelChoice({ options, choose }: ChoiceProps) {
  const forced = (models.value.value ?? []).map(({ id }) => id).filter((id) => forcedTask(id));
  const isGone = options.model !== "auto" && options.model !== backbone.value && !forced.includes(options.model);
  return (
    <label class="model-choice">
      <span class="unseen">Knowledge to use</span>
      <select
        value={isGone ? "auto" : options.model}
        onChange={(event) => choose({ ...options, model: event.currentTarget.value })}
      >
        <option value="auto">Find the task itself</option>
        {backbone.value && <option value={backbone.value}>Nothing taught (frozen model)</option>}
        {forced.length > 0 && (
          <optgroup label="Always this task">
            {forced.map((id) => (
              <option key={id} value={id}>
                {forcedTask(id)}
              </option>
            ))}
          </optgroup>
        )}
      </select>
    </label>
  );
}

function MoreOptions({ options, choose }: ChoiceProps) {
  const most = limits.value.value?.max_tokens ?? null;
  return (
    <details class="more-options">
      <summary>Length and temperature</summary>
      <div class="fields">
        <label>
          Longest answer, tokens
          <input
            type="number"
            min={1}
            {...(most === null ? {} : { max: most })}
            placeholder="as set"
            value={options.maxTokens ?? ""}
            onChange={(event) => {
              const wanted = Math.round(event.currentTarget.valueAsNumber);
              choose({ ...options, maxTokens: wanted ? Math.min(Math.max(wanted, 1), most ?? Infinity) : null });
            }}
          />
        </label>
        <label>
          Temperature
          <input
            type="number"
            min={0}
            max={2}
            step={0.1}
            value={options.temperature}
            onChange={(event) => {
              const wanted = event.currentTarget.valueAsNumber || 0;
              choose({ ...options, temperature: Math.min(Math.max(wanted, 0), 2) });
            }}
          />
        </label>
      </div>
    </details>
  );
}
