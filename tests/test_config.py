import pytest

from slm.config import Config, LearningConfig
from slm.errors import ConfigError


def message_of(mapping: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(mapping)
    return str(caught.value)


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
    with pytest.raises(ConfigError, match="retrieval must be a mapping of settings, got 1"):
        Config(retrieval=1)


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


def test_the_defaults_have_the_types_they_are_annotated_with():
    assert list(Config()._mistyped()) == list(LearningConfig()._mistyped()) == []
