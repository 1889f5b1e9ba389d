"""The routed model under lm-evaluation-harness, against slow references and the harness's own model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm import ScalableLM
from slm.config import Config, LearningConfig, RetrievalConfig
from slm.errors import BackboneError, ConfigError
from tests.backbone.families import load, save

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install scalable-lm[harness]"
)

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slm.bench import harness

# Of the harness and of the libraries only it brings.
pytestmark = pytest.mark.filterwarnings("ignore")

CONTEXTS = (
    "où est la gare",
    "what a lovely film",
    "well, das Wetter ist gut",
    "wo ist der Bahnhof",
    "",
    "i hated it",
    "SELECT name, price FROM products WHERE price > 10 ORDER BY price DESC LIMIT 5;",
)
CONTINUATIONS = (" french", " good", " a much longer continuation", " x", " Berlin", "\nbad", " 7 rows")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("LLaMA", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backbone(folder):
    return load(folder)


def new_store(root, backbone, **retrieval):
    learning = LearningConfig(num_epochs=2, learning_rate=2e-2, has_progress=False)
    config = Config(learning=learning, retrieval=RetrievalConfig(**retrieval))
    return ScalableLM.create(root / "store", backbone, config)


@pytest.fixture(scope="module")
def store(tmp_path_factory, backbone, languages, moods):
    """Two tasks; a false-refusal rate that refuses some texts and lets others in."""
    model = new_store(tmp_path_factory.mktemp("harness"), backbone, false_refusal_rate=0.5)
    model.learn(languages)
    model.learn(moods)
    return model.store.path


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def bent_copy(folder, model, question):
    """A copy of the backbone with the mixture of one question added to its weights, layer by layer."""
    copy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not question:
        return copy
    found = model.retrieve([question])
    records, modules = model.tasks, dict(copy.named_modules())
    for task, number, weight in zip(
        found.tasks[0].tolist(), found.increments[0].tolist(), found.weights[0].tolist(), strict=True
    ):
        increment = model.store.increment(records[task], number)
        for name, pair in increment.pairs.items():
            modules[name].weight.data += weight * increment.scale * pair.B @ pair.A
    return copy


@torch.no_grad()
def slow_score(folder, model, context, continuation):
    tokenizer = model.backbone.renderer.tokenizer
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"]) if context else 1  # the begin token
    log_probs = bent_copy(folder, model, context)(torch.tensor([whole])).logits[0].log_softmax(-1)
    chosen = [float(log_probs[i - 1, whole[i]]) for i in range(start, len(whole))]
    return sum(chosen), all(int(log_probs[i - 1].argmax()) == whole[i] for i in range(start, len(whole)))


def test_routed_loglikelihoods_equal_a_slow_reference(folder, backbone, store):
    model = harness.HarnessModel(str(store), backbone, batch_size=4)
    found = model.loglikelihood(
        requests("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True)), disable_tqdm=True
    )
    wanted = [slow_score(folder, model.model, *pair) for pair in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    # The rows differ: both tasks are used, and some texts abstain.
    seen = model.model.retrieve([text for text in CONTEXTS if text])
    assert set(seen.tasks[~seen.is_abstained, 0].tolist()) == {0, 1}
    assert seen.is_abstained.any()


def test_routing_changes_what_the_frozen_model_says(folder, backbone, store):
    routed = harness.HarnessModel(str(store), backbone)
    frozen = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    asked = requests("loglikelihood", ("où est la gare", "\nfrench"))
    ours, theirs = (model.loglikelihood(asked, disable_tqdm=True)[0][0] for model in (routed, frozen))
    assert ours > theirs + 1


def test_an_empty_store_is_the_harness_own_model(tmp_path, folder, backbone):
    empty = harness.HarnessModel(str(new_store(tmp_path, backbone).store.path), backbone, batch_size=3)
    frozen = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    asked = requests("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True))
    ours, theirs = (model.loglikelihood(asked, disable_tqdm=True) for model in (empty, frozen))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    texts = requests("loglikelihood_rolling", ("i loved it",), ("a long text about harbours " * 40,))
    ours, theirs = (model.loglikelihood_rolling(texts, disable_tqdm=True) for model in (empty, frozen))
    assert ours == pytest.approx(theirs, rel=1e-5)
    writing = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "top_p": 0.95}
    asked = requests("generate_until", *((text, writing) for text in CONTEXTS if text))
    ours, theirs = (model.generate_until(asked, disable_tqdm=True) for model in (empty, frozen))
    assert ours == [text.strip() for text in theirs]


def test_a_context_longer_than_the_window_loses_its_beginning(tmp_path, folder, backbone):
    empty = harness.HarnessModel(str(new_store(tmp_path, backbone).store.path), backbone)
    frozen = HFLM(pretrained=str(folder), dtype="float32", device="cpu")
    asked = requests("loglikelihood", ("a long text about harbours " * 40, " and more"))
    ours, theirs = (model.loglikelihood(asked, disable_tqdm=True)[0][0] for model in (empty, frozen))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_writing_stops_before_the_first_stop_text(tmp_path, backbone):
    empty = harness.HarnessModel(str(new_store(tmp_path, backbone).store.path), backbone)
    whole = {"until": [], "max_gen_toks": 12}
    (text,) = empty.generate_until(requests("generate_until", ("i loved it", whole)), disable_tqdm=True)
    stop = text[3:5]
    cut = {"until": [stop, "never"], "max_gen_toks": 12}
    (short,) = empty.generate_until(requests("generate_until", ("i loved it", cut)), disable_tqdm=True)
    assert short == text[: text.find(stop)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Two tasks of the harness over local files: which language, and how to go on."""
    root = tmp_path_factory.mktemp("suite")
    lines = [("où est la gare", "french"), ("das Wetter ist gut", "german"), ("merci beaucoup", "french")]
    rows = [{"text": text, "label": label} for text, label in lines]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {root}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: label
target_delimiter: "\\n"
"""
    choice = "task: local_languages\noutput_type: multiple_choice\ndoc_to_choice: [french, german]\n"
    (root / "languages.yaml").write_text(choice + shared)
    written = (
        "task: local_written\noutput_type: generate_until\n"
        "generation_kwargs: {until: ['!'], max_gen_toks: 4, do_sample: false}\n"
    )
    (root / "written.yaml").write_text(written + shared)
    return root


def test_a_local_task_gives_the_share_of_right_labels(tmp_path, backbone, store, suite):
    tasks = TaskManager(include_path=str(suite), include_defaults=False)
    model = harness.HarnessModel(str(store), backbone)
    results = simple_evaluate(
        model, tasks=["local_languages", "local_written"], task_manager=tasks, bootstrap_iters=0
    )
    answers = model.model.ask(["où est la gare", "das Wetter ist gut", "merci beaucoup"], max_new_tokens=8)
    right = [a.text == wanted for a, wanted in zip(answers, ("french", "german", "french"), strict=True)]
    assert results["results"]["local_languages"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert results["results"]["local_written"]["sample_len"] == 3


def test_the_harness_knows_the_model_by_name(backbone, store):
    model = get_model("slm").create_from_arg_obj(
        {"store": str(store), "backbone": backbone}, {"batch_size": 2, "max_batch_size": None, "device": None}
    )
    assert isinstance(model, harness.HarnessModel)
    assert model.batch_size == 2


def test_an_exported_task_runs_as_a_checkpoint(tmp_path, backbone, store, languages):
    model = ScalableLM.open(store, backbone)
    model.export("languages", tmp_path / "merged", is_merged=True)
    merged = HFLM(pretrained=str(tmp_path / "merged"), dtype="float32", device="cpu")
    alone = harness.HarnessModel(str(store), backbone)
    alone.model = model.restricted(["languages"], is_abstaining=False)
    asked = requests("loglikelihood", ("où est la gare", "\nfrench"), ("merci", " beaucoup"))
    ours, theirs = (model.loglikelihood(asked, disable_tqdm=True) for model in (alone, merged))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=2e-3)


def test_an_encoder_is_refused(tmp_path, minilm):
    store = new_store(tmp_path, minilm).store.path
    with pytest.raises(BackboneError, match=r"the harness scores continuations.*slm eval"):
        harness.HarnessModel(str(store), minilm)


def test_numbers_that_cannot_be_used_are_refused(backbone, store):
    with pytest.raises(ConfigError, match=r"batch_size must be a whole number above 0, got 'auto'"):
        harness.HarnessModel(str(store), backbone, batch_size="auto")
    with pytest.raises(ConfigError, match=r"max_length must be in 2\.\.128"):
        harness.HarnessModel(str(store), backbone, max_length=4096)
    model = harness.HarnessModel(str(store), backbone)
    with pytest.raises(ConfigError, match=r"max_gen_toks is 500.*lower it"):
        model.generate_until(requests("generate_until", ("hello", {"max_gen_toks": 500})))
