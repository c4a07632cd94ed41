"""Files of directions, also as other packages write and read them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from glp_lens.directions import Direction, layer_of, read, read_layers, write
from glp_lens.errors import InputError
from glp_lens.intervals import Interval

D = 7


def vector(seed=0):
    return torch.randn(D, generator=torch.Generator().manual_seed(seed)) * 3


def at(layer, seed=0, point="hook_resid_post"):
    return Direction.of(vector(seed), f"blocks.{layer}.{point}", name="sports", method="mean",
                        provenance={"model": {"name": "org/some-model"}})  # fmt: skip


def as_repeng_writes(path, directions, kind="controlvector"):
    """What repeng 0.4.0 does in `export_gguf`, in terms of the gguf package."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    writer.add_string(f"{kind}.model_hint", "llama")
    writer.add_uint32(f"{kind}.layer_count", len(directions))
    for name, values in directions.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("suffix", [".gguf", ".pt"])
def test_layered_files_keep_each_vector_with_its_layer_and_length(tmp_path, suffix):
    path = write(tmp_path / f"v{suffix}", [at(5, 1), at(2, 2, "hook_out"), at(8, 3, "hook_resid_pre")])
    found = read_layers(path)
    assert sorted(found) == [2, 5, 7]  # the input of block 8 is the output of block 7
    for layer, seed in ((5, 1), (2, 2), (7, 3)):
        torch.testing.assert_close(found[layer], vector(seed))
        back = read(path, f"blocks.{layer}.hook_resid_post", name="x")
        torch.testing.assert_close(back.norm * back.vector, vector(seed))
        assert (back.hook, back.name, back.method) == (f"blocks.{layer}.hook_resid_post", "x", "file")
    with pytest.raises(InputError, match=r"blocks \[2, 5, 7\]: choose one"):
        read(path)
    with pytest.raises(InputError, match="none of block 6"):
        read(path, "blocks.6.hook_resid_post")
    with pytest.raises(InputError, match="hook_mlp_out is not one"):
        read(path, "blocks.5.hook_mlp_out")


def test_one_layer_needs_no_hook_point(tmp_path):
    path = write(tmp_path / "v.gguf", at(4))
    assert read(path).hook == "blocks.4.hook_resid_post"
    assert read(path).name == "v"


def test_a_control_vector_is_what_the_readers_of_repeng_and_llama_cpp_expect(tmp_path):
    """llama.cpp takes one-dimensional F32 tensors `direction.N`, N from 1; repeng also needs model_hint."""
    import gguf

    path = write(tmp_path / "v.gguf", [at(1, 1), at(14, 2)], model_hint="llama")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(tensors) == ["direction.1", "direction.14"]
    for name, seed in (("direction.1", 1), ("direction.14", 2)):
        assert tensors[name].tensor_type == gguf.GGMLQuantizationType.F32
        assert tensors[name].shape.tolist() == [D]
        np.testing.assert_allclose(tensors[name].data, vector(seed).numpy(), rtol=1e-6)
    default = gguf.GGUFReader(write(tmp_path / "w.gguf", at(3)))
    assert default.get_field("controlvector.model_hint").contents() == "org/some-model"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_reads_what_repeng_writes(tmp_path):
    as_repeng_writes(tmp_path / "r.gguf", {f"direction.{n}": vector(n).numpy() for n in (3, 1, 2)})
    for layer, found in read_layers(tmp_path / "r.gguf").items():
        assert torch.equal(found, vector(layer))


def test_a_gguf_file_that_is_no_control_vector_is_one_line(tmp_path):
    as_repeng_writes(tmp_path / "model.gguf", {"direction.1": vector().numpy()}, "llama")
    with pytest.raises(InputError, match="of kind 'llama', expected 'controlvector'"):
        read(tmp_path / "model.gguf")
    as_repeng_writes(tmp_path / "zero.gguf", {"direction.0": vector().numpy()})
    with pytest.raises(InputError, match="'direction.0', expected direction.N with N from 1"):
        read(tmp_path / "zero.gguf")
    as_repeng_writes(tmp_path / "whole.gguf", {"direction.1": np.arange(D, dtype=np.int32)})
    with pytest.raises(InputError, match="of type I32, expected F32"):
        read(tmp_path / "whole.gguf")
    as_repeng_writes(tmp_path / "none.gguf", {"other": vector().numpy()})
    with pytest.raises(InputError, match="holds no vector"):
        read(tmp_path / "none.gguf")
    whole = write(tmp_path / "v.gguf", at(4)).read_bytes()
    for n, cut in enumerate((b"", b"GGUF", whole[:60], b"x" * 300)):
        (tmp_path / f"cut{n}.gguf").write_bytes(cut)
        with pytest.raises(InputError, match="is damaged or no GGUF file"):
            read(tmp_path / f"cut{n}.gguf")


def test_steering_vectors_takes_the_saved_numbers_as_they_are(tmp_path):
    """`SteeringVector(**...)` of steering-vectors 0.12 has these two fields."""
    held = torch.load(write(tmp_path / "v.pt", [at(0, 1), at(3, 2)]), weights_only=True)
    assert set(held) == {"layer_activations", "layer_type"}
    assert held["layer_type"] == "decoder_block"
    assert all(type(layer) is int for layer in held["layer_activations"])
    torch.testing.assert_close(held["layer_activations"], {0: vector(1), 3: vector(2)})


@pytest.mark.parametrize("held", [{4: vector()}, {"layer_activations": {4: vector()[None]}}])
def test_reads_plain_numbers_of_a_steering_vector(tmp_path, held):
    torch.save(held, tmp_path / "s.pt")
    torch.testing.assert_close(read_layers(tmp_path / "s.pt"), {4: vector()})


class Unplain:
    """Stands for a pickled SteeringVector."""


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (Unplain(), "Python objects, which could run code"),
        ({"layer_activations": {1: vector()}, "layer_type": "self_attn"}, "steers 'self_attn'"),
        ({"one": vector()}, "expected a tensor, or tensors by number"),
        ([1, 2], "holds list"),
        ({1: vector(), 2: torch.ones(3)}, "of one width"),
        (torch.ones(3, 2), r"expected vectors \(d,\)"),
        ({1: torch.full((D,), torch.nan)}, "not finite"),
    ],
)
def test_torch_files_that_hold_no_vectors_are_one_line(tmp_path, held, message):
    torch.save(held, tmp_path / "s.pt")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "s.pt", "blocks.1.hook_resid_post")


def test_one_bare_vector_needs_a_hook_point(tmp_path):
    np.save(tmp_path / "v.npy", vector().double().numpy()[None])
    save_file({"refusal": vector()}, tmp_path / "v.safetensors")
    torch.save(vector(), tmp_path / "v.pt")
    for suffix in (".npy", ".safetensors", ".pt"):
        with pytest.raises(InputError, match="does not say which hook point"):
            read(tmp_path / f"v{suffix}")
        back = read(tmp_path / f"v{suffix}", "blocks.3.hook_mlp_out")
        torch.testing.assert_close(back.norm * back.vector, vector())
        assert back.hook == "blocks.3.hook_mlp_out"


def test_safetensors_of_several_layers_are_told_by_their_names(tmp_path):
    save_file({"layer_3": vector(1), "layer_10": vector(2)}, tmp_path / "v.safetensors")
    torch.testing.assert_close(read_layers(tmp_path / "v.safetensors"), {3: vector(1), 10: vector(2)})
    save_file({"mean": vector(1), "std": vector(2)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="names that end in a layer"):
        read(tmp_path / "w.safetensors", "blocks.3.hook_resid_post")


def test_a_numpy_file_of_objects_is_not_read(tmp_path):
    np.save(tmp_path / "v.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="damaged or holds no real numbers"):
        read(tmp_path / "v.npy", "blocks.3.hook_resid_post")


@pytest.mark.parametrize("values", [vector().to(torch.complex64), vector() > 0])
def test_numbers_that_are_not_real_are_refused(tmp_path, values):
    np.save(tmp_path / "v.npy", values.numpy())
    torch.save(values, tmp_path / "v.pt")
    for suffix, message in ((".npy", "holds no real numbers"), (".pt", "expected real ones")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / f"v{suffix}", "blocks.3.hook_resid_post")


def test_two_vectors_of_one_layer_are_refused(tmp_path):
    save_file({"pos.3": vector(1), "neg.3": vector(2)}, tmp_path / "v.safetensors")
    as_repeng_writes(tmp_path / "v.gguf", {"direction.3": vector(1).numpy(), "direction.03": vector(2).numpy()})
    for suffix in (".safetensors", ".gguf"):
        with pytest.raises(InputError, match="several .*expected one a layer"):
            read(tmp_path / f"v{suffix}", "blocks.3.hook_resid_post")


def test_our_own_file_at_no_output_of_a_block_is_for_its_hook_point_alone(tmp_path):
    path = write(tmp_path / "v.safetensors", at(3, point="hook_mlp_out"))
    assert read(path, "blocks.3.hook_mlp_out").hook == "blocks.3.hook_mlp_out"
    for other in ("blocks.5.hook_mlp_out", "blocks.3.hook_attn_out", "blocks.3.hook_resid_post"):
        with pytest.raises(InputError, match="is a direction at blocks.3.hook_mlp_out, asked for"):
            read(path, other)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt", ".gguf"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, suffix):
    (tmp_path / "file").write_text("")
    (tmp_path / f"folder{suffix}").mkdir()
    for path in (tmp_path / "file" / f"v{suffix}", tmp_path / f"folder{suffix}", Path(f"/proc/none/v{suffix}")):
        with pytest.raises(InputError, match="cannot write .*choose another folder"):
            write(path, at(3))


def test_our_own_file_keeps_everything(tmp_path):
    made = Direction.of(vector(), "blocks.3.hook_resid_post", name="n", method="probe", auroc=Interval(0.9, 0.8, 1, 9))
    path = write(tmp_path / "v.safetensors", made)
    assert read(path).auroc == made.auroc
    assert read(path, "blocks.3.hook_out", name="m").name == "m"
    with pytest.raises(InputError, match="is a direction at blocks.3.hook_resid_post, asked for blocks.4"):
        read(path, "blocks.4.hook_resid_post")
    torch.testing.assert_close(torch.from_numpy(np.load(write(tmp_path / "v.npy", made))), vector())


def test_what_a_format_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(InputError, match="no place for a control vector after block 0"):
        write(tmp_path / "v.gguf", at(0))
    with pytest.raises(InputError, match="two directions are after block 3"):
        write(tmp_path / "v.pt", [at(3), at(4, 1, "hook_resid_pre")])
    with pytest.raises(InputError, match="outputs of blocks only"):
        write(tmp_path / "v.gguf", at(3, point="hook_mlp_out"))
    with pytest.raises(InputError, match="holds one direction, got 2"):
        write(tmp_path / "v.npy", [at(3), at(4)])
    with pytest.raises(InputError, match="file of kind"):
        write(tmp_path / "v.bin", at(3))
    with pytest.raises(InputError, match="file of kind"):
        read(tmp_path / "v.bin")
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.11.hook_resid_post", 11), ("blocks.11.hook_out", 11), ("blocks.11.hook_resid_pre", 10),
     ("blocks.0.hook_resid_pre", None), ("blocks.3.hook_resid_mid", None), ("hook_embed", None)],
)  # fmt: skip
def test_which_block_a_hook_point_is_the_output_of(hook, layer):
    assert layer_of(hook) == layer
