"""The registry of kinds, and the defaults of a training: the same by library, command and comparison."""

import dataclasses
import inspect
from dataclasses import MISSING, asdict

import pytest
import torch

from glp_lens import hub
from glp_lens.activations import write_store
from glp_lens.display.labels import Palette, display
from glp_lens.errors import InputError
from glp_lens.kinds import KINDS, Fit, GLPFit
from glp_lens.models import fitting, model_class
from glp_lens.models.glp import GLP
from glp_lens.models.sae import SAE
from glp_lens.pipeline.train import TrainJob, train
from glp_lens.settings import options
from glp_lens.training.config import RunOptions, TrainConfig, recipe

TRAINED = {name: kind for name, kind in KINDS.items() if kind.fit}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rows = torch.randn(700, 6, generator=torch.Generator().manual_seed(0))
    return write_store(tmp_path_factory.mktemp("stores") / "acts", rows, hook="blocks.1.hook_resid_post")


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "glp"])
def test_settings_of_a_kind_are_keywords_of_its_fit_with_the_same_defaults(name):
    keywords = inspect.signature(model_class(name).fit).parameters
    for known in options(TRAINED[name].fit):
        if known.name == "allow_mismatch":  # of stores, which are checked before
            continue
        assert known.default in (None, (), keywords[known.name].default), known.name


def test_settings_of_a_glp_are_of_its_fit_its_config_or_its_run():
    keywords = {*inspect.signature(GLP.fit).parameters, *inspect.signature(GLP.finetune).parameters}
    keywords |= {*inspect.signature(TrainConfig).parameters, *inspect.signature(RunOptions).parameters}
    ours = {known.name for known in options(GLPFit)}
    assert ours - keywords == {"recipe", "finetune", "checkpoint", "logger"}


class Stopped(Exception):
    """Instead of the training."""


def test_a_glp_without_a_config_is_what_the_command_trains(store, tmp_path, monkeypatch):
    seen = []

    def stop(denoiser, feed, config, **options):
        seen.append((denoiser.config, config))
        raise Stopped

    monkeypatch.setattr(fitting, "train", stop)
    with pytest.raises(Stopped):
        GLP.fit(store)
    with pytest.raises(Stopped):
        train(TrainJob(kind="glp", store=store.path, out=tmp_path / "glp"))
    assert seen[0] == seen[1]
    shape, config = seen[0]
    assert config == dataclasses.replace(recipe("fast", rows=400_000), lr_width=0)
    assert shape.n_layers == 3


def test_every_kind_has_a_name_a_style_and_a_card():
    palette = Palette(KINDS)
    for name, kind in KINDS.items():
        assert display(name) == kind.title
        assert (palette.color(name), palette.marker(name)) == (kind.color, kind.marker)
        about = {"kind": name, "d_in": 6, "model": {}, "provenance": {}, "versions": {}}
        assert f"{kind.card}, of width 6." in hub.card(about, "owner/name")
    assert len({(kind.color, kind.marker) for kind in KINDS.values()}) == len(KINDS)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_setting_of_another_kind_is_refused(kind):
    own = {known.name for known in options(TRAINED[kind].fit)}
    values = {int: 3, float: 0.5, bool: True, str: "a"}
    for other in {known for row in TRAINED.values() for known in options(row.fit)}:
        if other.name in own or other.type not in values or other.default is MISSING:
            continue
        value = not other.default if other.type is bool else values[other.type]
        value = 7.5 if other.name == "massive" else value
        with pytest.raises(InputError, match=f"{other.flag} is an option of a .*, not of kind {kind!r}"):
            TrainJob(kind=kind, **{other.name: value})


def test_a_kind_without_training_is_not_trained():
    assert KINDS["neurons"].fit is None
    with pytest.raises(InputError, match="neurons need no training"):
        TrainJob(kind="neurons")
    with pytest.raises(InputError, match="expected one of glp, sae"):
        TrainJob(kind="vae")
    assert TrainJob(kind="raw").folder.as_posix() == "models/raw"
    assert KINDS["raw"].fit is Fit


def test_an_sae_keeps_its_health_on_held_out_rows(store):
    held_out = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    sae = SAE.fit(store, n_latents=20, k=3, rows=1000, batch_size=50, validation=held_out)
    health, training = sae.health(held_out), sae.provenance["training"]
    assert (training["alive"], training["l0"], training["heldout_fvu"]) == (health.alive, health.l0, health.fvu)
    assert training["autocast"] is True


def test_snapshots_need_a_folder(store):
    with pytest.raises(InputError, match="snapshots need a folder"):
        GLP.fit(store, recipe(rows=256), run=RunOptions(snapshots=3))


def test_options_of_a_run_are_no_settings_of_its_result():
    assert asdict(RunOptions()).keys().isdisjoint(asdict(TrainConfig()))
