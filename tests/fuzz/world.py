"""Tiny inputs that every round starts from, the long commands that are run on them, and what two runs must share."""

import hashlib
import importlib
import io
import json
import pkgutil
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glp_lens_cli
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import glp_lens
from glp_lens.evals.cache import Records
from glp_lens.pipeline.stages import MARK
from tests.conftest import save_tiny_model, tiny_texts
from tests.fuzz import children
from tests.integration.toy_steering import steer_in_the_toy_language
from tests.unit.feature_folder import write_features

SIZES = """model: lm
texts: texts.csv
tasks: mine.csv
tokens: 1500
heldout-tokens: 200
context: 24
rows: 640
glp-width: 12
glp-mlp: 20
glp-layers: 2
glp-batch: 64
sae-latents: 40
sae-k: 5
sae-batch: 64
probe-train: 60
probe-test: 30
ks: 3
sigmas: 0.5
strengths: 0.5,1
prompts: 4
new-tokens: 5
documents: 5
out: out
"""
"""The smallest `compare`."""

FIT = "--store acts --out out"
SHAPE = "--rows 640 --batch-size 64 --width 12 --mlp 20 --layers 2"
COLLECT = "--model lm --texts texts.csv --context 24"
MODELS = "models/glp,models/sae,models/pca,models/gaussian"
LONG = {
    "collect": f"collect {COLLECT} --tokens 1500 --out out",
    "collect two": f"collect {COLLECT} --tokens 700 --hook blocks.0.hook_resid_post,blocks.2.hook_mlp_out --out out",
    "collect part": f"collect {COLLECT} --documents 90 --shard 1/2 --out out",
    "train glp": f"train glp {FIT} {SHAPE} --validation heldout --checkpoints 3",
    "finetune glp": f"train glp {FIT} --finetune models/glp --rows 640 --batch-size 64 --ema 0.9",
    "train sae": f"train sae {FIT} --rows 640 --batch-size 64 --latents 40 --k 5",
    "train pca": f"train pca {FIT} --components 20",
    "train gaussian": f"train gaussian {FIT}",
    "train raw": f"train raw {FIT}",
    "train random": f"train random {FIT} --features 40",
    "probe": f"probe --model lm --models {MODELS} --tasks mine.csv --probe-train 60 --probe-test 30 --context 24 "
    "--ks 3 --sigmas 0.5 --cache out/cache --out out",
    "steer": f"steer --model lm --models {MODELS} --store acts --strengths 0.5,1 --prompts 4 --new-tokens 5 --out out",
    "fidelity": f"fidelity --model lm --models {MODELS} --store acts --texts texts.csv --documents 5 --context 24 "
    "--out out",
    "density": f"density --models {MODELS} --store heldout --train-store acts --out out",
    "detect": f"detect --model lm --models {MODELS} --store acts --texts texts.csv --tasks code --context 12 "
    "--detect-texts 9 --detect-fit 9 --out out",
    "generation": "generation --models models/glp,models/gaussian --store acts --heldout heldout --samples 150 "
    "--sampling 2 --out out",
    "score": f"score --model lm --models {MODELS} --texts texts.csv --documents 20 --store acts --context 24 --out out",
    "sample": "sample models/glp --n 40 --out out/rows.npy",
    "direction": "direction --model lm --positive-texts for.txt --negative-texts against.txt --out out/way.safetensors",
    "generate": "generate --model lm --direction direction.safetensors --store acts --prompts-file prompts.txt "
    "--prior models/gaussian --strength 1 --new-tokens 5 --allow-mismatch --out out/texts.csv",
    "features build": f"features build --model lm --models {MODELS} --texts texts.csv --context 24 --tokens 1500 "
    "--sample 200 --neurons --random --out out",
    "compare": "compare --config compare.yaml",
    "quickstart": "quickstart --config compare.yaml",
    "scale": "scale --store acts --heldout heldout --widths 12 --layers 2 --rows 320,640 --glp-batch 64 "
    "--pca-ranks 5 --suites density --out out",
    "features score": "features score --folder built --model lm --texts texts.csv --context 24 --passage 6 --out out",
    "features steer": "features steer 1:3 sae/7 --folder built --model lm --new-tokens 5",
    "features page": "features page --folder built --out out/page.html",
    "features export": "features export --folder built --to saedashboard --out out",
    "card": "card models/pca --results results/density --out out/card.md",
    "report": "report results --out out",
    "store merge": "store merge parts",
    "store import": "store import rows.npy out --from arrays --hook blocks.1.hook_resid_post",
    "store export arrays": "store export acts out/rows.safetensors --to arrays",
    "store export memmaps": "store export acts out --to memmaps",
    "store export sae-lens": "store export acts out --to sae-lens --context 16",
    "store repair": "store repair flipped --refetch",
}
"""Every command that takes long on real sizes, at tiny ones. They write to `out`, or change the store."""


BUDGETS = LONG["scale"].replace("320,640", "128,192,320,640") + " --keep-models"
"""A run of `scale` with enough budgets for a fit."""
CACHE = "cache"
"""Where the commands keep what they remember of language models."""
TIMES = ("seconds", "digest")
"""Names of values that differ from run to run: wall-clock times, and digests over them."""
TIMED = ("flops_per_second", "loss_expected")
"""Metrics that depend on how fast the machine is."""
_DIGESTS: dict[tuple[Path, int, int], str] = {}
_HASH = re.compile(r"-[0-9a-f]{16}(?=\.jsonl?$|\"|$)")
"""In the names of cached results: of all that they depend on, for a model that was trained in the run its time too."""


@dataclass(frozen=True)
class World:
    """A folder with tiny inputs of every kind, made by the commands themselves."""

    folder: Path

    def copy(self, case: Path) -> Path:
        """The inputs for one round, which may do with them what it wants."""
        return Path(shutil.copytree(self.folder, case))


@contextmanager
def prepared(root: Path, *, full: bool = True) -> Iterator[World]:
    """Make the world below `root`, and work in it with tiny models and judges.

    A world that is there from an earlier run is used as it is; one that is not full lacks what takes long
    to make: most results, and a whole comparison. The language model `lm` stays in memory, and an unfinished training
    is saved at every chance, not every 30 s.
    """
    from glp_lens import lm
    from glp_lens.training.config import RunOptions

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)  # as in the children: sums depend on it in the last bit
        patch.setenv("GLP_LENS_CACHE", str(root / "world" / CACHE))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setitem(RunOptions.__init__.__kwdefaults__, "save_seconds", 0)
        steer_in_the_toy_language(patch)
        usual, kept = lm.open_model, {}

        def open_model(name: str, **options: Any) -> Any:
            if name != "lm":
                return usual(name, **options)
            key = tuple(sorted(options.items()))
            if key not in kept:
                kept[key] = usual(name, **options)
            return kept[key]

        patch.setattr(lm, "open_model", open_model)
        _import_everything()
        world = World(root / "world")
        if not (done := root / "done").exists():
            world.folder.mkdir(parents=True)
            patch.chdir(world.folder)
            _fill(world.folder, full=full)
            done.touch()
        patch.chdir(world.folder)
        for dtype in ("bfloat16", "float32"):
            lm.open_model("lm", device="cpu", dtype=dtype, backend="bridge")
        patch.chdir(root)
        try:
            yield world
        finally:
            torch.set_num_threads(threads)


def _import_everything() -> None:
    """All that children need, which take it over."""
    for package in (glp_lens, glp_lens_cli):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in (
        "transformer_lens",
        "sae_lens",
        "sklearn.decomposition",
        "datasets",
        "matplotlib.pyplot",
        "scipy.stats",
    ):
        importlib.import_module(name)


def _fill(folder: Path, *, full: bool) -> None:
    """Everything that commands read, made by the commands; run in the folder."""

    from glp_lens.activations import ActivationStore
    from glp_lens.models.glp import GLP

    save_tiny_model(folder / "lm")
    texts = tiny_texts(700)
    Path("texts.csv").write_text("text\n" + "\n".join(texts))
    labelled = [f"{text},{'game' if i % 2 else 'war'}" for i, text in enumerate(tiny_texts(120, seed=3))]
    Path("mine.csv").write_text("text,label\n" + "\n".join(labelled))
    for name, word, side in (("for", "goal", texts[:24]), ("against", "bank", texts[24:48])):
        Path(f"{name}.txt").write_text("\n".join(f"{text} {word}" for text in side))
    Path("prompts.txt").write_text("the cat of\nit is\n")
    Path("compare.yaml").write_text(SIZES)
    Path("train.yaml").write_text("rows: 640\nbatch-size: 64\nwidth: 12\nmlp: 20\nlayers: 2\nstore: acts\nout: out\n")
    pd.DataFrame({"text": tiny_texts(30, seed=4)}).to_parquet("texts.parquet")
    pd.DataFrame({"text": tiny_texts(30, seed=5)}).to_json("texts.jsonl", orient="records", lines=True)
    shutil.copytree("lm", "other")
    command(f"collect {COLLECT} --tokens 1500 --out acts")
    command(f"collect {COLLECT} --tokens 450 --split heldout --out heldout")
    for i in range(2):
        command(f"collect {COLLECT} --documents 90 --shard {i}/2 --out parts")
    for kind, options in (
        ("glp", f"{SHAPE} --validation heldout --checkpoints 2"),
        ("sae", "--rows 640 --batch-size 64 --latents 40 --k 5"), ("pca", "--components 20"), ("gaussian", ""),
        ("raw", ""), ("random", "--features 40"),
    ):  # fmt: skip
        command(f"train {kind} --store acts {options}")
    GLP.from_pretrained("models/glp").save_released("released")
    command(into(".", LONG["direction"]).replace("way", "direction"))
    write_features(Path("features"))
    np.save("rows.npy", ActivationStore.open("acts").rows().numpy())
    shutil.copytree("acts", "flipped")
    flip(next(Path("flipped").glob("*.h5")), -9, 0)
    # An unfinished training: its process is killed when the state is written for the sixth time.
    children.run(into("stopped", LONG["train glp"]), folder, act=children.kill_after_renaming("training.state", 6))
    for suite in ("probe", "density", *(("steer", "fidelity", "detect") if full else ())):
        command(into(f"results/{suite}", LONG[suite]))
    if full:
        command(f"{LONG['compare']} --out run")
        command(into("built", LONG["features build"]))
        command(into("scaled", BUDGETS))


def into(folder: str, line: str) -> str:
    """A line of `LONG` that writes to another folder than `out`."""
    return re.sub(r"(?<= )out(?=[/ ]|$)", folder, line)


def command(line: str) -> str:
    """Run a command in this process; it must succeed."""
    from glp_lens_cli import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["glp-lens", *shlex.split(line)])  # results name the command
        result = CliRunner().invoke(app, shlex.split(line))
    if result.exit_code:
        raise RuntimeError(f"glp-lens {line}: {result.stderr}") from result.exception
    return result.stdout


def flip(path: Path, byte: int, bit: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, str]:
    """A digest of each file below a folder of what two runs of the same command must share: all but times.

    Of safetensors files the tensors, of tables the values; the digest that a file carries of itself is left out too,
    and so is what is remembered of language models, under hashes of where they lie.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != CACHE:
            found.setdefault(without_hashes(name.as_posix()), []).append(_digest(path, name))
    return {
        f"{name} ({i})" if i > 1 else name: digest
        for name, digests in found.items()
        for i, digest in enumerate(sorted(digests), 1)
    }


def _digest(path: Path, name: Path) -> str:
    """Of what lasts of a file, computed once for all its copies, which keep its time."""
    known = (name, (stat := path.stat()).st_size, stat.st_mtime_ns)
    if known not in _DIGESTS:
        _DIGESTS[known] = hashlib.sha256(_lasting(path)).hexdigest()[:16]
    return _DIGESTS[known]


def without_hashes(name: str) -> str:
    """The name of a file without the hashes in it, which depend on where models lie."""
    return _HASH.sub("", name)


def _lasting(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        match path.suffix:
            case ".json":
                value = _without_times(json.loads(data))
                if path.name == MARK:  # times of what was read
                    value.pop("files", None)
                return json.dumps(value, sort_keys=True).encode()
            case ".csv":
                data = b"\n".join(line for line in data.split(b"\n") if not any(t.encode() in line for t in TIMED))
            case ".jsonl" if data.startswith(b'{"glp_lens"'):
                return json.dumps(Records(path).values, sort_keys=True).encode()  # damaged lines stay, unread
            case ".safetensors":
                tensors = safetensors.torch.load(data)
                parts = (f"{name} {x.dtype} {x.shape}".encode() + x.view(-1).view(torch.uint8).numpy().tobytes()
                         for name, x in sorted(tensors.items()))  # fmt: skip
                return b"\0".join(parts)
            case ".parquet":
                frame = pd.read_parquet(io.BytesIO(data))
                return frame.drop(columns=[name for name in frame if name in TIMES]).to_csv().encode()
            case ".html":
                return re.sub(rb"Wall-clock[^<]*|\b\d+(\.\d+)? (s|min)\b|\b(seconds|digest)\W+[^,\n]*", b"", data)
    except Exception:  # a damaged file is told by its bytes
        pass
    return data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        timed = [isinstance(item, dict) and item.get("metric") in TIMED for item in value]
        return [_without_times(item) for item, left_out in zip(value, timed, strict=True) if not left_out]
    if isinstance(value, str):
        return "" if value.startswith("Wall-clock") else _HASH.sub("", value)
    return value
