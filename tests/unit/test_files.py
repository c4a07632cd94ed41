"""Writing tensors: those that lie in one piece of memory, and those that overlap."""

import torch

from glp_lens import files


def test_tensors_of_one_piece_of_memory_are_written_without_copies(tmp_path, monkeypatch):
    """Only those that overlap are copied, which safetensors would refuse."""
    memory = torch.arange(100.0)
    tensors = {
        "matrix": memory[:10].view(2, 5), "next": memory[10:30], "overlapping": memory[25:40], "again": memory[10:30],
        "transposed": memory[40:46].view(2, 3).T, "empty": memory[:0],
    }  # fmt: skip
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **options: copied.append(self) or clone(self, **options))
    files.write_tensors(tmp_path / "weights.safetensors", tensors)
    assert len(copied) == 2
    found = files.read_tensors(tmp_path / "weights.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
