"""`mmlora.inputs.adapter_policy`: the decision table of the policy, and the errors of `parse_defaults`."""

import itertools

import pytest

from mmlora.errors import ConfigError
from mmlora.inputs.adapter_policy import choose_adapter, modality_key, parse_defaults

BOTH = {"audio": "S", "image": "V"}
PHI4 = {"audio": "S", "image": "V", "audio+image": "AV"}
ONLY_COMBINATION = {"audio+image": "AV"}

# modalities of the prompt, defaults, adapter, reason
TABLE = [
    ((), {}, None, "none"),
    ((), PHI4, None, "none"),
    (("audio",), {}, None, "none"),
    (("audio",), {"image": "V"}, None, "none"),
    (("audio",), {"audio": "S"}, "S", "default:audio"),
    (("audio",), BOTH, "S", "default:audio"),
    (("image",), BOTH, "V", "default:image"),
    (("audio",), PHI4, "S", "default:audio"),
    (("image",), PHI4, "V", "default:image"),
    (("audio", "image"), {}, None, "none"),
    (("audio", "image"), {"audio": "S"}, "S", "default:audio"),
    (("audio", "image"), {"image": "V"}, "V", "default:image"),
    (("audio", "image"), BOTH, None, "conflict:audio+image"),
    (("audio", "image"), PHI4, "AV", "default:audio+image"),
    (("audio", "image"), ONLY_COMBINATION, "AV", "default:audio+image"),
    (("audio",), ONLY_COMBINATION, None, "none"),
    (("image",), ONLY_COMBINATION, None, "none"),
    (("audio", "audio"), BOTH, "S", "default:audio"),
    # A combination key must name exactly the set that is present.
    (("audio", "image", "video"), PHI4, None, "conflict:audio+image"),
    (("audio", "video"), {"audio": "S", "audio+image": "AV"}, "S", "default:audio"),
    (("audio", "image", "video"), {"audio+image+video": "all", **PHI4}, "all", "default:audio+image+video"),
]


@pytest.mark.parametrize(("modalities", "defaults", "adapter", "reason"), TABLE)
def test_choice_follows_the_table(modalities, defaults, adapter, reason):
    for order in itertools.permutations(modalities):
        choice = choose_adapter(order, defaults)
        assert (choice.adapter, choice.reason) == (adapter, reason)
        assert (choice.warning is not None) == reason.startswith("conflict:")


@pytest.mark.parametrize(("modalities", "defaults"), [(row[0], row[1]) for row in TABLE])
def test_an_explicit_adapter_wins_over_every_row(modalities, defaults):
    choice = choose_adapter(modalities, defaults, explicit="mine")
    assert (choice.adapter, choice.reason, choice.warning) == ("mine", "explicit", None)


@pytest.mark.parametrize(("modalities", "defaults"), [(row[0], row[1]) for row in TABLE])
def test_an_explicit_base_model_wins_over_every_row(modalities, defaults):
    choice = choose_adapter(modalities, defaults, is_base_explicit=True)
    assert (choice.adapter, choice.reason, choice.warning) == (None, "explicit:base", None)


def test_a_conflict_names_the_modalities_and_the_remedy():
    warning = choose_adapter({"audio", "image"}, BOTH).warning
    assert warning is not None
    assert "audio and image" in warning and "'audio+image'" in warning and "none was applied" in warning


@pytest.mark.parametrize("order", list(itertools.permutations(["audio", "image", "video"])))
def test_modality_key_does_not_depend_on_order_or_repetition(order):
    assert modality_key(order) == "audio+image+video"
    assert modality_key([*order, order[0]]) == "audio+image+video"


@pytest.mark.parametrize("key", ["audio+image", "image+audio", " image + audio ", "image+ audio"])
def test_a_combination_key_may_be_written_in_any_order(key):
    parsed = parse_defaults({key: "AV", "audio": "S"}, ["image", "audio"])
    assert parsed == {"audio+image": "AV", "audio": "S"}
    assert choose_adapter(["image", "audio"], parsed).reason == "default:audio+image"


@pytest.mark.parametrize("defaults", [None, {}])
def test_no_defaults_are_fine_for_any_model(defaults):
    assert parse_defaults(defaults, ()) == {}
    assert parse_defaults(defaults, ["audio"]) == {}


@pytest.mark.parametrize(
    ("defaults", "supported", "message"),
    [
        (
            {"video": "p"},
            ["image", "audio"],
            r"default_mm_loras\['video'\]: the key must be one of audio, image .*'audio\+image'",
        ),
        ({"audio+video": "p"}, ["image", "audio"], r"\['audio\+video'\]: the key must be one of audio, image"),
        ({"Audio": "p"}, ["audio"], r"\['Audio'\]: the key must be one of audio"),
        ({"audio+audio": "p"}, ["image", "audio"], r"\['audio\+audio'\]: the key must be one of"),
        ({"": "p"}, ["audio"], r"\[''\]: the key must be one of audio"),
        ({"audio+": "p"}, ["audio"], r"\['audio\+'\]: the key must be one of audio"),
        ({1: "p"}, ["audio"], r"\[1\]: the key must be one of audio"),
        ({"image": "p"}, ["audio"], r"\['image'\]: the key must be one of audio"),
        ({"audio": "p"}, [], r"\['audio'\]: the model takes text only"),
        ({"audio": ""}, ["audio"], r"\['audio'\]='' must be a directory or a Hub id"),
        ({"audio": None}, ["audio"], r"\['audio'\]=None must be a directory or a Hub id"),
        ({"audio": ["p"]}, ["audio"], r"\['audio'\]=\['p'\] must be a directory or a Hub id"),
        ({"audio+image": "p", "image+audio": "q"}, ["image", "audio"], r"\['image\+audio'\] names the same modalities"),
    ],
)
def test_parse_defaults_refuses_by_name(defaults, supported, message):
    with pytest.raises(ConfigError, match=message):
        parse_defaults(defaults, supported)
