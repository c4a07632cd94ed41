"""Ray actors make the store of one process, also when one of them dies."""

import os
import signal

import pytest

from glp_lens.activations import collect
from glp_lens.activations.cluster import collect_on_ray
from glp_lens.errors import InputError
from tests.conftest import tiny_texts

ray = pytest.importorskip("ray")

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
SMALL = {"context": 24, "batch_size": 16, "shard_tokens": 24 * 5, "max_tokens": 223}


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model_folder(tiny_folder):
    return str(tiny_folder)


@pytest.fixture(scope="module")
def whole(tiny_bridge, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "store"
    collect(tiny_bridge, tiny_texts(43), HOOKS, out, **SMALL)
    return files(out)


def files(folder):
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("parts/")}


def opener(folder):
    def open_model():
        from glp_lens.lm import open_model

        return open_model(folder, backend="bridge", dtype="float32")

    return open_model


def failing_once(mark, how):
    """Opens the texts; the first process that does so gets 18 of them, then `how` happens to it."""
    texts = tiny_texts(43)

    def open_texts():
        for i, text in enumerate(texts):
            if i == 18:
                try:
                    mark.touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    how()
            yield text

    return open_texts


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise OSError("the network was away\nfor a while")


def test_actors_make_the_store_of_one_process(cluster, model_folder, tmp_path, whole, capfd):
    texts = tiny_texts(43)
    stores = collect_on_ray(opener(model_folder), lambda: texts, HOOKS, tmp_path, actors=2, parts=3, **SMALL)
    assert list(stores) == HOOKS
    assert files(tmp_path) == whole
    assert "parts: 100%" in capfd.readouterr().err


def test_a_part_that_failed_goes_on_in_a_new_actor_and_a_given_up_one_in_a_new_call(
    cluster, model_folder, tmp_path, whole, capfd
):
    out = tmp_path / "out"
    texts = failing_once(tmp_path / "failed", fail)
    with pytest.raises(InputError, match="part 0/3 failed 1 times, last with OSError: the network was away; ") as error:
        collect_on_ray(opener(model_folder), texts, HOOKS, out, actors=1, parts=3, retries=0, **SMALL)
    assert "\n" not in str(error.value)
    assert not (out / HOOKS[0]).exists()
    texts = failing_once(tmp_path / "died", die)
    collect_on_ray(opener(model_folder), texts, HOOKS, out, actors=1, **SMALL)
    assert (tmp_path / "died").exists()
    assert "part 0/3 failed (ActorDiedError" in "".join(capfd.readouterr())
    assert files(out) == whole


def test_the_users_mistake_comes_through_and_is_not_tried_again(cluster, tmp_path):
    def texts():
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        raise InputError("texts.jsonl is damaged at line 7: repair it")

    with pytest.raises(InputError, match="^texts.jsonl is damaged at line 7: repair it$"):
        collect_on_ray(lambda: None, texts, HOOKS, tmp_path / "a", actors=1, parts=1)
    assert (tmp_path / "tries").read_text() == "x"
    for wrong, message in [({"actors": 0}, "actors and parts >= 1"), ({"part": (0, 2)}, "part cannot be chosen")]:
        with pytest.raises(InputError, match=message):
            collect_on_ray(lambda: None, texts, HOOKS, tmp_path / "b", **wrong)


def test_ray_is_started_where_there_is_none_and_parts_that_are_too_short_go_on(model_folder, tiny_bridge, tmp_path):
    ray.shutdown()
    texts = [" ".join(["cat dog bird"] * (6 if i // 5 % 2 == 0 else 1) + [str(i)]) for i in range(70)]
    options = {**SMALL, "max_tokens": 350, "massive": None}
    collect(tiny_bridge, texts, HOOKS, tmp_path / "whole", **options)
    collect_on_ray(opener(model_folder), lambda: texts, HOOKS, tmp_path / "out", actors=1, parts=2, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not ray.is_initialized()


def test_ray_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    def late(**_):
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(InputError, match=r"Ray does not start \(The current node timed out during startup. More.\)"):
        collect_on_ray(lambda: None, lambda: ["a text"], HOOKS, tmp_path / "s", actors=1, **SMALL)
