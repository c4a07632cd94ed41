"""Writing files: what killed writers leave, and tensors that lie in one piece of memory, or overlap."""

import os
import signal

import pytest
import torch

from glp_lens import directions, files
from glp_lens.directions import Direction

DIRECTION = Direction(torch.tensor([1.0, 0, 0]), hook="blocks.1.hook_resid_post", name="mine", method="mean")

KIND = files.Kind("weights", "save them again")


def test_tensors_of_one_piece_of_memory_are_written_without_copies(tmp_path, monkeypatch):
    """Only those that overlap are copied, which safetensors would refuse."""
    memory = torch.arange(100.0)
    tensors = {
        "matrix": memory[:10].view(2, 5), "next": memory[10:30], "overlapping": memory[25:40], "again": memory[10:30],
        "transposed": memory[40:46].view(2, 3).T, "empty": memory[:0],
    }  # fmt: skip
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **options: copied.append(self) or clone(self, **options))
    files.write_tensors(tmp_path / "weights.safetensors", tensors, KIND)
    assert len(copied) == 2
    found = files.read_tensors(tmp_path / "weights.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def killed(write):
    """Run something in a process that kills itself when a file takes its place."""
    pid = os.fork()
    if pid == 0:
        try:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            write()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_atomic(path, "text"),
        lambda path: files.write_tensors(path, {"weights": torch.ones(3, 2)}, files.Kind("weights", "save them again")),
        lambda path: directions.write(path.with_suffix(".gguf"), DIRECTION),
    ],
    ids=["text", "tensors", "gguf"],
)
def test_what_a_killed_write_left_goes_with_the_next(tmp_path, write):
    path = tmp_path / "file"
    for _ in range(2):
        killed(lambda: write(path))
        assert len(list(tmp_path.iterdir())) == 1
        assert not path.exists()
    write(path)
    (made,) = tmp_path.iterdir()
    assert made.is_file()


def test_a_library_that_is_killed_leaves_its_own_temporary_file_where_the_next_write_finds_it(tmp_path):
    def library():
        with files.replaced(tmp_path / "file", by_library=True) as temporary:
            (temporary.parent / ".tmpXYZ").write_text("half a file")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(library)
    files.write_atomic(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize("by_library", [False, True])
def test_a_writer_at_work_is_not_taken_for_a_killed_one(tmp_path, by_library):
    path = tmp_path / "file"
    with files.replaced(path, by_library=by_library) as temporary:
        temporary.write_text("slow")
        files.write_atomic(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    for name in (".file.mine", ".file.original", ".file.backups1.tmp.d"):
        (tmp_path / name).mkdir()
    files.write_atomic(tmp_path / "file", "text")
    assert len(list(tmp_path.iterdir())) == 4
