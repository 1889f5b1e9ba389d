import pytest

from slm.config import Config, CosineConfig, DecodingConfig, LearningConfig, RetrievalConfig
from slm.errors import ConfigError


def message_of(mapping: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(mapping)
    return str(caught.value)


@pytest.mark.parametrize("value", [None, [1], "rank"])
def test_settings_that_are_no_mapping_are_refused(value):
    assert message_of(value) == f"Config must be a mapping of settings, got {value!r}: give one"


@pytest.mark.parametrize(
    ("mapping", "mistake"),
    [
        ({"retrieval": {"layers": 3}}, "RetrievalConfig: layers must be a list of whole numbers, got 3"),
        (
            {"retrieval": {"layers": ["a"]}},
            "RetrievalConfig: layers must be a list of whole numbers, got ('a',)",
        ),
        (
            {"retrieval": {"is_abstaining": "no"}},
            "RetrievalConfig: is_abstaining must be true or false, got 'no'",
        ),
        ({"increments": {"rank": 2.5}}, "IncrementConfig: rank must be a whole number, got 2.5"),
        ({"learning": {"num_epochs": True}}, "LearningConfig: num_epochs must be a whole number, got True"),
        ({"learning": {"learning_rate": "1"}}, "LearningConfig: learning_rate must be a number, got '1'"),
        ({"backbone": {"device": 3}}, "BackboneConfig: device must be text, got 3"),
        ({"backbone": {"dtype": None}}, "BackboneConfig: dtype must be text, got None"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(mapping, mistake):
    assert message_of(mapping) == f"{mistake}: correct these settings"


def test_settings_of_a_room_must_be_a_mapping():
    assert message_of({"retrieval": 1}) == "retrieval must be a mapping of settings, got 1"


def test_the_settings_of_a_room_are_of_its_own_class():
    for value, told in (
        (1, "got 1"),
        ({"top_k": 1}, r"got \{'top_k': 1\} \(a mapping is for Config.from_mapping\)"),
        (LearningConfig(), r"got LearningConfig\(.*\)"),
    ):
        with pytest.raises(ConfigError, match=rf"^Config: retrieval must be a RetrievalConfig, {told}: "):
            Config(retrieval=value)


def test_types_and_ranges_are_reported_together():
    text = message_of({"increments": {"rank": 0, "alpha": "x"}})
    assert "alpha must be a number, got 'x'" in text
    assert "rank must be in 1..1024, got 0" in text


def test_not_a_number_is_out_of_every_range():
    assert "got nan" in message_of({"increments": {"alpha": float("nan")}})


def test_values_that_json_can_write_are_taken():
    mapping = {"retrieval": {"layers": [1, 2], "keys_per_task": None}, "increments": {"alpha": 16}}
    config = Config.from_mapping(mapping)
    assert config.retrieval.layers == (1, 2)
    assert Config.from_mapping(config.as_dict()) == config


def test_a_list_of_layers_is_taken_as_it_is_written():
    assert RetrievalConfig(layers=[2, 4]).layers == (2, 4)
    with pytest.raises(ConfigError, match=r"layers must be a list of whole numbers, got \(2, 'a'\)"):
        RetrievalConfig(layers=[2, "a"])


@pytest.mark.parametrize("kind", [LearningConfig, CosineConfig])
def test_a_norm_that_no_store_could_write_is_refused(kind):
    with pytest.raises(ConfigError, match=r"max_grad_norm must be in 1e-06\.\.1e\+30, got inf"):
        kind(max_grad_norm=float("inf"))
    assert LearningConfig(max_grad_norm=None).max_grad_norm is None


def test_the_defaults_have_the_types_they_are_annotated_with():
    assert list(Config()._mistyped()) == list(LearningConfig()._mistyped()) == []


def test_settings_of_the_form_that_was_not_chosen_are_refused():
    assert message_of({"retrieval": {"form": "cosine", "keys_per_task": 4}}) == (
        "RetrievalConfig: keys_per_task (4) is of the gaussian form, set cosine.keys_per_task: "
        "correct these settings"
    )
    assert message_of({"retrieval": {"form": "cosine", "prior": "size"}}) == (
        "RetrievalConfig: prior size is of the gaussian form, the cosine form has none: leave it uniform: "
        "correct these settings"
    )
    assert message_of({"retrieval": {"cosine": {"num_groups": 2}}}) == (
        "RetrievalConfig: settings of cosine have no effect in the gaussian form, set form to cosine: "
        "correct these settings"
    )


def test_a_mistake_inside_the_cosine_settings_is_told_by_name():
    text = message_of({"retrieval": {"form": "cosin", "cosine": {"key_mask": 1.0, "num_group": 2}}})
    assert "unknown setting 'num_group', did you mean 'num_groups'?" in text
    assert "key_mask must be in 0..0.99, got 1.0" in text
    assert "form must be one of gaussian, cosine, got 'cosin', did you mean 'cosine'?" in text


def test_the_cosine_form_survives_the_way_to_json_and_back():
    mapping = {"retrieval": {"form": "cosine", "cosine": {"num_groups": 1, "key_mask": 0}}}
    config = Config.from_mapping(mapping)
    assert Config.from_mapping(config.as_dict()) == config


@pytest.mark.parametrize(
    ("num_examples", "batch_size"), [(1, 4), (48, 4), (250, 5), (800, 16), (100_000, 16)]
)
def test_few_examples_are_learned_in_small_batches_unless_a_size_is_given(num_examples, batch_size):
    assert LearningConfig().rows_per_step(num_examples) == batch_size
    assert LearningConfig(batch_size=32).rows_per_step(num_examples) == 32


def test_a_share_of_tokens_to_sample_from_wants_sampling():
    with pytest.raises(
        ConfigError, match=r"top_p is 0\.9 and no temperature says to sample: set one, or leave"
    ):
        DecodingConfig(top_p=0.9)
    assert DecodingConfig(top_p=0.9, temperature=1.0).top_p == 0.9


@pytest.mark.parametrize("kind", [LearningConfig, DecodingConfig])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_library_would_refuse_later_is_refused_at_once(kind, seed):
    with pytest.raises(ConfigError, match=rf"seed must be in 0\.\.4294967295, got {seed}"):
        kind(seed=seed)
    assert kind(seed=2**32 - 1).seed == 4294967295
