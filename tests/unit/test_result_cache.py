"""A value is made once for equal inputs, and anew for others or when its file is damaged."""

import math
from operator import itemgetter

import numpy as np
import pytest
import torch

from glp_lens.evals.cache import ResultCache, digest
from glp_lens.evals.results import Results


def counted(cache, name="a task", inputs="x"):
    made = []
    value = cache.get(name, lambda: inputs, lambda: made.append(1) or {"numbers": (1, math.nan)}, itemgetter("numbers"))
    assert value == [1, None]  # made now or kept, it is what JSON can hold
    return len(made)


def test_equal_inputs_are_read_and_others_made(tmp_path):
    assert counted(ResultCache(tmp_path, lambda: ["model"])) == 1
    assert counted(ResultCache(tmp_path, lambda: ["model"])) == 0
    assert counted(ResultCache(tmp_path, lambda: ["other"])) == 1
    assert counted(ResultCache(tmp_path, lambda: ["model"]), inputs="y") == 1
    assert counted(ResultCache(tmp_path, lambda: ["model"]), name="a/task") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"value": 3', '{"value": null}', '{"value": {"other": 1}}'])
def test_a_damaged_file_is_made_anew(tmp_path, text):
    counted(ResultCache(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert counted(ResultCache(tmp_path)) == 1
    assert counted(ResultCache(tmp_path)) == 0


def test_records_are_kept_one_by_one_and_a_torn_line_costs_itself_alone(tmp_path):
    def records(inputs="x"):
        return ResultCache(tmp_path).records("texts", lambda: inputs)

    first = records()
    first.add({"a": [1, math.nan]})
    first.add({"b": 2, "c": 3})
    assert records().values == {"a": [1, None], "b": 2, "c": 3}
    assert records("y").values == {}
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])  # as if the run had been killed while it wrote
    again = records()
    assert again.values == {"a": [1, None], "b": 2}
    again.add({"c": 4, "a": 5})
    assert records().values == {"a": 5, "b": 2, "c": 4}
    nowhere = ResultCache(None).records("texts", lambda: "x")
    nowhere.add({"a": 1})
    assert nowhere.values == {"a": 1}


def test_without_a_folder_nothing_is_hashed_or_kept():
    def refused():
        raise AssertionError("hashed")

    cache = ResultCache(None, refused)
    assert cache.get("a", refused, lambda: 3, int) == 3


def test_arrays_and_tensors_count_by_their_bytes():
    x = torch.arange(6, dtype=torch.float32)
    same = [x, x.clone(), x[None][0]]
    assert len({digest(y) for y in same}) == 1
    others = [x.double(), x.bfloat16(), x.reshape(2, 3), x + 1, x.numpy().astype(np.int64), torch.tensor(0.0), None]
    assert len({digest(y) for y in [x, *others]}) == 1 + len(others)


def test_modules_count_by_their_weights_and_objects_by_their_values():
    layers = [torch.nn.Linear(2, 3) for _ in range(2)]
    assert digest(layers[0]) != digest(layers[1])
    layers[1].load_state_dict(layers[0].state_dict())
    assert digest(layers[0]) == digest(layers[1])
    ids = np.array(["a", "b", None], dtype=object)
    assert digest(ids) == digest(ids.copy()) != digest(ids[::-1])


def test_what_cannot_be_told_apart_is_not_kept(tmp_path):
    """Two functions look alike, and an address is used again: their results would be taken for one another's."""
    for _ in range(2):
        with pytest.warns(UserWarning, match="a task: no results are kept, as a function has no hash"):
            assert counted(ResultCache(tmp_path), inputs=[lambda x: x]) == 1
    with pytest.warns(UserWarning, match="no results are kept"):
        assert counted(ResultCache(tmp_path, lambda: [lambda x: x])) == 1
    assert list(tmp_path.iterdir()) == []


def test_names_of_any_length_and_script_are_files(tmp_path):
    assert counted(ResultCache(tmp_path), name="語" * 200) == 1
    assert counted(ResultCache(tmp_path), name="語" * 200) == 0


def test_results_come_back_as_they_were(tmp_path):
    def make():
        results = Results("density", failures=["a sentence"])
        results.add("glp", "heldout", "sigma=0.1-0.2", "flow_loss_diff:pca", 1 / 3)
        return results

    first = ResultCache(tmp_path).results("density", list, make)
    again = ResultCache(tmp_path).results("density", list, lambda: pytest.fail("made again"))
    assert again.to_json() == first.to_json()
    assert again.metrics[0].other == "pca"
