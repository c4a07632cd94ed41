"""What is looked at before a language model is trusted: its forward pass, its cache, its weights, its hook points."""

import shutil
import warnings

import pytest
import torch

import glp_lens as gl
from glp_lens import hooks, lm
from glp_lens.errors import InputError
from glp_lens.evals import fidelity
from glp_lens.lm import checking
from tests import architectures
from tests.conftest import tiny_texts

MID = "blocks.1.hook_resid_mid"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test alone."""
    monkeypatch.setenv("GLP_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(tmp_path):
    """Makes a tiny model of an architecture; its folder."""
    return lambda name: str(architectures.make(name, tmp_path / name))


# -- the forward pass against transformers' --------------------------------------------------------------------


def test_a_conversion_that_drops_biases_is_refused_unless_told_not_to_look(made, cache, monkeypatch):
    pytest.importorskip("transformer_lens.pretrained.weight_conversions.llama")
    folder = made("Llama with biases")
    assert lm.open_model(folder, dtype="float32").cfg.n_layers == 3  # a bridge keeps them
    with pytest.raises(InputError, match=r"backend='hooked', computes something else than transformers") as error:
        lm.open_model(folder, backend="hooked", dtype="float32")
    assert "\n" not in str(error.value)
    assert lm.open_model(folder, backend="hooked", check=False, dtype="float32").cfg.n_layers == 3
    monkeypatch.setenv("GLP_LENS_CHECK", "0")
    assert lm.open_model(folder, backend="hooked", dtype="float32").cfg.n_layers == 3
    monkeypatch.setenv("GLP_LENS_CHECK", "yes")
    with pytest.raises(InputError, match="GLP_LENS_CHECK must be 0 or 1"):
        lm.open_model(folder, dtype="float32")


def test_that_a_model_agrees_is_remembered_for_its_files(tiny_folder, tmp_path, cache, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    compared = []
    real = checking.compare
    monkeypatch.setattr(checking, "compare", lambda *a: compared.append(a[3]) or real(*a))
    for backend in ("bridge", "bridge"):
        lm.open_model(str(folder), backend=backend, dtype="bfloat16")
    assert compared == ["bridge"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # other files, as far as anyone can tell
    lm.open_model(str(folder), dtype="float32")
    assert compared == ["bridge"] * 2


def test_a_large_model_is_opened_with_a_line_that_it_was_not_compared(tiny_folder, cache, monkeypatch):
    monkeypatch.setattr(checking, "_LARGEST", 1000)
    with pytest.warns(UserWarning, match="was not compared with transformers"):
        lm.open_model(str(tiny_folder), dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lm.open_model(str(tiny_folder), check=True, dtype="float32")
        lm.open_model(str(tiny_folder), dtype="float32")  # compared by now


# -- generation ------------------------------------------------------------------------------------------------


def test_a_cache_that_is_lost_is_found_out_and_done_without(tiny_bridge, monkeypatch):
    used = []

    def forgetful(tokens, *, max_new_tokens, **options):
        """As transformers 5.24: each cached step reads the new token alone."""
        used.append(max_new_tokens)
        for step in range(max_new_tokens):
            logits = tiny_bridge(tokens if step == 0 else tokens[:, -1:], return_type="logits")
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        return tokens

    prompt = torch.tensor(lm.to_ids(tiny_bridge, ["cat dog bird fish horse"], 6))
    want = lm.generate(tiny_bridge, prompt, 8)
    monkeypatch.setattr(lm.generating, "_known", {})
    monkeypatch.setattr(tiny_bridge, "generate", forgetful)
    with pytest.warns(UserWarning, match="generating without a cache"):
        found = lm.generate(tiny_bridge, prompt, 8)
    assert torch.equal(found, want)
    assert torch.equal(lm.generate(tiny_bridge, prompt, 8), want)
    assert len(used) == 1  # tried once, and not used


def test_generated_rows_are_those_of_a_forward_pass_over_the_text(made, tmp_path, cache):
    for name in ("Rwkv", "Llama"):
        model = lm.open_model(made(name), dtype="float32")
        hook = architectures.HOOK
        store = gl.collect(model, tiny_texts(6), hook, tmp_path / "acts" / name, context=12, dtype="float32",
                           massive=None, generate=gl.Generation(5, temperature=0.0))  # fmt: skip
        reference = architectures.Reference(name, tmp_path / name, store.provenance()["model"]["blocks"])
        by_length = sorted(lm.to_ids(model, tiny_texts(6), 12), key=len)
        want = [reference.run(reference.continued(ids, lambda x: x))[0][len(ids) :] for ids in by_length]
        got = store.rows()
        assert len(got) == sum(map(len, want))
        for rows in want:  # documents keep their order, batches are by length
            assert min(float((got[i : i + len(rows)] - rows).abs().max()) for i in range(len(got) - 4)) < 1e-3


def test_masked_language_models_neither_generate_nor_have_a_loss(made, tmp_path, cache):
    model = lm.open_model(made("Bert"), dtype="float32")
    tokens, mask = lm.pad(lm.to_ids(model, tiny_texts(2), 12))
    for call in (
        lambda: lm.generate(model, tokens, 3),
        lambda: lm.token_nll(model, tokens, mask),
        lambda: gl.collect(model, tiny_texts(9), out=tmp_path / "acts", context=12, generate=gl.Generation(3)),
    ):
        with pytest.raises(InputError, match="does not predict the next token"):
            call()


# -- weight processing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_processing_is_told_by_what_it_did(made, name, cache):
    folder = made(name)
    centres = name == "GPT2"  # only LayerNorm models are centred
    both = "folded+centred" if centres else "folded"
    ways = {
        "raw": lambda m: None,
        "raw ": lambda m: m.enable_compatibility_mode(disable_warnings=True, no_processing=True),
        both: lambda m: m.process_weights(),
        both + " ": lambda m: m.enable_compatibility_mode(disable_warnings=True),
        "folded": lambda m: m.process_weights(center_writing_weights=False),
        "centred" if centres else "raw  ": lambda m: m.process_weights(fold_ln=False, fold_value_biases=False),
    }
    for said, process in ways.items():
        model = lm.open_model(folder, check=False, dtype="float32")
        process(model)
        assert lm.weight_processing(model) == said.strip()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centring_is_seen_in_any_number_format(dtype):
    pytest.importorskip("transformer_lens.pretrained.weight_conversions.llama")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    def model(**processing):
        cfg = HookedTransformerConfig(d_model=768, d_head=64, n_heads=12, d_mlp=64, n_layers=1, n_ctx=16, d_vocab=2000,
                                      act_fn="gelu", normalization_type="LN", seed=0, device="cpu")  # fmt: skip
        made = HookedTransformer(cfg)
        for parameter in made.parameters():
            parameter.data += 0.05  # so that centring does something
        state = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in made.state_dict().items()
        }
        made = made.to(dtype)
        made.cfg.dtype = dtype
        off = {"fold_ln": False, "center_unembed": False, "fold_value_biases": False}
        made.load_and_process_state_dict(state, **{"center_writing_weights": False, **off, **processing})
        return made

    assert lm.weight_processing(model()) == "raw"
    assert lm.weight_processing(model(center_writing_weights=True)) == "centred"
    assert lm.weight_processing(model(center_writing_weights=True, fold_ln=True)) == "folded+centred"


# -- hook points -----------------------------------------------------------------------------------------------


def test_which_names_are_one_point_is_the_models_own(made, tmp_path, cache):
    llama, gemma = lm.open_model(made("Llama"), dtype="float32"), lm.open_model(made("Gemma2"), dtype="float32")
    names = ["blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"]
    assert lm.names_of(llama, names[0]) == names
    assert names[1] not in lm.names_of(gemma, names[0])
    store = gl.collect(llama, tiny_texts(30), names[1], tmp_path / "acts", context=12, massive=None)
    pca = gl.load(gl.PCA.fit(store, n_components=5).save_pretrained(tmp_path / "pca"))
    assert pca.hook_names == names
    tokens, mask = lm.pad(lm.to_ids(llama, tiny_texts(3), 12))
    for name in names:
        lm.token_nll(llama, tokens, mask, [pca.projection_hook(name, model=llama)])
    point, fn = pca.projection_hook(names[1])
    lm.token_nll(llama, tokens, mask, [(point, fn)])
    with pytest.raises(InputError, match="trained at blocks.1.mlp.hook_out"):
        lm.token_nll(gemma, tokens, mask, [(names[0], pca.projection_hook(names[1], allow_mismatch=False)[1])])


def test_a_hook_that_never_runs_is_an_error(made, cache):
    model = lm.open_model(made("OpenAIGPT"), dtype="float32")
    tokens, mask = lm.pad(lm.to_ids(model, tiny_texts(2), 12))
    for call in (
        lambda: lm.activations(model, tokens, mask, ["blocks.1.hook_resid_post"]),
        lambda: lm.token_nll(model, tokens, mask, [("blocks.1.hook_resid_post", lambda x, *, hook: x)]),
        lambda: lm.generate(model, tokens[:1, :4], 2, hooks=[("blocks.1.hook_resid_post", lambda x, *, hook: x)]),
    ):
        with pytest.raises(InputError, match=r"blocks.1.hook_resid_post never ran"):
            call()


def test_points_that_are_no_rows_of_tokens_are_refused_and_heads_stand_side_by_side(made, tmp_path, cache):
    model = lm.open_model(made("Llama"), dtype="float32")
    tokens, mask = lm.pad(lm.to_ids(model, tiny_texts(4), 12))
    z = lm.activations(model, tokens, mask, ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]
    assert z.shape == (*tokens.shape, 24)
    store = gl.collect(model, tiny_texts(4), "blocks.1.attn.hook_z", tmp_path / "z", context=12, dtype="float32",
                       massive=None)  # fmt: skip
    assert float((store.rows().sum(0) - z[mask & (torch.arange(12) > 0)].sum(0)).abs().max()) < 1e-3

    def doubled(x, *, hook):
        return torch.cat([x[:, :1], 2 * x[:, 1:]], dim=1)

    want = lm.token_nll(model, tokens, mask, [("blocks.1.attn.hook_z", doubled)])
    got = lm.token_nll(model, tokens, mask, [("blocks.1.attn.hook_z", hooks.edit(lambda rows: 2 * rows, "all"))])
    torch.testing.assert_close(got, want)
    with pytest.raises(InputError, match="expected .batch, pos, d."):
        lm.activations(model, tokens, mask, ["blocks.1.attn.hook_pattern"])
    with pytest.raises(InputError, match="layers are 0 to 2"):
        lm.check_hook(model, "blocks.7.hook_resid_post")
    with pytest.raises(InputError, match="set_use_attn_result"):
        lm.check_hook(model, "blocks.1.attn.hook_result")


def test_edits_between_attention_and_mlp_reach_the_stream_of_one_class_only(tiny_bridge, tiny_hooked):
    lm.check_edit(tiny_hooked, MID)
    for model in (tiny_bridge, tiny_hooked):
        for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
            lm.check_edit(model, name)
    with pytest.raises(InputError, match=r"reaches only the MLP of this language model.*hook_resid_pre"):
        lm.check_edit(tiny_bridge, MID)
    mean = torch.zeros(24)
    with pytest.raises(InputError, match="reaches only the MLP"):
        fidelity.run([], fidelity.FidelityData(tiny_bridge, MID, tiny_texts(3), mean))
    assert fidelity.run([], fidelity.FidelityData(tiny_hooked, MID, tiny_texts(3), mean)).metrics
    push = hooks.steer(torch.ones(24), 1.0)
    tokens = torch.tensor([[0, 5, 6, 7]])
    for model in (tiny_bridge, tiny_hooked):
        with pytest.raises(InputError, match="pass model="):
            model.run_with_hooks(tokens, fwd_hooks=[(MID, push)])
    with pytest.raises(InputError, match="reaches only the MLP"):
        tiny_bridge.run_with_hooks(tokens, fwd_hooks=[(MID, hooks.steer(torch.ones(24), 1.0, model=tiny_bridge))])
    moved = tiny_hooked.run_with_hooks(tokens, fwd_hooks=[(MID, hooks.steer(torch.ones(24), 1.0, model=tiny_hooked))])
    assert not torch.allclose(moved, tiny_hooked(tokens))


# -- batches that are padded on the left -----------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_rows_of_a_left_padded_batch_are_edited_as_if_alone(tiny_bridge, positions, cached):
    texts = ["cat dog bird fish horse tree", "sun moon", "red"]
    push = 3 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "return_type": "tokens",
               "verbose": False, "use_past_kv_cache": cached}  # fmt: skip
    ids = lm.to_ids(tiny_bridge, texts, 9)
    alone = []
    for row in ids:
        hook = ("blocks.1.hook_resid_post", hooks.steer(push, 1.0, positions=positions))
        with tiny_bridge.hooks(fwd_hooks=[hook]), torch.no_grad():
            alone.append(tiny_bridge.generate(torch.tensor([row]), **options)[0, len(row) :].tolist())
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]).bool()
    hook = ("blocks.1.hook_resid_post", hooks.steer(push, 1.0, positions=positions, mask=mask))
    with tiny_bridge.hooks(fwd_hooks=[hook]), torch.no_grad():
        together = tiny_bridge.generate(texts, **{**options, "return_type": "tokens"})
    assert [row[width:].tolist() for row in together] == alone


# -- files -----------------------------------------------------------------------------------------------------


def test_a_partly_cached_model_is_told_and_the_packaged_one_used_instead(tmp_path, monkeypatch, tiny_folder):
    import huggingface_hub

    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(tiny_folder / "config.json", part)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(part))
    monkeypatch.setattr(lm.opening, "of_package", lambda package: tiny_folder)
    monkeypatch.setattr(lm.opening, "packaged", lambda name: True)
    assert lm.open_model().cfg.d_model == 24
    with pytest.raises(InputError, match="Hub cache lacks its tokenizer"):
        lm.open_model("someone/model")
    shutil.copy(tiny_folder / "tokenizer.json", part)
    with pytest.raises(InputError, match="Hub cache lacks its weights"):
        lm.open_model("someone/model")
    (part / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.x"}}')
    (part / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="Hub cache lacks its weights"):
        lm.open_model("someone/model")


def test_folders_that_hold_no_model_or_several_are_refused_in_one_line(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match="2 GGUF files: name one of them"):
        lm.open_model(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read as a GGUF language model") as error:
        lm.open_model(str(tmp_path / "a.gguf"))
    assert "\n" not in str(error.value)


# -- the caller's modes of torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bfloat16", "float64", "autocast", "inference"])
def test_language_models_run_alike_in_any_mode_of_the_caller(mode, tiny_folder, tiny_bridge, cache):
    tokens, mask = lm.pad(lm.to_ids(tiny_bridge, tiny_texts(5), 14))
    want = lm.activations(tiny_bridge, tokens, mask, [architectures.HOOK])[architectures.HOOK]
    text, nll = lm.generate(tiny_bridge, tokens[:1, :4], 4), lm.token_nll(tiny_bridge, tokens, mask)
    before = torch.get_default_dtype()
    modes = {"autocast": torch.autocast("cpu", torch.bfloat16), "inference": torch.inference_mode()}
    try:
        if mode not in modes:
            torch.set_default_dtype(getattr(torch, mode))
        with modes.get(mode, torch.no_grad()):
            for model in (tiny_bridge, lm.open_model(str(tiny_folder), dtype="float32")):
                got = lm.activations(model, tokens, mask, [architectures.HOOK])[architectures.HOOK]
                assert torch.equal(got, want)
                assert torch.equal(lm.generate(model, tokens[:1, :4], 4), text)
                assert torch.equal(lm.token_nll(model, tokens, mask), nll)
    finally:
        torch.set_default_dtype(before)


def test_the_blocks_of_a_model_that_the_user_opened_are_known_too(open_layernorm):
    model = open_layernorm()
    assert "blocks" not in lm.describe(model)
    model.cfg.original_architecture = "GPT2LMHeadModel"  # as HookedTransformer.from_pretrained sets it
    assert lm.describe(model)["blocks"] == "transformer.h"
    model.cfg.original_architecture = "NoSuchModel"
    assert "blocks" not in lm.describe(model)


# -- what tests of a model must not see or change --------------------------------------------------------------


def test_what_is_tried_on_a_model_passes_its_hooks_by(made, cache):
    folder = made("GPT2")
    model = lm.open_model(folder, dtype="float32")
    prompt = torch.tensor(lm.to_ids(model, ["cat dog bird fish"], 6))
    verdict = lm.caches_keys_and_values(lm.open_model(folder, dtype="float32"), prompt)  # of a model without hooks
    seen = []
    centre = ("blocks.0.hook_resid_post", lambda x, *, hook: seen.append(len(x)) or x - x.mean(-1, keepdim=True))
    with model.hooks(fwd_hooks=[centre]):
        assert lm.weight_processing(model) == "raw"
        assert not lm.mid_stream_edits_work(model)
        assert not seen
        lm.generate(model, prompt, 3)
    assert len(seen) == 3
    assert lm.caches_keys_and_values(model, prompt) is verdict


def test_a_prompt_that_fills_the_context_is_continued(made, cache):
    model = lm.open_model(made("GPT2"), dtype="float32")
    prompt = torch.randint(3, 60, (1, model.cfg.n_ctx - 1), generator=torch.Generator().manual_seed(0))
    text = lm.generate(model, prompt, 1)
    assert text.shape == (1, model.cfg.n_ctx)
    text += 1  # a plain tensor, not one of inference mode
    for wrong in ((prompt[0], 1), (prompt, 0), (prompt[:, :0], 1)):
        with pytest.raises(InputError, match="expected prompts"):
            lm.generate(model, *wrong)


def test_encoder_decoders_that_the_user_opened_are_refused_too(made, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    tokens, mask = lm.pad([[0, 5, 6, 7]])
    for name in ("T5", "Bart"):
        model = TransformerBridge.boot_transformers(made(name), device="cpu")
        for call in (
            lambda model=model: gl.collect(
                model, tiny_texts(9), "decoder_blocks.1.hook_out", tmp_path / "acts", context=16
            ),
            lambda model=model: lm.token_nll(model, tokens, mask),
            lambda model=model: lm.generate(model, tokens, 2),
        ):
            with pytest.raises(InputError, match="is an encoder-decoder"):
                call()


def test_folders_without_a_head_of_their_own_are_compared_by_their_activations(made, tmp_path, cache):
    from transformers import AutoModel

    folder = made("Llama")
    body = tmp_path / "body"
    AutoModel.from_pretrained(folder).save_pretrained(body)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "Llama" / name, body)
    with pytest.warns(UserWarning, match="holds no weights of a language-model head"):
        model = lm.open_model(str(body), dtype="float32")
    tokens, mask = lm.pad(lm.to_ids(model, tiny_texts(3), 12))
    hook = architectures.HOOK
    whole = lm.activations(lm.open_model(folder, dtype="float32"), tokens, mask, [hook])[hook]
    torch.testing.assert_close(lm.activations(model, tokens, mask, [hook])[hook], whole)


# -- one function at several points, in texts that go on or not ------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 6])
def test_one_hook_function_at_two_points_generates_alike_with_and_without_a_cache(tiny_bridge, length):
    prompt = torch.tensor(lm.to_ids(tiny_bridge, ["cat dog bird fish horse"], 6))[:, :length]
    push = 2 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    texts = []
    for way in ("library", "whole text"):
        fn = hooks.steer(push, 1.0)
        points = [(f"blocks.{layer}.hook_resid_post", fn) for layer in (0, 2)]
        if way == "library":  # with a cache, where the installed versions do not lose it
            texts.append(lm.generate(tiny_bridge, prompt, 8, hooks=points))
            continue
        with tiny_bridge.hooks(fwd_hooks=points), torch.no_grad():
            text = tiny_bridge.generate(prompt, max_new_tokens=8, do_sample=False, stop_at_eos=False,
                                        use_past_kv_cache=False, return_type="tokens", verbose=False)  # fmt: skip
        texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize("point", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_that_ends_as_the_one_before_did_is_another_text(tiny_folder, point, dtype):
    model = lm.open_model(str(tiny_folder), dtype=dtype)
    first, second = lm.to_ids(model, ["cat dog red blue", "sun moon red blue tree"], 9)
    fn = hooks.steer(4 * torch.ones(24), 1.0, positions="all")
    found = []
    for hook_fn in (fn, hooks.steer(4 * torch.ones(24), 1.0, positions="all")):
        tokens, mask = lm.pad([second])
        if hook_fn is fn:
            lm.token_nll(model, *lm.pad([first]), [(point, fn)])
        found.append(lm.token_nll(model, tokens, mask, [(point, hook_fn)]))
    assert torch.equal(*found)
