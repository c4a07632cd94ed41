"""The command line: mistakes end in one line and exit code 2; YAML files give values, the command line wins."""

import errno
import json
import re
import shlex
import warnings
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
import yaml
from glp_lens_cli import app
from glp_lens_cli._app import warnings_told
from safetensors import SafetensorError
from typer.testing import CliRunner

import glp_lens as gl
import glp_lens.pipeline
from glp_lens import lm
from glp_lens.activations import write_store
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.pca import PCA
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
COMMANDS = [
    "quickstart", "collect", "train", "direction", "generate", "sample", "probe", "steer", "fidelity",
    "density", "detect", "generation", "score", "compare", "scale", "report", "push",
    "features show", "features top", "features steer", "features export", "store info", "store verify",
    "store repair", "store merge", "store import", "store export",
    "choose", "card", "doctor",
]  # fmt: skip
runner = CliRunner(env={"COLUMNS": "200"})


def run(line: str):
    return runner.invoke(app, shlex.split(line))


def unchecked(data: bytes) -> bytes:
    """A JSON file without what it says of itself, so that it is read however it was changed."""
    return json.dumps({key: value for key, value in json.loads(data).items() if key != "glp_lens"}).encode()


def told(result) -> str:
    """The one line of an error; progress bars of work done before may stand above it."""
    lines = [t for t in re.split(r"[\r\n]+", result.stderr) if t.strip() and not re.search(r"\d+%\|", t)]
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0].removeprefix("error: ")


def unfinished(data):
    value = json.loads(data)
    del value["glp_lens"]
    return json.dumps(value | {"complete": False}).encode()


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_folder):
    """What commands can be pointed at by mistake, by name."""
    root = tmp_path_factory.mktemp("files")

    def rows(n, d, seed=0):
        return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

    def copy(source, name, change, file="config.json"):
        """A folder with the files of another, one of them changed."""
        (root / name).mkdir()
        for path in source.iterdir():
            data = path.read_bytes()
            (root / name / path.name).write_bytes(change(data) if path.name == file else data)

    def cut(data):
        return data[: len(data) // 2]

    store = write_store(root / "store", rows(300, 24), hook=HOOK, source={"model": {"name": "tiny"}})
    write_store(root / "held", rows(60, 24, seed=1), hook=HOOK)
    corpus = {"corpus": {"name": "texts.txt (heldout)"}}
    write_store(root / "heldout_texts", rows(60, 24, seed=2), hook=HOOK, source=corpus)
    write_store(root / "elsewhere", rows(60, 24, seed=1), hook="blocks.2.hook_resid_post")
    narrow = write_store(root / "narrow", rows(50, 7), hook=HOOK)
    PCA.fit(store).save_pretrained(root / "pca")
    Gaussian.fit(narrow).save_pretrained(root / "gaussian7")
    copy(root / "store", "cut_store", cut, "shard-00000000.h5")
    copy(root / "store", "flipped", lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], "shard-00000000.h5")
    copy(root / "store", "foreign_store", lambda _: b'{"schema": "photos"}', "manifest.json")
    copy(root / "store", "unfinished", unfinished, "manifest.json")
    copy(root / "pca", "cut_model", cut, "model.safetensors")
    copy(root / "pca", "no_weights", lambda _: b"", "model.safetensors")
    copy(root / "pca", "broken_config", cut)
    copy(root / "pca", "vae", lambda d: unchecked(d).replace(b'"kind": "pca"', b'"kind": "vae"'))
    copy(root / "pca", "misfit", lambda d: unchecked(d).replace(b'"kind": "pca"', b'"kind": "gaussian"'))
    copy(tiny_folder, "cut_lm", cut, "model.safetensors")
    copy(tiny_folder, "foreign_lm", lambda _: b'{"model_type": "toaster"}')
    for name, width in {"narrow": 7, "wide": 24}.items():
        np.save(root / f"{name}.npy", np.ones(width, dtype=np.float32))
    for name in ("empty", "photos"):
        (root / name).mkdir()
    (root / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    (root / "file").write_text("not a folder")
    (root / "texts.txt").write_text("\n".join(tiny_texts(40)))
    (root / "blank.txt").write_text(" \n \n")
    (root / "latin.txt").write_bytes(b"caf\xe9 \xff")
    (root / "texts.pdf").write_bytes(b"%PDF")
    (root / "column.csv").write_text("title,body\na,b\n")
    (root / "classes.csv").write_text(
        "text,label\n" + "\n".join(f"{t},{'abc'[i % 3]}" for i, t in enumerate(tiny_texts(60)))
    )
    (root / "column.jsonl").write_text('{"title": "a"}\n')
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "broken.parquet").write_bytes(b"PAR1 no more")
    (root / "broken.yaml").write_text("seed: [1, 2\nout: ]")
    (root / "list.yaml").write_text("- seed\n- 1\n")
    (root / "unknown.yaml").write_text("seed: 1\ncolour: red\n")
    (root / "words.yaml").write_text("seed: seven\n")
    (root / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, text in {
        "done": "{}",
        "foreign_results": '{"title": "holiday"}',
        "cut_results": '{"format": 1, "suite": "probing", "metrics": [{"sui',
        "bare_results": '{"format": 1, "suite": "probing"}',
        "odd_metrics": '{"format": 1, "suite": "probing", "metrics": [{"colour": 3}]}',
        "other_run/stages": '{"settings": {"seed": 1}, "needs": {}, "seconds": 1.0}',
        "damaged_run/stages": '{"settings": {"se',
    }.items():
        (root / name).mkdir(parents=True)
        (root / name / ("collect.json" if "stages" in name else "results.json")).write_text(text)
    (root / "other_run" / "acts" / "train").mkdir(parents=True)
    return SimpleNamespace(root=root, text=str(root))


@pytest.fixture
def tiny(monkeypatch, tiny_bridge):
    """`--model tiny` is the tiny model, opened once; all other names are looked for as usual."""
    usual = lm.open_model
    monkeypatch.setattr(lm, "open_model", lambda name, **k: tiny_bridge if name == "tiny" else usual(name, **k))


COLLECT = "collect --model tiny --texts {f}/texts.txt --split all"
PROBE = "probe --model tiny --tasks 5_hist_fig_ismale --probe-train 20 --probe-test 10 --out {new}"
STEER = "steer --model tiny --models {f}/pca --store {f}/store --out {new}"
GENERATE = "generate --model tiny --store {f}/store"
DIRECTION = "direction --model tiny"
FIDELITY = "fidelity --model tiny --texts {f}/texts.txt --out {new}"
DENSITY = "density --models {f}/pca --out {new}"
GENERATION = "generation --models {f}/pca --out {new}"
COMPARE = "compare --model tiny --texts {f}/texts.txt --out {new}"

MISTAKES = [
    # the line itself
    ("--nonsense", "No such option: --nonsense"),
    ("colect", "Did you mean 'collect'"),
    ("store inf", "Did you mean 'info'"),
    ("train", "Missing argument"),
    ("probe", "Missing option '--models'"),
    ("report", "Missing argument"),
    ("store info", "Missing argument"),
    ("collect --tokenz 3", "No such option: --tokenz"),
    # collect: texts
    ("collect --texts {f}/none.txt", "none.txt does not exist"),
    ("collect --texts {f}/empty", "holds no text files"),
    ("collect --texts {f}/texts.pdf", "expected a file of kind .txt, .csv, .tsv, .jsonl, .json, .parquet"),
    ("collect --texts {f}/blank.txt", "every document is empty"),
    ("collect --texts {f}/latin.txt", "cannot read"),
    ("collect --texts {f}/column.csv", "has no text in 'text', found title, body"),
    ("collect --texts {f}/column.jsonl", "line 1 has no text in 'text', found title"),
    ("collect --texts {f}/broken.jsonl", "line 2 is no JSON"),
    ("collect --texts {f}/broken.parquet", "cannot read"),
    ("collect --split test", "'test' is not one of 'train', 'heldout', 'all'"),
    # collect: numbers
    (COLLECT + " --tokens many", "Invalid value for '--tokens'"),
    (COLLECT + " --tokens -1", "Invalid value for '--tokens'"),
    (COLLECT + " --context 1", "Invalid value for '--context'"),
    (COLLECT + " --context 999999", "context must be 2 to"),
    (COLLECT + " --seed -1", "Invalid value for '--seed'"),
    # collect: language model
    (COLLECT + " --model {f}/none", "does not exist"),
    (COLLECT + " --model {f}/empty", "without config.json"),
    (COLLECT + " --model {f}/cut_lm", "cannot be opened"),
    (COLLECT + " --model {f}/foreign_lm", "cannot be opened"),
    (COLLECT + " --model {f}/foreign_lm --backend hooked", "opens Llama-architecture folders"),
    (COLLECT + " --model {f}/cut_lm --device banana", "device 'banana' cannot be used here"),
    (COLLECT + " --model {f}/cut_lm --device cuda:77", "try --device cpu"),
    (COLLECT + " --model {f}/cut_lm --lm-dtype int3", "'int3' is not one of 'bfloat16', 'float16', 'float32'"),
    (COLLECT + " --model {f}/cut_lm --backend jax", "'jax' is not one of 'bridge', 'hooked'"),
    (COLLECT + " --hook blocks.1.hook_resid_pots", f"did you mean '{HOOK}'"),
    (COLLECT + " --seed 4294967296", "Invalid value for '--seed'"),
    (COLLECT + " --seed 99999999999999999999999", "Invalid value for '--seed'"),
    (COLLECT + " --documents 99999999999999999999", "documents must be at most 9007199254740991"),
    (COLLECT + " --hook ''", "--hook takes values separated by commas"),
    (COLLECT + " --labels ' , '", "--labels takes values separated by commas"),
    (COLLECT + " --massive 1e308", "over 1 and under 1e+06, or 0, got '1e308'"),
    (COLLECT + " --massive 1", "over 1 and under 1e+06"),
    (COLLECT + " --massive nan", "over 1 and under 1e+06"),
    (COLLECT + " --massive=-3", "over 1 and under 1e+06"),
    (COLLECT + " --temperature 0.5", "--temperature acts only with --generate"),
    (COLLECT + " --temperature 1e300 --generate 2", "temperature must be at most 1000000000000"),
    (COLLECT + " --model {f}/cut_lm --device meta", "device 'meta' cannot be used here"),
    (COLLECT + " --model ''", "model must not be empty"),
    # collect: output
    (COLLECT + " --out ''", "out must not be empty"),
    (COLLECT + " --dtype int8 --out {new}", "'int8' is not one of"),
    (COLLECT + " --out {f}/file", "is not an activation store"),
    (COLLECT + " --out {f}/file/below", "Not a directory; choose another folder"),
    (COLLECT + " --out {f}/photos", "is not an activation store"),
    (COLLECT + " --out {f}/store", "choose another folder"),
    # train
    ("train vae --store {f}/store", "expected one of glp, sae, pca, gaussian, raw"),
    ("train pca --store {f}/none", "no activation store at"),
    ("train pca --store {f}/file", "no activation store at"),
    ("train pca --store {f}/photos", "no activation store at"),
    ("train pca --store {f}/foreign_store", "is not the manifest of an activation store"),
    ("train pca --store {f}/cut_store", "is damaged"),
    ("train pca --store {f}/unfinished", "was interrupted"),
    ("train pca --store {f}/store --out {f}/pca", "or pass --overwrite"),
    ("train pca --store {f}/store --out {new} --rows 5", "--rows is an option of a GLP or SAE"),
    ("train pca --store {f}/store --out {new} --rows 400000", "--rows is an option of a GLP or SAE"),  # the default
    ("train pca --store {f}/store --out {new} --device meta", "device 'meta'"),
    ("train glp --store {f}/store --out {new} --layers 1000000000", "set GLP_LENS_MAX_LAYERS to raise it"),
    ("train glp --store {f}/store --out {new} --width 1000000000000", "set GLP_LENS_MAX_PARAMETERS to raise it"),
    ("train random --store {f}/store --out {new} --features 1000000000000", "set GLP_LENS_MAX_PARAMETERS"),
    ("train sae --store {f}/store --out {new} --latents 1000000000000", "set GLP_LENS_MAX_PARAMETERS"),
    ("train glp --store {f}/store --out {new} --batch-size 99999999999999999999", "batch_size must be at most"),
    ("train glp --store {f}/store --out {new} --condition ''", "condition must not be empty"),
    ("train glp --store {f}/store --out {new} --finetune ' '", "finetune must not be empty"),
    ("train sae --store {f}/store --out {new} --validation {f}/held,{f}/held", "validated on one store, got 2"),
    ("train pca --store {f}/store --out {f}/file/below", "Not a directory"),
    ("train pca --store {f}/store --out {f}/file", "choose another folder"),
    ("train pca --store {f}/store --out {new} --device banana", "device 'banana'"),
    (
        "train pca --store {f}/store --out {new} --condition kind",
        "--condition is an option of a GLP, not of kind 'pca'",
    ),
    (
        "train pca --store {f}/store --out {new} --validation {f}/store",
        "--validation is an option of a GLP or SAE",
    ),
    ("train glp --store {f}/store --out {new} --k 4", "--k is an option of a SAE, not of kind 'glp'"),
    ("train raw --store {f}/store --out {new} --features 4", "--features is an option of a RANDOM, not of kind 'raw'"),
    ("train random --store {f}/store --out {new} --features 0", "Invalid value for '--features'"),
    ("train neurons --store {f}/store --out {new}", "neurons need no training"),
    ("train glp --store {f}/store --out {new} --checkpoint step_1", "--checkpoint is of the prior to --finetune"),
    ("train pca --store {f}/store --out {new} --components 25", "between 1 and 24"),
    ("train pca --store {f}/store --out {new} --components 0", "Invalid value for '--components'"),
    ("train glp --store {f}/store --out {new} --rows 100", "at least one whole batch"),
    ("train glp --store {f}/store --out {new} --rows few", "Invalid value for '--rows'"),
    ("train glp --store {f}/store --out {new} --batch-size 0", "Invalid value for '--batch-size'"),
    ("train glp --store {f}/store --out {new} --width 0", "Invalid value for '--width'"),
    ("train glp --store {f}/store --out {new} --lr -1", "Invalid value for '--lr'"),
    ("train glp --store {f}/store --out {new} --lr nan", "Invalid value for '--lr'"),
    ("train sae --store {f}/store --out {new} --lr 0", "lr must be between 0 and 1"),
    (COMPARE + " --glp-lr 0", "glp_lr must be between 0 and 1"),
    (COMPARE + " --sae-lr 2", "Invalid value for '--sae-lr'"),
    (COMPARE + " --sigmas 0.1,0.1", "each once"),
    (COMPARE + " --hook ''", "hook must not be empty"),
    ("train glp --store {f}/store --out {new} --recipe secret", "'secret' is not one of 'paper', 'small'"),
    ("train glp --store {f}/store --out {new} --validation {f}/none", "no activation store at"),
    ("train glp --store {f}/store --out {new} --validation {f}/narrow", "width 24 (here 7): collect"),
    ("train glp --store {f}/store --out {new} --validation {f}/elsewhere", "was collected at blocks.1"),
    ("train sae --store {f}/store --out {new} --latents 20 --k 21", "k must be between 1 and n_latents = 20"),
    # probe, and the models that three commands load
    (PROBE + " --models ''", "at least one folder"),
    (PROBE + " --models {f}/none", "not found"),
    ("choose {f}/nothing --rows 5", "cells.parquet"),
    ("choose {f}/nothing --rows 0", "rows"),
    ("card {f}/nothing", "model not found"),
    ("card {f}/pca --repository owner/a/b", "'owner/a/b' is no repository id"),
    ("card {f}/pca --results {f}/nothing", "nothing does not exist"),
    ("push {f}/pca owner/pca --results {f}/empty", "holds no results.json of a suite"),
    ("push {f}/pca owner/a/b", "'owner/a/b' is no repository id"),
    ("push {f}/nothing owner/pca", "model not found"),
    ("push {f}/pca owner/pca --format released", "format of a pca must be one of own"),
    ("push {f}/pca owner/pca --license ''", "--license must not be empty"),
    ("store import {f}/rows.npy {new} --from arrays --hook ''", "--hook must not be empty"),
    (
        "store import {f}/rows.npy {new} --from arrays --hook blocks.1.hook_resid_post --key ' '",
        "--key must not be empty",
    ),
    ("push {f}/pca owner/pca", "HF_HUB_OFFLINE is set"),
    (PROBE + " --models {f}/file", "cannot be read"),
    (PROBE + " --models {f}/empty", "not found"),
    (PROBE + " --models {f}/photos", "not found"),
    (PROBE + " --models {f}/broken_config", "cannot be read"),
    (PROBE + " --models {f}/cut_model", "truncated or no safetensors file"),
    (PROBE + " --models {f}/no_weights", "truncated or no safetensors file"),
    (PROBE + " --models {f}/vae", "unknown kind of model 'vae'"),
    (PROBE + " --models {f}/misfit", "do not fit together"),
    (PROBE + " --models {f}/cut_lm", "names no kind of model"),
    (PROBE + " --models a={f}/pca,a={f}/gaussian7", "two models are called 'a'"),
    (PROBE + " --models {f}/pca --device banana", "device 'banana'"),
    (PROBE + " --models {f}/pca --tasks poetry", "no probing task matches 'poetry'"),
    (PROBE + " --models {f}/pca --sigmas low", "--sigmas takes numbers"),
    (PROBE + " --models {f}/pca --sigmas ''", "--sigmas takes numbers"),
    (PROBE + " --models {f}/pca --probe-train -1", "Invalid value for '--probe-train'"),
    (PROBE + " --models {f}/pca --seeds 0", "Invalid value for '--seeds'"),
    (PROBE + " --models {f}/pca --ks 0", "ks must be numbers of features from 1, 'dense', or 'none'"),
    (PROBE + " --models {f}/pca --ks 1,none", "ks must be numbers of features from 1, 'dense', or 'none'"),
    (PROBE + " --models {f}/pca --ks ''", "--ks takes values separated by commas"),
    (PROBE + " --models {f}/pca --pooling median", "'median' is not one of 'last', 'mean', 'max', 'all'"),
    (PROBE + " --models {f}/pca --random", "random features take their number and scale from a GLP"),
    (PROBE + " --models {f}/pca --context 1", "Invalid value for '--context'"),
    (PROBE + " --models sae-lens:nothing", "expected sae-lens:RELEASE:SAE_ID"),
    (PROBE + " --models {f}/pca --tasks {f}/none.csv", "name one that exists"),
    (PROBE + " --models {f}/pca --tasks {f}/column.csv", "'text', found title, body"),
    (PROBE + " --models {f}/pca --tasks {f}/classes.csv", "holds 3 values"),
    (PROBE + " --models {f}/pca --tasks {f}/classes.csv --label-column kind", "'kind'"),
    (PROBE + " --models {f}/pca --tasks {f}/classes.csv --positive d", "positive value 'd'"),
    (PROBE + " --models {f}/pca --tasks {f}/classes.csv --out {f}/classes.csv/out", "choose another folder"),
    (PROBE + " --models {f}/pca --store {f}/store", "--store takes --label"),
    (PROBE + " --models {f}/pca --store {f}/store --label kind", "neither --tasks nor --neurons"),
    ("probe --models {f}/pca --store {f}/store --label kind --out {new}", "'kind'"),
    ("probe --models {f}/pca --store {f}/none --label kind --out {new}", "no activation store at"),
    (PROBE + " --models {f}/pca --hook blocks.9.hook_resid_post", "did you mean"),
    (PROBE + " --models {f}/pca --hook blocks.2.hook_resid_post", f"pca was trained at {HOOK} (here blocks.2"),
    (PROBE + " --models {f}/gaussian7", "was trained on width 7"),
    (PROBE + " --models {f}/pca --model {f}/none", "does not exist"),
    (PROBE + " --models {f}/pca --out {f}/file/below", "Not a directory"),
    # steer
    (STEER + " --models {f}/none", "not found"),
    (STEER + " --models {f}/cut_model", "truncated or no safetensors file"),
    (STEER + " --store {f}/none", "no activation store at"),
    (STEER + " --concepts love", "concepts of topics are all, or sports, business"),
    (STEER + " --experiment persona --concepts sports", "concepts of persona are all, or"),
    (STEER + " --experiment features --concepts sports", "chooses its latents itself"),
    (STEER + " --experiment features", "needs a sparse autoencoder"),
    (STEER + " --noise-seeds 0,0", "different seeds"),
    (STEER + " --controls magic", "controls must be one of shrink"),
    (STEER + " --dtypes int8", "dtypes must be one of"),
    (STEER + " --guidance 1,2 --classes sports", "pairs of a concept and a class"),
    (STEER + " --classes sports=0", "pass guidance"),
    (STEER + " --concepts sports,sports", "concepts must be different"),
    (STEER + " --sweep-checkpoints", "none of the models has checkpoints"),
    (STEER + " --fluency-judge lm --second-model {f}/none", "does not exist"),
    (STEER + " --hosted-url ftp://x --hosted-model m", "hosted_url must be an address"),
    (STEER + " --strengths strong", "--strengths takes numbers"),
    (STEER + " --strengths nan", "--strengths takes numbers"),
    (STEER + " --strengths 0.4,0.2", "positive and rising"),
    (STEER + " --strengths=-1,1", "positive and rising"),
    (STEER + " --prompts 1", "Invalid value for '--prompts'"),
    (STEER + " --prompts 101", "Invalid value for '--prompts'"),
    (STEER + " --new-tokens 0", "Invalid value for '--new-tokens'"),
    (STEER + " --project-u 1", "Invalid value for '--project-u'"),
    (STEER + " --hook blocks.9.hook_resid_post", "did you mean"),
    (STEER + " --device cuda:77", "device 'cuda:77'"),
    (STEER + " --model {f}/cut_lm", "cannot be opened"),
    # generate, direction
    (GENERATE, "--direction FILE or towards --concept NAME"),
    (GENERATE + " --direction {f}/none.safetensors", "does not exist"),
    (GENERATE + " --direction {f}/file", "a direction is read from a file of kind"),
    (GENERATE + " --direction {f}/pca/model.safetensors", "model.safetensors"),
    (GENERATE + " --direction {f}/narrow.npy", "the direction has width 7"),
    (GENERATE + " --direction {f}/wide.npy --strength 0", "strengths other than 0"),
    (GENERATE + " --direction {f}/wide.npy --prompts-file {f}/blank.txt", "holds no prompt"),
    (GENERATE + " --direction {f}/wide.npy --prompts-file {f}/latin.txt", "prompts cannot be read"),
    (GENERATE + " --direction {f}/wide.npy --prior {f}/none", "not found"),
    (GENERATE + " --direction {f}/wide.npy --out {f}/texts.pdf", "--out must be a .csv, .json or .jsonl file"),
    (DIRECTION, "--positive-texts and --negative-texts, or of --concept"),
    (DIRECTION + " --positive-texts {f}/none.txt --negative-texts {f}/texts.txt", "texts cannot be read"),
    (DIRECTION + " --positive-texts {f}/texts.txt --negative-texts {f}/texts.txt", "the same mean activation"),
    (DIRECTION + " --concept sports --out {f}/a.txt", "--out must be a .safetensors"),
    (DIRECTION + " --concept sports --out {f}/file/a.npy", "cannot make folder"),
    (DIRECTION + " --concept sports --text-column body", "--text-column acts only with --positive-texts"),
    (GENERATE + " --direction {f}/wide.npy --out {f}/file/a.csv", "cannot make folder"),
    (GENERATE + " --direction {f}/wide.npy --project-sigma 0.2", "--project-sigma acts only with --prior"),
    (STEER + " --hosted-retries 2", "--hosted-retries acts only with --hosted-url"),
    ("score --model tiny --models {f}/pca --out {f}/file/a", "Not a directory; choose another folder"),
    ("score --model tiny --models {f}/pca --out {new} --neighbours 3", "--neighbours acts only with --store"),
    ("report {f}/done --out {f}/file/a", "Not a directory; choose another folder"),
    # fidelity
    (FIDELITY + " --models {f}/none --store {f}/store", "not found"),
    (FIDELITY + " --models {f}/cut_model --store {f}/store", "truncated or no safetensors file"),
    (FIDELITY + " --models {f}/pca --store {f}/none", "no activation store at"),
    (
        FIDELITY + " --models {f}/pca --store {f}/elsewhere",
        f"model 'pca' was trained at {HOOK} (here blocks.2.hook_resid_post): ",
    ),
    (FIDELITY + " --models {f}/pca --store {f}/store --out {f}/done", "pass --overwrite"),
    (PROBE + " --models {f}/pca --out {f}/done", "pass --overwrite"),
    (STEER + " --out {f}/done", "pass --overwrite"),
    ("report {f}/done --out {f}/done", "pass --overwrite"),
    ("store verify {f}/flipped", "1 of 1 shards differ"),
    ("store verify {f}/none", "no activation store at"),
    (FIDELITY + " --models {f}/pca --store {f}/cut_store", "is damaged"),
    (FIDELITY + " --models {f}/pca --store {f}/narrow", "width 24"),
    (FIDELITY + " --models {f}/pca --store {f}/store --texts {f}/none.txt", "does not exist"),
    (FIDELITY + " --models {f}/pca --store {f}/store --texts {f}/column.csv", "has no text in 'text'"),
    (FIDELITY + " --models {f}/pca --store {f}/store --documents 0", "Invalid value for '--documents'"),
    (FIDELITY + " --models {f}/pca --store {f}/store --hook nothing", "did you mean"),
    (FIDELITY + " --models {f}/pca --store {f}/store --model {f}/none", "does not exist"),
    (FIDELITY + " --models {f}/pca --store {f}/store --device banana", "device 'banana'"),
    (FIDELITY + " --models {f}/pca --store {f}/store --out {f}/file/below", "Not a directory"),
    # density
    (DENSITY + " --store {f}/none", "glp-lens collect --split heldout --out acts_heldout"),
    (DENSITY + " --store {f}/store", "is the store that model 'pca' was trained on"),
    (
        DENSITY + " --store {f}/elsewhere",
        f"model 'pca' was trained at {HOOK} (here blocks.2.hook_resid_post): ",
    ),
    (DENSITY + " --store {f}/held --out {f}/done", "pass --overwrite"),
    (DENSITY + " --store {f}/held --draws 0", "Invalid value for '--draws'"),
    (DENSITY + " --store {f}/held --density-rows 0 --ode-steps 9", "--ode-steps acts only with --density-rows"),
    (FIDELITY + " --models {f}/pca --store {f}/heldout_texts", "is of held-out texts"),
    (STEER + " --store {f}/heldout_texts", "is of held-out texts"),
    # generation
    (GENERATION + " --store {f}/none --heldout {f}/held", "no activation store at"),
    (GENERATION + " --store {f}/store --heldout {f}/none", "glp-lens collect --split heldout --out acts_heldout"),
    (GENERATION + " --store {f}/store --heldout {f}/store", "is the store that model 'pca' was trained on"),
    (GENERATION + " --store {f}/held --heldout {f}/held", "is the training store"),
    (GENERATION + " --store {f}/heldout_texts --heldout {f}/held", "is of held-out texts"),
    (GENERATION + " --store {f}/store --heldout {f}/held --samples 3", "Invalid value for '--samples'"),
    (GENERATION + " --store {f}/store --heldout {f}/held --sampling quick", "a way of sampling is a number of steps"),
    (GENERATION + " --store {f}/store --heldout {f}/held --sampling rk9:4", "unknown solver 'rk9'"),
    (GENERATION + " --store {f}/store --heldout {f}/elsewhere", f"model 'pca' was trained at {HOOK}"),
    # sample
    ("sample", "Missing argument"),
    ("sample {f}/none", "model not found"),
    ("sample {f}/pca --out rows.csv", "--out must be a .npy or .safetensors file"),
    ("sample {f}/pca --out {f}/wide.npy", "pass --overwrite"),
    ("sample {f}/pca --out {new}.npy --n 0", "Invalid value for '--n'"),
    ("sample {f}/pca --out {new}.npy --steps 5", "a pca has no option --steps"),
    ("sample {f}/pca --out {new}.npy --fast", "a pca has no option --fast"),
    ("sample {f}/pca --out {new}.npy --class 2", "this pca knows no class 2: it knows none"),
    ("sample {f}/pca --out {new}.npy --guidance 2", "pass --class too"),
    ("sample {f}/pca --out {new}.npy --device banana", "device 'banana'"),
    ("sample {f}/pca --out {f}/file/rows.npy", "cannot make folder"),
    ("sample {f}/pca --out {new}.npy --steps 99999999", "Invalid value for '--steps'"),
    ("sample {f}/pca --out {new}.npy --class 1e300", "class_label must be at most"),
    ("sample {f}/pca --out {new}.npy --n 9007199254740991", "lower --n, or use a machine with more"),
    ("sample {f}/cut_model --out {new}.npy", "weights cannot be read"),
    # compare and quickstart, which are one
    (COMPARE + " --tokens 0", "Invalid value for '--tokens'"),
    (COMPARE + " --rows 3", "at least one whole batch"),
    (COMPARE + " --sae-k 50 --sae-latents 20", "sae_k must be at most"),
    (COMPARE + " --context 99999", "Invalid value for '--context'"),
    (COMPARE + " --concepts love", "concepts of topics are all, or sports, business"),
    (COMPARE + " --tasks poetry", "no probing task matches 'poetry'"),
    (COMPARE + " --prompts 101", "Invalid value for '--prompts'"),
    (COMPARE + " --strengths 0.4,0.2", "positive and rising"),
    (COMPARE + " --project-sigma 0", "Invalid value for '--project-sigma'"),
    (COMPARE + " --texts {f}/none.txt", "does not exist"),
    (COMPARE.replace("texts.txt", "blank.txt"), "every document is empty"),
    (COMPARE + " --model {f}/none", "does not exist"),
    (COMPARE + " --hook nothing", "did you mean"),
    (COMPARE + " --model {f}/cut_lm --device banana", "device 'banana'"),
    (COMPARE + " --out {f}/file/below", "Not a directory"),
    (COMPARE + " --out {f}/other_run", "holds a run with other settings (collect:"),
    (COMPARE + " --out {f}/damaged_run", "stage mark cannot be read"),
    (COMPARE.replace("compare", "quickstart") + " --concepts love", "got 'love'"),
    (COMPARE.replace("compare", "quickstart") + " --out {f}/other_run", "or pass --overwrite"),
    # report
    ("report {f}/none --out {new}", "does not exist"),
    ("report {f}/file --out {new}", "does not exist"),
    ("report {f}/empty --out {new}", "holds no results.json of a suite"),
    ("report {f}/foreign_results --out {new}", "is not a results file of format 1"),
    ("report {f}/cut_results --out {new}", "cannot be read"),
    ("report {f}/bare_results --out {new}", "is damaged"),
    ("report {f}/odd_metrics --out {new}", "is damaged"),
    # store info
    ("store info {f}/none", "no activation store at"),
    ("store info {f}/file", "no activation store at"),
    ("store info {f}/photos", "no activation store at"),
    ("store info {f}/foreign_store", "is not the manifest of an activation store"),
    ("store info {f}/cut_store", "is damaged"),
    ("store info {f} --png {new}/norms.png", "--png draws one store"),
]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(line, words, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in told(run(line.format(f=files.text, new=tmp_path / "new")))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("store", "doctor"))])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("none.yaml", "does not exist"),
        ("file/below.yaml", "is not readable YAML"),
        ("broken.yaml", "is not readable YAML"),
        ("bytes.yaml", "is not readable YAML"),
        ("list.yaml", "must hold 'option: value' lines, got list"),
        ("unknown.yaml", "sets colour"),
    ],
)
def test_a_config_file_that_cannot_be_used(command, file, words, files):
    assert words in told(run(f"{command} --config {files.root / file}"))


def test_a_config_file_with_a_wrong_value(files):
    assert "Invalid value for '--seed'" in told(run(f"collect --config {files.root / 'words.yaml'}"))


def test_nothing_is_written_by_a_run_that_was_refused(files, tmp_path):
    told(run(COMPARE.format(f=files.text, new=tmp_path / "new") + " --tasks poetry"))
    assert not (tmp_path / "new").exists()


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*_args, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(glp_lens.pipeline, "compare", broken)
    result = run("compare")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory: memory could not be had"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            "memory: 20.00 GiB could not be had",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 96000000000 bytes."),
            "96.0 GB could",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    ],
)
def test_out_of_memory_says_how_much_was_wanted_and_what_lowers_it(error, words, monkeypatch):
    def broken(*_args, **_options):
        raise error

    monkeypatch.setattr(glp_lens.pipeline, "compare", broken)
    monkeypatch.setattr(glp_lens.pipeline, "train", broken)
    line = told(run("compare"))
    assert words in line
    assert "lower " in line
    assert "--glp-width" in line
    line = told(run("train sae"))
    assert words in line
    assert "--latents" in line
    assert "--width" not in line


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    def full(*_args, **_options):
        raise error

    monkeypatch.setattr(glp_lens.pipeline, "compare", full)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        error = OSError(code, "no room (3 MB wanted, 1 MB free)", "runs/results.json")
        line = told(run("compare"))
        assert "runs/results.json: no room (3 MB wanted, 1 MB free); what is saved is safe" in line
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "what is saved is safe: free space" in told(run("compare"))
    error = OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300)
    assert "choose another folder" in told(run("compare"))
    error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert run("compare").exit_code == 1


def test_a_config_file_that_is_nested_or_expands_is_one_line(tmp_path):
    file = tmp_path / "a.yaml"
    for text, words in {
        "tasks: " + "[" * 5000: "nested over 100 levels deep",
        "tasks: [[a, b], c]": "got a list of lists",
        f"a: &a {'x' * 90_000}\ntasks: [{', '.join(['*a'] * 1000)}]": "by its aliases",
    }.items():
        file.write_text(text)
        assert words in told(run(f"compare --config {file}"))


def test_what_a_kind_does_without_is_told(files, tmp_path):
    line = f"train gaussian --store {files.text}/store --out {tmp_path}/gaussian --device cpu:0"
    assert "--device is not used for a gaussian: it is fitted on the CPU" in run(line).stdout


def test_an_interrupted_run_says_how_to_go_on(monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(glp_lens.pipeline, "compare", interrupted)
    result = run("compare")
    assert result.exit_code == 130
    assert "run the same command again to go on" in result.stderr


# -- what works ------------------------------------------------------------------------------------------------


def parts(command: str):
    """The parsed command, for example that of `store info`."""
    found = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_says_what_it_does(command):
    parameters = parts(command).params
    result = run(f"{command} --help{'-all' if any(each.name == 'help_all' for each in parameters) else ''}")
    assert result.exit_code == 0
    for parameter in parameters:
        if parameter.name not in ("help", "help_all"):  # that is told where something is left out
            assert parameter.help, parameter.name
            names = (*parameter.opts, parameter.metavar or parameter.name.upper())
            assert any(name in result.stdout for name in names), parameter.name


@pytest.mark.parametrize("line", ["", "--help", "-h", "store", "store --help"])
def test_the_groups_show_their_commands(line):
    result = run(line)
    commands = (
        ["info", "verify", "repair", "merge", "import", "export"]
        if line.startswith("store")
        else [c.split()[0] for c in COMMANDS]
    )
    assert all(name in result.output for name in commands)
    assert "Error" not in result.output


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Runs `compare` and gives back what the library was asked for."""
    seen = SimpleNamespace()

    def fake(settings, command):
        seen.config = settings

    monkeypatch.setattr(glp_lens.pipeline, "compare", fake)

    def ask(options: str = "", **written):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
        result = run(f"compare --config {tmp_path / 'run.yaml'} {options}")
        assert result.exit_code == 0, result.output
        return seen

    return ask


def test_a_config_file_gives_values_and_the_command_line_wins(settings):
    asked = settings("--seed 9 --strengths 0.1", seed=4, tokens=777, strengths=[0.2, 0.4], overwrite=True)
    assert (asked.config.seed, asked.config.tokens, asked.config.strengths) == (9, 777, (0.1,))
    assert asked.config.overwrite
    assert asked.config.rows == glp_lens.pipeline.CompareJob().rows


def test_a_config_file_may_write_dashes_and_lists(settings):
    asked = settings(**{"glp-width": 64, "tasks": ["162_agnews_1", "8*"], "strengths": "0.2, 0.4", "out": "there"})
    assert asked.config.glp_width == 64
    assert asked.config.tasks == ("162_agnews_1", "8*")
    assert asked.config.strengths == (0.2, 0.4)
    assert str(asked.config.out) == "there"


def test_lists_are_separated_by_commas_or_repeated_options(settings):
    asked = settings("--tasks '162_agnews_1, 8*,' --strengths 0.25 --strengths 1 --texts a.txt,b")
    assert asked.config.tasks == ("162_agnews_1", "8*")
    assert asked.config.strengths == (0.25, 1.0)
    assert asked.config.texts == ("a.txt", "b")


def test_fast_is_off_unless_asked_for(settings):
    assert not settings().config.fast
    assert settings("--fast").config.fast
    assert settings(fast=True).config.fast


def test_the_defaults_of_the_command_are_those_of_the_library(settings):
    assert settings().config == glp_lens.pipeline.CompareJob()


def test_a_sweep_may_stand_in_the_config_file(settings):
    asked = settings(sigmas=[0.1, 0.5], ks=[2, "dense"])
    assert (asked.config.sigmas, asked.config.ks) == ((0.1, 0.5), (2, "dense"))
    assert settings(ks="none").config.ks == ()


def test_a_config_file_names_options_as_the_command_line_does(files, tmp_path):
    (tmp_path / "t.yaml").write_text("components: 3\nkind: pca\n")
    assert run(f"train --config {tmp_path}/t.yaml --store {files.text}/store --out {tmp_path}/pca").exit_code == 0
    assert gl.load(tmp_path / "pca").n_features == 3
    (tmp_path / "bad.yaml").write_text("component: 3\n")
    assert "components, condition" in told(run(f"train pca --config {tmp_path}/bad.yaml"))


def test_what_a_config_file_leaves_empty_is_the_default(settings):
    asked = settings(tasks=None, texts=None, strengths=None, hook=None)
    assert asked.config == glp_lens.pipeline.CompareJob()


def test_the_version_is_told():
    assert run("--version").stdout.strip() == f"glp-lens {metadata.version('glp-lens')}"


def test_an_argument_may_stand_in_the_config_file(files, tmp_path):
    (tmp_path / "train.yaml").write_text(f"kind: gaussian\nstore: {files.text}/store\nout: {tmp_path}/model\n")
    assert run(f"train --config {tmp_path / 'train.yaml'}").exit_code == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["kind"] == "gaussian"
    (tmp_path / "report.yaml").write_text(f"folders: [{files.text}/none]\n")
    assert "none does not exist" in told(run(f"report --config {tmp_path / 'report.yaml'}"))


def test_a_model_is_replaced_only_on_request(files, tmp_path):
    line = f"train pca --store {files.text}/store --out {tmp_path}/pca --components "
    assert run(line + "3").exit_code == 0
    assert "--overwrite" in told(run(line + "5"))
    assert run(line + "5 --overwrite").exit_code == 0
    assert PCA.from_pretrained(tmp_path / "pca").n_features == 5


def test_store_info_for_people_and_for_programs(files):
    assert "300" in run(f"store info {files.text}/store").stdout
    about = json.loads(run(f"store info {files.text}/store --json").stdout)
    assert (about["rows"], about["d_in"], about["hook"]) == (300, 24, HOOK)


def test_store_verify_prints_one_line(files):
    assert re.fullmatch(
        r"ok: 300 rows in 1 shard, [\d,]+ bytes: .*store\n", run(f"store verify {files.text}/store").stdout
    )


def test_a_warning_is_one_line_and_one_for_programmers_keeps_its_place():
    place = ("file.py", 3)
    usual = warnings.formatwarning
    with warnings_told():
        assert warnings.formatwarning(UserWarning("read\n 2 files"), UserWarning, *place) == "warning: read 2 files\n"
        assert warnings.formatwarning("read 2  files", UserWarning, *place) == ""  # told already
        assert warnings.formatwarning("read 3 files", UserWarning, *place) != ""
        assert warnings.formatwarning("old", FutureWarning, *place).startswith("file.py:3: FutureWarning: old")
    assert warnings.formatwarning is usual
