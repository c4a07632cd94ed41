"""Full disks, damage and foreign files: one line each, and what was committed stays."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from glp_lens.activations import ActivationStore, shard, write_store
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.activations.shard import Source, file_hash, head_hash
from glp_lens.activations.store import damaged_shards
from glp_lens.activations.writer import StoreWriter
from glp_lens.errors import InputError

N, D = 2000, 24  # a shard whose rows reach past its beginning, which has a hash of its own
MANIFESTED = {"hook": "h", "d_in": D, "dtype": "bfloat16", "source": {}, "versions": {}}


def rows(seed=0, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).bfloat16()


def columns(n=N):
    return {name: np.arange(n) for name in ("token_id", "doc_id", "position")}


@pytest.fixture
def store(tmp_path):
    """Three shards, the last of one row."""
    return write_store(tmp_path / "s", rows(n=2 * N + 1), hook="h", dtype="bfloat16", shard_rows=N)


def refused(call, *names):
    """That a call is refused in one line with these words in it."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert all(str(name) in line for name in names), line
    return line


def first(store):
    return store.path / store.manifest.shards[0].name


def damaged(store):
    return [shard.index for shard in damaged_shards(store.path, store.manifest)]


def admit(store, **changes):
    """Make the manifest true about the first shard's file, as whoever forges a store would."""
    path = first(store)
    size, digest = file_hash(path)
    shards = list(store.manifest.shards)
    changes = {"bytes": size, "xxh3_128": digest, "head_xxh3": head_hash(path, store.manifest), **changes}
    shards[0] = replace(shards[0], **changes)
    manifest = replace(store.manifest, shards=tuple(shards))
    (store.path / MANIFEST).write_text(json.dumps(manifest.to_json()))


# --- damage


def test_every_flipped_bit_is_found_and_none_crashes_the_reader(store):
    """A child flips bits: HDF5 can crash or hang on damaged descriptions, and must be given none."""
    path, layout = first(store), store._layouts[0]
    size = path.stat().st_size
    rng = random.Random(0)
    with h5py.File(path) as file:
        ends = {name: at + file[name].id.get_storage_size() for name, at in layout.items()}
        inside = [(file[f"stats/{name}"].id.get_offset(), 8) for name in file["stats"]]
    inside += [(at, ends[name] - at) for name, at in layout.items()]  # every dataset
    data = path.read_bytes()
    described = [i for i in range(head_end(layout)) if data[i]]  # HDF5's own structures
    places = [at + rng.randrange(n) for at, n in inside for _ in range(4)]
    places += rng.sample(described, 150) + rng.sample(range(size), 50) + [0, size - 1]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = check_flips(store, path, places, layout, ends)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "1: undetected; 2: wrong error; below 0: crashed"
    assert path.read_bytes() == data


def head_end(layout):
    return min(layout.values())


def check_flips(store, path, places, layout, ends):
    rng = random.Random(1)
    with path.open("r+b", buffering=0) as file:
        for place in places:
            was = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([was[0] ^ 1 << rng.randrange(8)]), place)
            if damaged(store) != [0]:
                return 1
            try:
                ActivationStore.open(store.path)
            except InputError as error:
                if "\n" in str(error) or str(store.path) not in str(error):
                    return 2
            else:  # only a row, which `open` does not read, can have changed
                if not any(at <= place < ends[name] for name, at in layout.items()):
                    return 1
            os.pwrite(file.fileno(), was, place)
    return 0


def many_columns(folder, count, length, n=300, d=D):
    """A store of one shard with so many label columns, with names of this length."""
    labels = {f"c{i:03d}".ljust(length, "q"): ("float32", "int64")[i % 2] for i in range(count)}
    ids = {name: np.arange(n) + i for i, name in enumerate(labels)}
    x = rows(n=n) if d == D else torch.zeros(n, d)
    return write_store(folder, x, hook="h", dtype="bfloat16", labels=labels, columns=ids)


def outside_datasets(path):
    """Places of bytes that are not 0 and belong to no dataset: HDF5's own structures."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    own = data != 0

    def clear(_, item):
        if isinstance(item, h5py.Dataset):
            own[item.id.get_offset() : item.id.get_offset() + item.id.get_storage_size()] = False

    with h5py.File(path) as file:
        file.visititems(clear)
    return np.flatnonzero(own)


@pytest.mark.parametrize("length", [4, 30, 64])
@pytest.mark.parametrize("count", [0, 39, 40, 41, 60, 64, 80, 300])
def test_the_hash_of_the_beginning_covers_all_descriptions(count, length, tmp_path):
    """However many columns there are, and whatever they are called."""
    store = many_columns(tmp_path / "s", count, length)
    path = first(store)
    last = int(outside_datasets(path)[-1])
    before = head_hash(path, store.manifest)
    with path.open("r+b", buffering=0) as file:
        was = os.pread(file.fileno(), 1, last)
        os.pwrite(file.fileno(), bytes([was[0] ^ 1]), last)
    assert head_hash(path, store.manifest) != before


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "by an earlier release"])
def test_no_flip_in_the_descriptions_of_many_columns_gives_other_data(earlier, tmp_path, monkeypatch):
    """An earlier release left descriptions of many columns among the rows, outside of the hash."""
    with monkeypatch.context() as patch:
        if earlier:
            patch.setattr(shard, "_LABEL_DESCRIPTION", 0)
        store = many_columns(tmp_path / "s", 80, 20)
    path, described = first(store), outside_datasets(first(store)).tolist()
    assert (described[-1] > 100_000) == earlier
    want = ActivationStore.open(store.path)
    assert torch.equal(want.rows(), rows(n=300).float())
    assert np.array_equal(want.column("c079".ljust(20, "q")), np.arange(300) + 79)
    rng = random.Random(0)
    among = [place for place in described if place > 65536] or described
    with path.open("r+b", buffering=0) as file:
        for place in [*rng.sample(described, 100), *rng.sample(among, 100), *described[-3:]]:
            was = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([was[0] ^ 1 << rng.randrange(8)]), place)
            refused(lambda: ActivationStore.open(store.path), store.path, path.name, "not what was written")
            os.pwrite(file.fileno(), was, place)
    ActivationStore.open(store.path)


@pytest.mark.parametrize("d", [D, 4096])
def test_a_shard_of_many_columns_that_an_earlier_release_did_not_list_is_made_again(d, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shard, "_LABEL_DESCRIPTION", 0)
        store = many_columns(tmp_path / "s", 80, 20, n=9, d=d)
    refused(lambda: shard.adopt_shard(store.path, 0, store.manifest), "an earlier release wrote it")
    store = many_columns(tmp_path / "t", 80, 20, n=9, d=d)
    assert shard.adopt_shard(store.path, 0, store.manifest) == store.manifest.shards[0]


@pytest.mark.parametrize("length", [0, 1, 7, 2048, 40_000, -1])
def test_a_truncated_shard_is_refused_and_found(store, length):
    path = first(store)
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    refused(lambda: ActivationStore.open(store.path), store.path, path.name, "bytes, expected")
    refused(store.verify, store.path, "1 of 3 shards", path.name)


def test_missing_empty_and_foreign_shards_are_refused_and_found(store):
    path, size = first(store), first(store).stat().st_size
    path.unlink()
    refused(lambda: ActivationStore.open(store.path), store.path, path.name, "missing")
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        make()
        refused(lambda: ActivationStore.open(store.path), store.path, path.name, "missing")
        assert damaged(store) == [0]
        path.rmdir() if path.is_dir() else path.unlink()
    for content in (bytes(size), random.Random(0).randbytes(size)):
        path.write_bytes(content)
        refused(lambda: ActivationStore.open(store.path), store.path, path.name)
        admit(store)
        refused(lambda: ActivationStore.open(store.path), store.path, path.name, "cannot be opened")
    path.unlink()
    os.truncate(store.path / store.manifest.shards[1].name, 99)
    refused(store.verify, "2 of 3 shards", "shard-00000000.h5, shard-00000001.h5")


def test_shards_in_the_wrong_place_or_store_are_refused(store, tmp_path):
    one, two = (store.path / shard.name for shard in store.manifest.shards[:2])
    twin = write_store(tmp_path / "twin", rows(1, 2 * N + 1), hook="h", dtype="bfloat16", shard_rows=N)
    assert twin.manifest.identity == store.manifest.identity
    kept = one.read_bytes()
    for other in (two, first(twin)):
        shutil.copyfile(other, one)
        assert one.stat().st_size == len(kept)
        refused(lambda: ActivationStore.open(store.path), store.path, one.name)
        assert damaged(store) == [0]
    shutil.copyfile(two, one)
    admit(store)
    refused(lambda: ActivationStore.open(store.path), "another place")
    stranger = write_store(tmp_path / "stranger", rows(n=N), hook="other", dtype="bfloat16")
    shutil.copyfile(first(stranger), one)
    admit(store)
    refused(lambda: ActivationStore.open(store.path), "another store")


def test_a_manifest_cut_anywhere_is_one_line(store):
    path = store.path / MANIFEST
    text = path.read_bytes()
    for length in range(len(text) - 1):  # the last byte is a line end
        path.write_bytes(text[:length])
        refused(lambda: ActivationStore.open(store.path), store.path)
    for content in (b"\xff\xfe" + text, b"[" * 100_000, b'{"rows": ' + b"9" * 5000 + b"}", b"null", b"[]"):
        path.write_bytes(content)
        refused(lambda: ActivationStore.open(store.path), store.path)


# --- foreign and hostile files


def external(file, old):
    file.create_dataset("x", old.shape, old.dtype, external=[("/etc/passwd", 0, old.nbytes)])


def virtual(file, old):
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[:] = h5py.VirtualSource("shard-00000001.h5", "x", old.shape)
    file.create_virtual_dataset("x", layout)


def unknown_filter(file, old):
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_chunk(old.shape)
    how.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple(old.shape)
    made = h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U16LE, space, how)
    made.write_direct_chunk((0, 0), old.tobytes())


@pytest.mark.parametrize(
    "make",
    [
        external,
        virtual,
        unknown_filter,
        lambda f, x: f.__setitem__("x", h5py.ExternalLink("shard-00000001.h5", "/x")),
        lambda f, x: f.__setitem__("x", h5py.SoftLink("/position")),
        lambda f, x: f.create_dataset("x", data=x, chunks=True),
        lambda f, x: f.create_dataset("x", data=x, compression="gzip"),
        lambda f, x: f.create_dataset("x", data=x, fletcher32=True),
        lambda f, x: f.create_dataset("x", data=x.astype(np.int16)),
        lambda f, x: f.create_dataset("x", data=x.astype(">u2")),
        lambda f, x: f.create_dataset("x", data=x[:-1]),
        lambda f, x: f.create_dataset("x", x.shape, x.dtype),  # never allocated
        lambda f, x: f.create_dataset("x", (10**15, D), x.dtype),
        lambda f, x: f.create_dataset("x", x.shape, h5py.string_dtype()),
        lambda f, x: f.create_dataset("x", x.shape, h5py.vlen_dtype(np.uint16)),
        lambda f, x: f.create_dataset("x", x.shape, h5py.ref_dtype),
        lambda f, x: f.create_group("x"),
        lambda f, x: f.__setitem__("x", np.dtype("<u2")),
        lambda f, x: f.__delitem__("stats") or f.__setitem__("stats", h5py.ExternalLink("shard-00000001.h5", "/stats")),
        lambda f, x: f.__delitem__("stats/mean"),
        lambda f, x: f.attrs.__delitem__("store"),
        lambda f, x: f.attrs.__setitem__("store", np.zeros(3)),
        lambda f, x: f.attrs.__setitem__("index", h5py.Empty("f")),
        lambda f, x: f.attrs.__setitem__("version", 1),
    ],
)
def test_a_forged_shard_is_refused_even_when_the_manifest_agrees(store, make):
    with h5py.File(first(store), "a") as file:
        old = file["x"][()]
        del file["x"]
        make(file, old)
        if "x" not in file and not isinstance(file.get("x", getlink=True), h5py.ExternalLink):
            file["x"] = old
    admit(store)
    refused(lambda: ActivationStore.open(store.path), store.path, f"damaged: {first(store).name}")


def test_real_hdf5_of_something_else_is_refused(store):
    with h5py.File(first(store), "w") as file:
        file["measurements"] = np.arange(100.0)
    admit(store)
    refused(lambda: ActivationStore.open(store.path), "it is no shard of this format")


def test_a_small_file_that_claims_a_petabyte_takes_no_memory(store):
    with h5py.File(first(store), "a") as file:
        for name in ("x", *store.manifest.columns):
            dtype = file[name].dtype
            del file[name]
            file.create_dataset(name, (10**15, D) if name == "x" else (10**15,), dtype)
    admit(store, rows=10**15)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: ActivationStore.open(store.path), f"damaged: {first(store).name}", "past the end")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB


def test_harmless_oddities_give_the_right_rows(store, tmp_path):
    """A committed datatype and a user block change where bytes lie, not what they are; links serve caches."""
    want = store.rows()
    with h5py.File(first(store), "a") as file:
        old = file["x"][()]
        del file["x"]
        file["type"] = np.dtype("<u2")
        file.create_dataset("x", data=old, dtype=file["type"])
    admit(store)
    assert torch.equal(ActivationStore.open(store.path).rows(), want)

    copy = tmp_path / "copy.h5"
    with h5py.File(first(store)) as old, h5py.File(copy, "w", userblock_size=1024) as new:
        new.attrs.update(old.attrs)
        for name in old:
            old.copy(name, new)
    first(store).unlink()
    first(store).symlink_to(copy)
    admit(store)
    assert torch.equal(ActivationStore.open(store.path).rows(), want)


def test_no_filter_plugin_is_loaded(store, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("watches the loader of glibc")
    with h5py.File(first(store), "a") as file:
        old = file["x"][()]
        del file["x"]
        unknown_filter(file, old)
    admit(store)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "libbogus.so").write_bytes(b"not a library")
    environment = {**os.environ, "HDF5_PLUGIN_PATH": str(tmp_path / "plugins"), "LD_DEBUG": "files"}
    read = f"import h5py; h5py.File({str(first(store))!r})['x'][()]"
    ours = textwrap.dedent(f"""
        from glp_lens.activations import ActivationStore
        from glp_lens.errors import InputError
        try:
            ActivationStore.open({str(store.path)!r})
        except InputError as error:
            print("refused:", error)
    """)
    found = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        for code in (read, ours)
    ]
    if "libbogus.so" not in found[0].stderr:
        pytest.skip("this loader or HDF5 does not show the attempt")
    assert "refused:" in found[1].stdout
    assert "libbogus.so" not in found[1].stderr


@pytest.mark.parametrize("name", ["../../etc/passwd", -1, 1.5, True, None, 10**8])
def test_a_manifest_cannot_name_files_elsewhere(store, name):
    path = store.path / MANIFEST
    value = json.loads(path.read_text())
    del value["glp_lens"]
    value["shards"][0]["index"] = name
    path.write_text(json.dumps(value))
    refused(lambda: ActivationStore.open(store.path), store.path, "damaged")


# --- disks that are full or cannot be written


def begin(folder):
    """A store with one shard and room for more."""
    manifest = Manifest(**MANIFESTED)
    with StoreWriter(folder, manifest) as writer:
        writer.append(0, rows(), columns(), Source(N, "0", {}))
        return writer.manifest


def go_on(folder, manifest):
    with StoreWriter(folder, manifest) as writer:
        writer.append(1, rows(1), columns(), Source(N, "1", {}))
        writer.finish()


def refusal(folder):
    """The line with which going on was refused, if it was."""
    try:
        go_on(folder, Manifest.read(folder))
    except InputError as error:
        return str(error)
    return None


def intact(folder, committed):
    """That the first shard is there, whole, and nothing half done beside it."""
    found = Manifest.read(folder)
    assert found.shards[0] == committed.shards[0]
    store = ActivationStore.open(folder, partial=True)
    store.verify()
    assert torch.equal(store.rows(0, N), rows().float())
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["posix_fallocate", "fsync", "replace"])
def test_a_disk_that_fails_at_any_step_loses_nothing(tmp_path, monkeypatch, name, code):
    committed = begin(tmp_path / "s")
    real = getattr(os, name)
    for step in range(1, 10):
        calls = []

        def fail(*arguments, step=step, calls=calls):
            calls.append(1)
            if len(calls) == step:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            line = refusal(tmp_path / "s")
        if line is None:
            break
        full = code in (errno.ENOSPC, errno.EDQUOT)
        assert line.startswith("disk full" if full else "cannot write (")
        assert str(tmp_path / "s") in line
        assert "\n" not in line
        intact(tmp_path / "s", committed)
    assert step > {"posix_fallocate": 1, "fsync": 4, "replace": 3}[name]
    go_on(tmp_path / "s", Manifest.read(tmp_path / "s"))
    assert torch.equal(ActivationStore.open(tmp_path / "s").rows(N), rows(1).float())


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 640 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, left):
    """Leave so many bytes free."""
    status = os.statvfs(folder)
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)


def test_a_disk_really_full_at_any_place_loses_nothing(small_disk):
    folder = small_disk / "s"
    committed = begin(folder)
    outcomes = []
    for pages in range(90):
        fill(small_disk, pages * 4096)
        line = refusal(folder)
        outcomes.append(line is None)
        if line:
            assert line.startswith(f"disk full: no room to write in {folder}")
            assert "\n" not in line
        (small_disk / "filler").unlink()
        intact(folder, committed)
        if (folder / "shard-00000001.h5").exists():  # written, or only to be listed: begin again
            (folder / "shard-00000001.h5").unlink()
            (folder / MANIFEST).write_text(json.dumps(committed.to_json()))
    assert set(outcomes) == {False, True}
    go_on(folder, Manifest.read(folder))
    assert len(ActivationStore.open(folder)) == 2 * N


def test_a_read_only_disk_is_one_line(small_disk):
    manifest = begin(small_disk / "s")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(lambda: go_on(small_disk / "s", manifest), "cannot write to folder", small_disk / "s")
    refused(lambda: write_store(small_disk / "t", rows(), hook="h"), "cannot make folder", small_disk / "t")
    intact(small_disk / "s", manifest)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
    manifest = begin(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        refused(lambda: go_on(tmp_path / "s", manifest), "cannot write to folder", tmp_path / "s")

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused(lambda: write_store(tmp_path / "t", rows(), hook="h"), "cannot make folder", tmp_path / "t")


def test_files_of_others_are_left_alone(tmp_path):
    manifest = begin(tmp_path / "s")
    for name in ("shard-mine.h5", "notes.txt", "shard-00000000.h5.damaged"):
        (tmp_path / "s" / name).write_text(name)
    for name in ("shard-00000007.h5", ".shard-00000001.h5.tmp", f".{MANIFEST}.abcd"):
        (tmp_path / "s" / name).write_text("half done")
    go_on(tmp_path / "s", manifest)
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == [
        MANIFEST, "notes.txt", "shard-00000000.h5", "shard-00000000.h5.damaged", "shard-00000001.h5", "shard-mine.h5",
    ]  # fmt: skip
