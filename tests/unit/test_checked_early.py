"""What can be seen without the language model is refused before it is opened, which takes long."""

import shlex

import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

from glp_lens import corpus, lm
from glp_lens.activations import ActivationStore, write_store
from glp_lens.errors import InputError
from glp_lens.models.pca import PCA
from glp_lens.pipeline.inputs import open_training_store

HOOK = "blocks.1.hook_resid_post"
SUITE = "--models {f}/pca --store {f}/acts --out {f}/new"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A store, a model and texts, where opening a language model is a fault."""

    def opened(*_, **__):
        raise AssertionError("the language model was opened")

    monkeypatch.setattr(lm, "open_model", opened)
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    PCA.fit(write_store(tmp_path / "acts", rows, hook=HOOK)).save_pretrained(tmp_path / "pca")
    (tmp_path / "texts.csv").write_text("text,label\na cat,1\na king,0\n")
    (tmp_path / "words.csv").write_text("text,label\na cat,good\n")
    (tmp_path / "empty.txt").write_text(" ")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("collect --texts {f}/none.csv --out {f}/new", "none.csv does not exist"),
        ("collect --texts {f}/texts.csv --labels topic --out {f}/new", "has no column 'topic'"),
        ("collect --texts {f}/words.csv --labels label --out {f}/new", "label 'label' must be a number"),
        ("collect --texts {f}/empty.txt --out {f}/new", "every document is empty"),
        ("fidelity --texts {f}/none.csv " + SUITE, "none.csv does not exist"),
        ("fidelity --texts {f}/texts.csv --text-column story " + SUITE, "has no text in 'story'"),
        ("detect --texts {f}/none.csv " + SUITE, "none.csv does not exist"),
        ("detect --tasks family:none " + SUITE, "no family of tasks 'none'"),
        ("detect --tasks nothing " + SUITE, "no probing task matches"),
        ("detect --ref {f}/pca " + SUITE, "--ref must be a prior"),
        ("score --models {f}/pca --texts {f}/texts.csv --ref {f}/pca --out {f}/new", "--ref must be a prior"),
        ("score --models {f}/pca --texts {f}/none.csv --out {f}/new", "none.csv does not exist"),
        ("probe --models {f}/pca --tasks nothing --out {f}/new", "no probing task matches"),
        ("generate --store {f}/acts --concept business --prompts-file {f}/none.txt", "prompts cannot be read"),
        ("generate --store {f}/acts --direction {f}/none.npy", "none.npy"),
        ("features build --models {f}/pca --texts {f}/none.csv --out {f}/new", "none.csv does not exist"),
    ],
)
def test_a_mistake_is_told_before_the_language_model_is_opened(line, words, folder):
    done = CliRunner().invoke(app, shlex.split(line.format(f=folder)))
    assert done.exit_code == 2, (done.exception, done.output)
    assert words in done.stderr
    assert not (folder / "new" / "manifest.json").exists()


def test_a_look_at_texts_reads_no_standard_input_and_tells_no_warning(folder, recwarn):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a cat")
    (folder / "sub" / "b.bin").write_text("x")
    corpus.check_texts(["-", "hf:nobody/nothing", str(folder / "sub"), ""])
    assert not [each for each in recwarn if each.category is UserWarning]


def test_a_store_of_another_place_is_told_with_a_line_that_collects_the_right_one(folder):
    source = {"model": {"name": "org/lm (local folder)", "weight_processing": "raw"}}
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    own = write_store(folder / "own", rows, hook="blocks.2.hook_resid_post", source=source)
    with pytest.raises(InputError) as refused:
        open_training_store(folder / "acts", {"pca": PCA.fit(own)}, allow_mismatch=False)
    line = str(refused.value)
    assert "glp-lens collect --model org/lm --hook blocks.2.hook_resid_post --out NEW_FOLDER" in line
    assert str(folder / "acts") in line
    assert len(ActivationStore.open(folder / "acts")) == 300
