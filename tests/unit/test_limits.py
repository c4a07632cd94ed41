"""Bounds: what files declare is compared with what they hold before it is built; shortages end in one line."""

import errno
import json
import os
import re
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from glp_lens import directions, files, lm, models
from glp_lens.corpus import from_files, from_hub
from glp_lens.directions import Direction
from glp_lens.errors import InputError, memory_wanted, pass_shortage
from glp_lens.limits import NESTING, UNCHECKED
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.glp import GLP
from glp_lens.yaml_files import read_yaml

MB = 2**20


@pytest.fixture(scope="module")
def glp(tmp_path_factory):
    denoiser = Denoiser(DenoiserConfig(d_input=6, d_model=10, d_mlp=14, n_layers=2))
    return GLP(denoiser, torch.zeros(6), torch.ones(6))


@pytest.mark.parametrize("more", [{}, {"multi_layer_n_layers": 5}, {"d_condition": 3}])
def test_the_number_of_parameters_of_a_shape_is_known_before_it_is_built(more):
    shape = DenoiserConfig(d_input=6, d_model=10, d_mlp=14, n_layers=2, **more)
    assert shape.n_parameters == sum(p.numel() for p in Denoiser(shape).parameters())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n_layers", 10**9, "GLP_LENS_MAX_LAYERS"),
        ("d_model", 10**9, "GLP_LENS_MAX_PARAMETERS"),
        ("d_mlp", 10**40, "GLP_LENS_MAX_PARAMETERS"),
        ("d_model", 11, "do not fit the config"),
        ("n_layers", True, "must be a positive integer"),
    ],
)
@pytest.mark.parametrize("form", ["own", "released"])
def test_a_prior_whose_config_declares_an_absurd_size_is_refused(name, value, words, form, glp, tmp_path):
    if form == "own":
        config = glp.save_pretrained(tmp_path) / "config.json"
        about = json.loads(config.read_text())
        del about[files.ENTRY]
        about["model"]["denoiser"][name] = value
        config.write_text(json.dumps(about))
    else:
        config = glp.save_released(tmp_path) / "config.yaml"
        before = glp.denoiser.config.to_json()[name]
        text = re.sub(r" *digest: xxh3.*\n", "", config.read_text())
        config.write_text(text.replace(f" {name}: {before}\n", f" {name}: {str(value).lower()}\n"))
    with pytest.raises(InputError, match=words):
        models.load(tmp_path)


def test_a_bound_is_raised_by_its_environment_variable(monkeypatch):
    shape = {"d_input": 2, "d_model": 2, "d_mlp": 2}
    with pytest.raises(InputError, match="GLP_LENS_MAX_LAYERS"):
        DenoiserConfig(**shape, n_layers=1001)
    monkeypatch.setenv("GLP_LENS_MAX_LAYERS", "1001")
    assert DenoiserConfig(**shape, n_layers=1001).n_layers == 1001
    monkeypatch.setenv("GLP_LENS_MAX_LAYERS", "many")
    with pytest.raises(InputError, match="must be a whole number from 1, got 'many'"):
        DenoiserConfig(**shape, n_layers=1)


@pytest.mark.parametrize("form", ["own", "sae-lens"])
def test_an_autoencoder_whose_config_declares_an_absurd_size_is_refused(form, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = sae_lens.SAE.from_dict({"architecture": "standard", "d_in": 5, "d_sae": 7, "dtype": "float32"})
    if form == "own":
        from glp_lens.models.sae import SAE

        SAE(sae).save_pretrained(tmp_path)
    else:
        sae.save_model(tmp_path)
    config = tmp_path / ("config.json" if form == "own" else "cfg.json")
    models.load(tmp_path)
    about = json.loads(config.read_text())
    about.pop(files.ENTRY, None)
    config.write_text(json.dumps(about).replace('"d_sae": 7', '"d_sae": 7000000000000'))
    with pytest.raises(InputError, match=r"declares d_in=5 and d_sae=7000000000000, and its weights are \d+ numbers"):
        models.load(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**12)])
def test_a_language_model_whose_config_declares_an_absurd_size_is_refused(name, value, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "lm")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, name: value}))
    with pytest.raises(InputError, match=f"declares {name}={value}, and its weights are"):
        lm.open_model(str(folder))


def nested(levels, mapping=False):
    return '{"a": ' * levels + "1" + "}" * levels if mapping else "[" * levels + "]" * levels


def test_json_is_bounded_in_depth(tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": {nested(NESTING - 2)}, "b": {nested(NESTING - 2, True)}}}')
    assert files.read_json(tmp_path / "a.json", "settings")["b"]["a"]
    for text in (nested(NESTING, True), nested(900, True), f'{{"a": {nested(NESTING)}}}', nested(100_000, True)):
        (tmp_path / "a.json").write_text(f'{{"a": {text}}}')
        with pytest.raises(InputError, match=r"nested over 100 levels|cannot be read"):
            files.read_json(tmp_path / "a.json", "settings")


PAIRS = list(zip("abcdefghi", "bcdefghij", strict=True))
BOMBS = {
    "lists": "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in PAIRS),
    "merges": "a: &a {k: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in PAIRS),
    "texts": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n",
    "of itself": "a: &a [*a]\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_yaml_aliases_expand_to_is_bounded(name, tmp_path):
    (tmp_path / "a.yaml").write_text(BOMBS[name])
    with pytest.raises(InputError, match="by its aliases"):
        read_yaml(tmp_path / "a.yaml", "config file")


def test_plain_aliases_of_yaml_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {k: 1}\nb: {<<: *a, m: 2}\nc: [*a, *a]\n")
    assert read_yaml(tmp_path / "a.yaml", "config file") == {"a": {"k": 1}, "b": {"k": 1, "m": 2}, "c": [{"k": 1}] * 2}
    (tmp_path / "a.yaml").write_text("")
    assert read_yaml(tmp_path / "a.yaml", "config file") is None


@pytest.mark.parametrize("text", ["[" * 5000, nested(200), "a: " * 3, "\0", "- " * 3000 + "x"])
def test_other_bad_yaml_is_one_line(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match="is not readable YAML") as caught:
        read_yaml(tmp_path / "a.yaml", "config file")
    assert "\n" not in str(caught.value)


def test_the_file_of_a_direction_is_not_believed_before_it_is_read(tmp_path):
    header = io_header((10**15,))
    (tmp_path / "a.npy").write_bytes(header + b"\0" * 64)
    torch.save(torch.zeros(1).expand(10**15), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/data/0", b"\0" * (UNCHECKED + 1))
    for name, words in {"a.npy": "damaged", "a.pt": "holds fewer", "b.pt": "over 100 times its size"}.items():
        with pytest.raises(InputError, match=words):
            directions.read(tmp_path / name, "blocks.1.hook_resid_post")
    save_file({"vector": torch.ones(3)}, tmp_path / "a.safetensors", {"glp_lens_direction": nested(100_000, True)})
    with pytest.raises(InputError, match="direction is damaged"):
        Direction.load(tmp_path / "a.safetensors")


def io_header(shape):
    import io

    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_statistics_of_a_released_prior_are_not_believed_before_they_are_read(glp, tmp_path):
    config = glp.save_released(tmp_path) / "config.yaml"
    config.write_text(re.sub(r" *(digest|key): .*\n", "", config.read_text()))  # as the released code writes it
    torch.save({"mean": torch.zeros(1).expand(10**15), "var": torch.ones(6)}, tmp_path / "rep_statistics.pt")
    with pytest.raises(InputError, match="declares more numbers than it holds"):
        models.load(tmp_path)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_table_of_very_many_times_its_size_is_refused(kind, tmp_path, monkeypatch):
    if kind == "gz":
        import gzip

        pack = gzip.compress
    else:
        pack = pytest.importorskip("zstandard").compress
    monkeypatch.setattr("glp_lens.limits.UNCHECKED", MB)
    row = b'{"text": "' + b"so " * 30_000 + b'"}\n'
    (tmp_path / f"a.jsonl.{kind}").write_bytes(pack(row * 400))
    with pytest.raises(InputError, match="unpacks to over 100 times its size: if it is meant, set GLP_LENS_MAX"):
        list(from_hub(str(tmp_path)))
    monkeypatch.setenv("GLP_LENS_MAX_EXPANSION", "100000")
    assert len(list(from_hub(str(tmp_path)))) == 400


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_file_of_very_many_times_its_size_is_refused(dictionary, tmp_path, monkeypatch):
    monkeypatch.setattr("glp_lens.limits.UNCHECKED", MB)
    table = pa.table({"text": ["so " * 300] * 40_000})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=dictionary)
    with pytest.raises(InputError, match="unpacks to over 100 times its size"):
        list(from_files(tmp_path / "a.parquet"))
    monkeypatch.setenv("GLP_LENS_MAX_EXPANSION", "1000000")
    assert len(list(from_files(tmp_path / "a.parquet", piece=None))) == 40_000


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (lambda: torch.empty(2**55, dtype=torch.uint8), "36028.8 TB"),
        (lambda: torch.empty(2**62, 2**62), "memory"),
        (lambda: np.empty(2**54, dtype=np.uint8), "16.0 PiB"),
        (lambda: pa.allocate_buffer(2**60), "1152921.5 TB"),
        (lambda: bytearray(2**62), "memory"),
    ],
)
def test_how_much_memory_was_wanted_is_read_from_the_error(error, wanted):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        error()
    assert memory_wanted(caught.value) == wanted


def test_other_errors_are_no_shortage():
    gpu = RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB")
    assert memory_wanted(gpu) == "20.00 GiB"
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        OSError(2, "x"),
    ):
        assert memory_wanted(error) is None
        pass_shortage(error)
    for error in (MemoryError(), OSError(errno.ENOSPC, "No space left on device"), gpu):
        with pytest.raises(type(error)):
            pass_shortage(error)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_keeps_the_old_file_and_says_how_much_was_wanted(code, tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "a.json", "old")

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\(12\.0 kB wanted, .*B free\)") as caught:
        files.write_atomic(tmp_path / "a.json", "x" * 12_000)
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"cannot write .*12\.0 kB wanted, .*B free"):
        files.write_tensors(
            tmp_path / "a.safetensors", {"a": torch.zeros(3000)}, files.Kind("weights", "save them again")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
