"""The curve of a training: a table that survives a kill, a picture, and what loggers are sent."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from glp_lens.errors import InputError
from glp_lens.report.plots import loss_curve
from glp_lens.training.config import TrainConfig
from glp_lens.training.history import add_to_history, read_history, write_history
from glp_lens.training.loggers import LOGGERS, open_logger
from glp_lens.training.objective import Batch
from tests.unit.toy_training import Killed, batches, denoiser, rows, train

SIZE = 20
CONFIG = TrainConfig(rows=12 * SIZE, batch_size=SIZE, autocast=False)


def trained(folder, killed_at=None, state=None):
    return train(
        denoiser(), batches(SIZE, killed_at=killed_at), CONFIG, validation=Batch(rows(60, 8)), log_points=6,
        state=state, save_seconds=1e9, save_now=lambda step: step == 4, on_entry=lambda e: add_to_history(folder, e),
    ).history  # fmt: skip


def test_the_table_holds_one_row_a_logging_point(tmp_path):
    history = trained(tmp_path)
    frame = read_history(tmp_path)
    assert frame["step"].tolist() == [2, 4, 6, 8, 10, 12]
    assert frame["rows"].tolist() == [40, 80, 120, 160, 200, 240]
    assert {"lr", "seconds", "loss", "grad_norm", "validation_loss", "validation_loss:sigma=0.9-1.0"} <= {*frame}
    pd.testing.assert_frame_equal(frame, pd.DataFrame(history))
    assert [path.name for path in tmp_path.iterdir()] == ["history.parquet"]  # nothing temporary is left


def test_a_killed_training_leaves_its_curve_and_goes_on_with_it(tmp_path):
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        trained(tmp_path, killed_at=9, state=state)
    assert read_history(tmp_path)["step"].tolist() == [2, 4, 6, 8]  # saved at 4, so 6 and 8 come again
    history = trained(tmp_path, state=state)
    assert read_history(tmp_path)["step"].tolist() == [2, 4, 6, 8, 10, 12]
    assert read_history(tmp_path)["loss"].tolist() == [entry["loss"] for entry in history]


def test_a_reader_never_sees_half_a_table(tmp_path, monkeypatch):
    write_history(tmp_path, [{"step": 1, "loss": 2.0}])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        add_to_history(tmp_path, {"step": 2, "loss": 1.0})
    assert read_history(tmp_path).to_dict("list") == {"step": [1], "loss": [2.0]}
    assert len(list(tmp_path.iterdir())) == 1


def test_entries_may_differ_in_what_they_hold(tmp_path):
    add_to_history(tmp_path, {"step": 1, "loss": 2.0})
    add_to_history(tmp_path, {"step": 2, "loss": 1.0, "validation_loss": 1.5})
    assert read_history(tmp_path)["validation_loss"].fillna(-1).tolist() == [-1, 1.5]


def test_a_missing_or_damaged_table_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no history.parquet in"):
        read_history(tmp_path)
    (tmp_path / "history.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"^[^\n]*cannot be read as parquet[^\n]*$"):
        read_history(tmp_path)


# -- picture -----------------------------------------------------------------------------------------------


def ink(path):
    """How many pixels of the picture are not white, in its left and its right half."""
    dark = matplotlib.image.imread(path)[..., :3].mean(2) < 0.9
    return dark[:, : dark.shape[1] // 2].sum(), dark[:, dark.shape[1] // 2 :].sum()


def curve(n, *, parts=True, validation=True):
    frame = pd.DataFrame(
        {"step": np.arange(1, n + 1), "rows": 4096 * np.arange(1, n + 1), "loss": 2 / np.arange(1, n + 1)}
    )
    if validation:
        frame["validation_loss"] = frame["loss"] + 0.1
    for i in range(10 if parts else 0):
        frame[f"validation_loss:sigma={i / 10:.1f}-{(i + 1) / 10:.1f}"] = 2.0 / (1 + i) + 1 / frame["step"]
    return frame


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize(("parts", "validation"), [(True, True), (False, True), (False, False)])
def test_the_curve_is_drawn_of_whatever_is_known(tmp_path, n, parts, validation):
    loss_curve(curve(n, parts=parts, validation=validation), tmp_path / "new" / "loss.png", title="GLP")
    left, right = ink(tmp_path / "new" / "loss.png")
    assert left > 500
    assert right > 500


def test_the_drawing_shows_the_data(tmp_path):
    """What is drawn, rather than how: another curve gives another picture, the same one the same bytes."""
    pictures = []
    for change in (0.0, 0.0, 0.3):
        frame = curve(20)
        frame["validation_loss"] += change
        loss_curve(frame, tmp_path / "loss.png")
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


# -- loggers -----------------------------------------------------------------------------------------------

ENTRY = {"step": 8, "rows": 160, "lr": 0.5, "loss": 1.5, "validation_loss:sigma=0.1-0.2": 0.25}
SENT = {"rows": 160, "lr": 0.5, "loss": 1.5, "validation_loss/sigma=0.1-0.2": 0.25}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_sent_values_at_their_steps(monkeypatch, tmp_path, name):
    calls = []
    fake = SimpleNamespace(
        init=lambda **k: calls.append(("init", k)),
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    logger = open_logger(name, tmp_path / "my-prior", {"lr": 0.5})
    logger.log(ENTRY)
    logger.log({"step": 9, "loss": 1.25})
    logger.close()
    assert calls == [
        ("init", {"project": "glp-lens", "name": "my-prior", "config": {"lr": 0.5}}),
        ("log", 8, SENT),
        ("log", 9, {"loss": 1.25}),
        ("finish",),
    ]


def test_tensorboard_is_sent_a_scalar_for_each_value(monkeypatch, tmp_path):
    scalars, closed, folders, texts = {}, [], [], []

    class SummaryWriter:
        def __init__(self, log_dir):
            folders.append(log_dir)

        def add_text(self, tag, text):
            texts.append((tag, text))

        def add_scalar(self, tag, value, step):
            scalars[tag, step] = value

        def flush(self):
            closed.append("flushed")

        def close(self):
            closed.append("closed")

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    logger = open_logger("tensorboard", tmp_path / "my-prior", {"lr": 0.5})
    logger.log(ENTRY)
    logger.close()
    assert scalars == {(name, 8): value for name, value in SENT.items()}
    assert folders == [str(tmp_path / "my-prior" / "tensorboard")]
    assert "lr: 0.5" in texts[0][1]
    assert closed == ["flushed", "closed"]


def test_tensorboard_files_are_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger("tensorboard", tmp_path, {"lr": 0.5})
    logger.log(ENTRY)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in SENT} == {
        tag: [(8, pytest.approx(value))] for tag, value in SENT.items()
    }


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_told_with_its_remedy(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(InputError, match=rf"^logger '{name}' is not installed: pip install {name}[^\n]*$"):
        open_logger(name, tmp_path, {})


def test_a_logger_of_no_known_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="logger must be one of trackio, wandb, tensorboard, got 'mlflow'"):
        open_logger("mlflow", tmp_path, {})


def test_no_dashboard_is_loaded_by_training():
    code = "import glp_lens.training.loop, glp_lens.training.loggers, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"wandb", "trackio", "tensorboard"}.isdisjoint(loaded)
