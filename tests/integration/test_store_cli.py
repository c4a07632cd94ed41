"""`glp-lens store`: the screen, and every command on small stores."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

from glp_lens import pipeline
from glp_lens.activations import ActivationStore, collect, write_store
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.files import write_json
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
N, D = 310, 12
SOURCE = {
    "model": {"name": "org/tiny", "class": "TransformerBridge", "dtype": "float32", "weight_processing": "raw"},
    "settings": {"hooks": [HOOK], "context": 24, "keep": "last", "chat": True},
    "corpus": {"name": "my texts (train)", "seed": 3},
}


def run(line, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, shlex.split(f"store {line}"))


def said(line, columns=80) -> str:
    result = run(line, columns)
    assert result.exit_code == 0, (result.exception, result.stderr)
    return result.stdout


def told(line) -> str:
    """The one line of a mistake."""
    result = run(line)
    lines = [t for t in re.split(r"[\r\n]+", result.stderr) if t.strip() and not re.search(r"\d+%\|", t)]
    assert result.exit_code == 2, (result.exception, result.output)
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


def change(folder, **fields):
    write_json(folder / MANIFEST, replace(Manifest.read(folder), **fields).to_json())


def damage(store, number):
    path = store.path / store.manifest.shards[number].name
    data = bytearray(path.read_bytes())
    data[-5] ^= 2
    path.write_bytes(data)


@pytest.fixture
def x():
    x = 30 * torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    x[:, 4] = 0.0
    x[:, 7] += 9000.0
    return x


@pytest.fixture
def store(tmp_path, x):
    """A store with something to tell in every group."""
    columns = {"doc_id": np.arange(N) // 10, "mood": np.arange(N)}
    store = write_store(
        tmp_path / "s", x, hook=HOOK, columns=columns, labels={"mood": "int64"}, source=SOURCE, max_norm=1e5,
        shard_rows=100,
    )  # fmt: skip
    first, *rest = store.manifest.shards
    first = replace(first, excluded={"bos": 31, "position_0": 0, "padding": 999, "massive": 4})
    change(store.path, shards=(first, *rest), examples=["A cat [bold]sat[/bold]\non it " + "x" * 200, "Two"])
    return ActivationStore.open(store.path)


def groups(screen) -> dict[str, str]:
    """The text of each group of the screen, spaces evened out."""
    found = {}
    for line in screen.splitlines()[2:]:
        if line[:1].strip():
            name = re.match(r"[A-Z][a-z]+( out)?", line)[0]
            found[name] = ""
        if line.strip():
            found[name] += " ".join(line.removeprefix(name).split()) + "\n"
    return found


@pytest.mark.parametrize("columns", [80, 120])
def test_every_group_of_the_screen(store, x, columns):
    screen = said(f"info {store.path}", columns)
    assert len(screen.splitlines()) <= 40
    assert max(len(line.rstrip()) for line in screen.splitlines()[1:]) <= columns
    found = groups(screen)
    assert list(found) == ["Model", "Rows", "Norms", "Dimensions", "Left out", "Corpus", "Tokens"]
    assert "name org/tiny\n" in found["Model"]
    assert "TransformerBridge, float32, raw weights" in found["Model"]
    assert f"hook point {HOOK}" in found["Model"]
    assert "310 of width 12, float32" in found["Rows"]
    total = sum(file.stat().st_size for file in store.path.glob("*.h5"))
    assert f"{total / 1024:.1f} KiB in 4 shards" in found["Rows"]
    assert "24 tokens at most, the last token of each text, chat template" in " ".join(found["Rows"].split())
    assert "mood (int64)" in found["Rows"]
    norms = np.linalg.norm(x.double().numpy(), axis=1)
    values = [norms.mean(), *np.quantile(norms, [0.01, 0.25, 0.5, 0.75, 0.99, 1])]
    assert found["Norms"] == "mean 1% 25% median 75% 99% max\n" + " ".join(f"{v:,.4g}" for v in values) + "\n"
    assert found["Dimensions"] == "dead 1 of 12: 4\nmassive 1 of 12: 7\n"
    assert found["Left out"] == "31 8.99% bos\n4 1.16% massive (norm over 1e+05)\n"
    assert found["Corpus"] == "name my texts (train)\ndocuments 31\nseed 3\n"
    first, second = found["Tokens"].splitlines()
    assert first.startswith("A cat [bold]sat[/bold] on it xxx")
    assert first.endswith("…")
    assert second == "Two"


def test_json_holds_the_same(store, x):
    about = json.loads(said(f"info {store.path} --json"))
    assert (about["rows"], about["d_in"], about["hook"], about["dtype"]) == (N, D, HOOK, "float32")
    assert (about["dead_dims"], about["massive_dims"]) == ([4], [7])
    assert about["excluded"] == {"bos": 31, "position_0": 0, "padding": 999, "massive": 4}
    assert about["mean_norm"] == pytest.approx(x.double().norm(dim=1).mean().item(), rel=1e-6)
    assert (about["corpus"]["name"], about["corpus"]["documents"]) == ("my texts (train)", 31)
    assert about["examples"][1] == "Two"


def test_png(store, tmp_path):
    screen = said(f"info {store.path} --png {tmp_path}/new/norms.png")
    assert "norms.png" in screen
    data = (tmp_path / "new" / "norms.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 8000
    json.loads(said(f"info {store.path} --json --png {tmp_path}/norms.png"))


def test_long_lists_are_cut_with_a_count(tmp_path, x):
    x[:, 1:10] = 0
    write_store(tmp_path / "s", x, hook="h")
    assert "dead 9 of 12: 1, 2, 3, 4, 5, 6 and 3 more\n" in groups(said(f"info {tmp_path}/s"))["Dimensions"]


def test_an_import_without_tokens_leaves_the_group_out(tmp_path, x):
    write_store(tmp_path / "s", x, hook="h", source={"imported": {"format": "arrays", "from": "rows.npy"}})
    found = groups(said(f"info {tmp_path}/s"))
    assert not {"Tokens", "Left out"} & set(found)
    assert "not known" in found["Model"]
    assert "rows.npy (arrays)" in found["Corpus"]


def test_an_interrupted_part_and_a_stream(store):
    change(store.path, complete=False, part=(1, 4), dropped=(7,))
    screen = said(f"info {store.path}", 160)
    assert "part 1/4, interrupted, 1 dropped" in screen
    assert "run the same collect again" in groups(screen)["Rows"]
    assert "Norms" in groups(screen)
    change(store.path, part=None, window=5)
    (store.path / store.manifest.shards[0].name).unlink()
    screen = said(f"info {store.path}", 160)
    assert "stream of 5 shards" in screen
    assert "Norms" not in groups(screen)


def test_several_stores_are_a_table(tmp_path, x):
    for name in ("blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"):
        write_store(tmp_path / "out" / name, x, hook=name)
    (tmp_path / "out" / "broken").mkdir()
    (tmp_path / "out" / "broken" / MANIFEST).write_text("{}")
    screen = said(f"info {tmp_path}/out")
    norm = f"{x.double().norm(dim=1).mean().item():,.4g}"
    assert re.search(rf"blocks\.2\.hook_mlp_out +310 +12 +[\d.]+ KiB +{norm} +complete", screen)
    assert re.search(r"broken +cannot be opened", screen)
    listed = json.loads(said(f"info {tmp_path}/out --json"))
    assert [about.get("rows") for about in listed] == [N, N, None]
    assert "3: name one" in told(f"info {tmp_path}/out --png {tmp_path}/n.png")


def test_repair_drops_what_is_damaged_and_says_how_to_go_on(store):
    assert said(f"repair {store.path}") == f"ok: as written, 4 shards: {store.path}\n"
    damage(store, 2)
    lines = said(f"repair {store.path}")
    assert f"dropped shard-00000002.h5, 100 of 310 rows: {store.path}\n" in lines
    assert "make the same collect() call again: it collects exactly the missing shards" in lines
    assert len(ActivationStore.open(store.path)) == 210
    assert "no recorded command" in told(f"repair {store.path} --refetch")


def test_verify_of_a_stream_compares_what_is_on_disk(store):
    change(store.path, window=2)
    for number in (0, 2):
        (store.path / store.manifest.shards[number].name).unlink()
    line = said(f"verify {store.path}")
    assert line == f"ok: shards of a stream that are on disk: 2 of 4 so far: {store.path}\n"
    damage(store, 1)
    assert "1 of 2 shards differ from what was written (shard-00000001.h5): collect" in told(f"verify {store.path}")
    change(store.path, window=0)
    assert said(f"verify {store.path}") == f"no rows to verify, only statistics were kept: {store.path}\n"


def test_verify_of_several_stores_names_every_damaged_one(tmp_path, x):
    for name, number in (("a", 1), ("b", None), ("c", 0)):
        one = write_store(tmp_path / "out" / name, x, hook=name, shard_rows=100)
        if number is not None:
            damage(one, number)
    result = run(f"verify {tmp_path}/out")
    assert re.fullmatch(rf"ok: 310 rows in 4 shards, [\d,]+ bytes: {tmp_path}/out/b\n", result.stdout)
    line = told(f"verify {tmp_path}/out")
    assert f"{tmp_path}/out/a is damaged: 1 of 4 shards" in line
    assert f"{tmp_path}/out/c is damaged: 1 of 4 shards" in line


def test_repair_of_one_sibling_says_that_the_rows_are_not_aligned(tmp_path, x):
    hooks = ["blocks.0.hook_resid_post", HOOK]
    for hook in hooks:
        source = {**SOURCE, "settings": {"hooks": hooks}}
        one = write_store(tmp_path / "out" / hook, x, hook=hook, source=source, shard_rows=100)
    damage(one, 1)
    lines = said(f"repair {one.path}")
    assert f"the rows of the stores in {tmp_path}/out are not aligned until the same collect has run again" in lines
    assert "can be used as it is" not in lines


def test_repair_of_what_was_not_collected(tmp_path, x):
    damage(write_store(tmp_path / "s", x, hook="h", shard_rows=100), 0)
    assert "import it again, into a new folder" in said(f"repair {tmp_path}/s")


def test_refetch_runs_the_recorded_collect_once(tmp_path, x, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "collect_again", lambda command, out: asked.append((command, out)) or [])
    hooks = ["blocks.0.hook_resid_post", HOOK]
    for hook in hooks:
        source = {**SOURCE, "settings": {"hooks": hooks}}
        one = write_store(tmp_path / "out" / hook, x, hook=hook, source=source, shard_rows=100)
        change(one.path, command={"seed": 3})
        damage(one, 1)
    said(f"repair {tmp_path}/out --refetch")
    assert asked == [({"seed": 3}, tmp_path / "out")]
    monkeypatch.undo()
    assert "repair" in said(f"repair {tmp_path}/out")
    change(tmp_path / "out" / HOOK, command=None, part=(0, 2))
    assert "collect --shard 0/2" in said(f"repair {tmp_path}/out/{HOOK}")


def test_merge_joins_parts(tmp_path, tiny_bridge):
    texts = tiny_texts(60)
    whole = collect(tiny_bridge, texts, HOOK, tmp_path / "whole", context=24, shard_tokens=240)
    for i in range(2):
        collect(tiny_bridge, texts, HOOK, tmp_path / "out", context=24, shard_tokens=240, part=(i, 2))
    assert "2 stores" in said(f"info {tmp_path}/out")
    line = said(f"merge {tmp_path}/out")
    assert line == f"{len(whole):,} rows of width 24 from {HOOK}: {tmp_path}/out\n"
    assert torch.equal(ActivationStore.open(tmp_path / "out").rows(), whole.rows())
    parts = " ".join(str(path.parent) for path in sorted((tmp_path / "out" / "parts").glob(f"*/{MANIFEST}")))
    said(f"merge --out {tmp_path}/again {parts}")
    assert torch.equal(ActivationStore.open(tmp_path / "again").rows(), whole.rows())


@pytest.mark.parametrize(
    ("form", "name", "options"),
    [("memmaps", "m", ""), ("sae-lens", "d", "--keep-first"), ("arrays", "a.npy", ""), ("arrays", "a.safetensors", "")],
)
def test_export_and_import_give_the_rows_back(tmp_path, store, form, name, options):
    context = "--context 31" if form == "sae-lens" else ""
    assert "310 rows as" in said(f"export {store.path} {tmp_path}/{name} --to {form} {context}")
    options = f"--from {form} --hook {HOOK} --model org/tiny {options}"
    line = said(f"import {tmp_path}/{name} {tmp_path}/back {options}")
    assert line == f"310 rows of width 12 from {HOOK}: {tmp_path}/back\n"
    back = ActivationStore.open(tmp_path / "back")
    assert torch.equal(back.rows(), store.rows())
    assert back.manifest.source["model"]["name"] == "org/tiny"


def test_out_may_be_an_option_everywhere(tmp_path, store):
    said(f"export {store.path} --to arrays --out {tmp_path}/a.npy")
    line = said(f"import {tmp_path}/a.npy --from arrays --hook {HOOK} -o {tmp_path}/back")
    assert torch.equal(ActivationStore.open(tmp_path / "back").rows(), store.rows())
    assert "the language model of these rows is not known" in line  # without --model


def test_several_arrays_and_rows_that_fill_no_sequence(tmp_path, store):
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.full((3, 5), i, dtype=np.float32))
    said(f"import {tmp_path}/0.npy {tmp_path}/1.npy {tmp_path}/both --from arrays --hook h")
    assert ActivationStore.open(tmp_path / "both").rows()[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert "256 rows as" in said(f"export {store.path} {tmp_path}/d --to sae-lens")


def test_all_layers_of_memmaps(tmp_path, store):
    for layer in (3, 12):
        said(f"export {store.path} {tmp_path}/maps/layer_{layer:02d} --to memmaps")
    said(f"import {tmp_path}/maps {tmp_path}/out --from memmaps --hook 'blocks.{{layer}}.hook_resid_post'")
    assert ActivationStore.open(tmp_path / "out" / "blocks.12.hook_resid_post").hook == "blocks.12.hook_resid_post"


def test_stores_of_several_layers_become_one_folder_of_memmaps(tmp_path, x):
    for layer in (0, 2):
        hook = f"blocks.{layer}.hook_resid_post"
        write_store(tmp_path / "acts" / hook, x + layer, hook=hook)
    line = said(f"export {tmp_path}/acts {tmp_path}/maps --to memmaps")
    assert line == f"{2 * N} rows of 2 layers as folder of the released GLP code: {tmp_path}/maps\n"
    mean = torch.load(tmp_path / "maps" / "rep_statistics.pt", weights_only=True)["mean"]
    torch.testing.assert_close(mean[[0, 2]], torch.stack([x.mean(0), x.mean(0) + 2]))
    assert "2 stores, open one of" in told(f"export {tmp_path}/acts {tmp_path}/x.npy --to arrays")
    shutil.rmtree(tmp_path / "acts" / "blocks.0.hook_resid_post")
    assert "expected stores of several layers" in told(f"export {tmp_path}/acts {tmp_path}/y --to memmaps")


@pytest.fixture
def files(tmp_path, store):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no store")
    (tmp_path / "stream").mkdir()
    (tmp_path / "stream" / MANIFEST).write_bytes((store.path / MANIFEST).read_bytes())
    change(tmp_path / "stream", window=2)
    np.save(tmp_path / "a.npy", np.ones((3, 5), dtype=np.float32))
    return SimpleNamespace(f=tmp_path)


MISTAKES = [
    ("info", "Missing argument"),
    ("info {f}/none", "no activation store at"),
    ("info {f}/empty", "no activation store at"),
    ("info {f}/s --png {f}/norms.jpg", "takes the name of a .png file"),
    ("info {f}/s --png {f}/file/norms.png", "choose another folder"),
    ("info {f}/stream --png {f}/norms.png", "has none to read"),
    ("repair {f}/none", "no activation store at"),
    ("repair {f}/stream", "is a stream"),
    ("merge", "name it, or pass --out"),
    ("import {f}/a.npy --from arrays --hook h", "name both"),
    ("export {f}/s --to arrays", "name it, or pass --out"),
    ("export {f}/s {f}/a.npy --to arrays --out {f}/b.npy", "two places to write to"),
    ("merge {f}/empty", "no parts in"),
    ("merge {f}/new {f}/empty", "no activation store in"),
    ("merge {f}/new {f}/s", "not a part of one"),
    ("import {f}/a.npy {f}/new", "Missing option '--from'"),
    ("import {f}/a.npy {f}/new --from pickle", "'pickle' is not one of 'memmaps', 'sae-lens', 'arrays'"),
    ("import {f}/a.npy {f}/new --from arrays", "needs --hook"),
    ("import {f}/a.npy {f}/new --from arrays --hook h --dtype int16", "--dtype is no option of --from arrays"),
    ("import {f}/a.npy {f}/s --from arrays --hook h", "exists and is not empty"),
    ("import {f}/none.npy {f}/new --from arrays --hook h", "does not exist"),
    ("import {f}/a.npy {f}/new --from memmaps --hook h", "is no folder"),
    ("import {f}/a.npy {f}/file {f}/new --from memmaps --hook h", "takes one folder, got 2"),
    ("import {f}/empty {f}/new --from sae-lens", "no cached activations at"),
    ("import {f}/empty {f}/new --from sae-lens --drop-tokens bos", "--drop-tokens takes token ids"),
    ("export {f}/s {f}/new", "Missing option '--to'"),
    ("export {f}/s {f}/new --to parquet", "'parquet' is not one of"),
    ("export {f}/s {f}/new.csv --to arrays", "arrays are written as"),
    ("export {f}/s {f}/new --to memmaps --context 9", "--context is no option of --to memmaps"),
    ("export {f}/s {f}/new --to sae-lens --context 999", "context must be 1 to 310"),
    ("export {f}/none {f}/new --to memmaps", "no activation store at"),
    ("export {f}/s {f}/file --to memmaps", "exists and is not empty"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(line, words, files):
    assert words in told(line.format(f=files.f))
