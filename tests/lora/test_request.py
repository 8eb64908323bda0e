import copy
import pickle
from pathlib import Path

import pytest

from mmlora.errors import AdapterError
from mmlora.lora.request import BASE, LoRARequest


def test_fields_and_the_names_that_vllm_scripts_use() -> None:
    request = LoRARequest("sql", 7, "org/sql")
    assert (request.name, request.adapter_id, request.path) == ("sql", 7, "org/sql")
    assert request.base_model_name is None and not request.load_inplace and not request.only_known
    assert request == LoRARequest(lora_name="sql", lora_int_id=7, lora_path="org/sql")


def test_a_path_object_becomes_a_string() -> None:
    assert LoRARequest("a", 2**63 - 1, Path("/x/y")).lora_path == "/x/y"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("", 1, "p"), "lora_name is ''"),
        ((3, 1, "p"), "lora_name is 3"),
        (("a", 0, "p"), "lora_int_id is 0"),
        (("a", 2**63, "p"), "lora_int_id is 9223372036854775808"),
        (("a", True, "p"), "lora_int_id is True"),
        (("a", 1, ""), "lora_path is ''"),
        (("a", 1, None), "lora_path is None"),
        (("a", 1, "p", Path("/models/base")), "base_model_name is PosixPath"),
    ],
    ids=str,
)
def test_bad_fields_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(AdapterError, match=named):
        LoRARequest(*arguments)


def test_base_is_one_object_through_copies_and_pickles() -> None:
    assert repr(BASE) == "mmlora.BASE"
    assert copy.deepcopy(BASE) is BASE and pickle.loads(pickle.dumps(BASE)) is BASE
