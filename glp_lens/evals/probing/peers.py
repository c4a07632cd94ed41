"""Adapters that give any model with features the interface of a sparse autoencoder, for other libraries' harnesses.

`sae_probes.run_sae_evals(sae=as_sae(model), ...)` and SAEBench's `sparse_probing` and `sparse_probing_sae_probes` run
on it as on one of sae-lens.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, Self, cast

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from glp_lens import provenance
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Decoder, Featurizer
from glp_lens.types import Acts, Json


@dataclass
class PeerConfig:
    """What harnesses read of a sparse autoencoder's `cfg`, under sae-lens's names.

    Attributes:
        architecture: kind of the model, such as `glp`.
        dtype, device: of the features that `encode` gives.
        context_size: tokens of a text in training, if known.
        metadata: where sae-lens 6 keeps what says how to use the autoencoder.
    """

    d_in: int
    d_sae: int
    architecture: str
    model_name: str
    hook_name: str
    hook_layer: int
    context_size: int | None
    dtype: str
    device: str
    prepend_bos: bool = True
    hook_head_index: int | None = None
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = False
    metadata: SimpleNamespace = field(default_factory=SimpleNamespace)

    def to_dict(self) -> Json:
        """Everything, for a harness's file of results."""
        return {**asdict(self), "metadata": vars(self.metadata)}


class Peer(nn.Module):
    """A model's features under the interface of `sae_lens.SAE`; it has no `decode`, since the model has no decoder.

    `to` sets device and number format of the results only: the model stays where it is and computes in float32.

    Attributes:
        cfg: size, hook point and language model.
        W_dec: the activation that each feature stands for, `(n_features, d_in)`, in no set norm; `(0, d_in)` of a model
            without a decoder, so that whatever measures the directions of features finds none.
    """

    W_dec: Tensor

    def __init__(self, model: Featurizer, cfg: PeerConfig, *, noise_seed: int, options: Json) -> None:
        super().__init__()
        self.model, self.cfg = model, cfg
        self._noise_seed, self._options = noise_seed, options
        self.register_buffer("W_dec", self._directions(), persistent=False)

    def _directions(self) -> Tensor:
        return torch.empty(0, self.cfg.d_in, dtype=torch.float32)

    @property
    def device(self) -> torch.device:
        """Where results are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of results."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Set device and number format of the results, as `torch.nn.Module.to`."""
        super().to(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Features `(..., n_features)` of activations `(..., d_in)`, or of heads `(..., n_heads, d_in / n_heads)`.

        Raises:
            InputError: another width, or values that are not finite.
        """
        if x.ndim > 2 and x.shape[-1] < self.cfg.d_in == x.shape[-2:].numel():
            x = x.flatten(-2)
        rows = x.reshape(-1, x.shape[-1]).float()
        noise = row_noise(rows, self._noise_seed) if self.model.stochastic else None
        return self._result(self.model.encode(rows, noise=noise, **self._options), x)

    def _result(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(*like.shape[:-1], rows.shape[-1]).to(self.device, self.dtype)


class DecodingPeer(Peer):
    """The same of a model that has a decoder."""

    model: Any  # a Featurizer and Decoder

    def _directions(self) -> Tensor:
        each = torch.eye(self.cfg.d_sae, dtype=torch.float32)
        return torch.sub(self.model.decode(each), self.model.decode(torch.zeros_like(each)))

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        """Activations `(..., d_in)` of features `(..., n_features)`."""
        rows = features.reshape(-1, features.shape[-1]).float()
        return self._result(self.model.decode(rows), features)


@checked
def as_sae(
    model: ActivationModel,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
    noise_seed: int = 0,
    **options: Any,
) -> nn.Module:
    """A model with features as a peer of sae-lens's autoencoders; of one of those, a copy of itself.

    An autoencoder keeps what its own metadata say. A harness that opens the language model itself, as sae-probes and
    SAEBench do, opens it with raw weights: for a model trained on others there is a warning.

    A harness feeds rows in batches of its own, so a GLP's noise is made from each row: see `row_noise`. SAEBench
    encodes every token of a batch of texts at once: lower its `sae_batch_size` for a model with many features.

    Args:
        hook_name: the hook point it is probed at, by default that of its training activations.
        model_name: the language model, under the name that the harness loads it by; by default as in training.
        noise_seed: of the noise of a stochastic model.
        options: passed on to the model's `encode`, for example `sigma=0.1`.

    Raises:
        InputError: no features, an unknown hook point or language model, or options for an autoencoder.
    """
    if not isinstance(model, Featurizer):
        raise InputError(f"a {model.kind} has no features to probe: pass a model with encode, such as a GLP")
    hook = hook_name or model.hook
    if hook is None or not (layer := re.match(r"blocks\.(\d+)\.", hook)):
        raise InputError(f"expected a hook point in a block, got {hook!r}: pass hook_name='blocks.N.hook_resid_post'")
    bound = provenance.bound(model, hook)
    trained = provenance.trained_on(bound)
    name = model_name or (trained.get("model") or {}).get("name")
    if name is None:
        raise InputError("this model does not know its language model: pass model_name=, as the harness calls it")
    weights = provenance.opened_with(trained)
    if weights:
        warnings.warn(
            f"this {model.kind} was trained on a language model opened with {', '.join(weights)}, and harnesses open "
            "it without: give them activations of your own",
            stacklevel=3,
        )
    use: Json = {"model_name": name, "hook_name": hook, "hook_layer": int(layer[1])}
    context = trained.get("context")
    own: Any = getattr(model, "sae", None)
    if own is not None:
        if options:
            raise InputError(f"a sparse autoencoder takes no options, got {', '.join(options)}")
        use["model_name"] = model_name or own.cfg.metadata.model_name or name
        return _copy(own, use, {"context_size": context, "prepend_bos": True, "model_from_pretrained_kwargs": weights})
    cfg = PeerConfig(
        d_in=model.d_in,
        d_sae=model.n_features,
        architecture=model.kind,
        dtype="float32",
        device="cpu",
        context_size=context,
        **use,
    )
    cfg.metadata = SimpleNamespace(
        **use,
        context_size=context,
        prepend_bos=cfg.prepend_bos,
        hook_head_index=None,
        model_from_pretrained_kwargs=weights,
    )
    kind = DecodingPeer if isinstance(model, Decoder) else Peer
    return kind(bound, cfg, noise_seed=noise_seed, options=options).eval()


def _copy(own: Any, use: Json, defaults: Json) -> nn.Module:
    """A `sae_lens.SAE` for a harness, which may cast it and change its settings; `defaults` are for what is unknown."""
    peer = copy.deepcopy(own)
    metadata = vars(peer.cfg.metadata)
    metadata.update(use, **{key: value for key, value in defaults.items() if metadata.get(key) is None})
    if peer.cfg.reshape_activations == "hook_z" and use["hook_name"].endswith("_z"):
        peer.turn_on_forward_pass_hook_z_reshaping()  # harnesses pass the heads apart; in our own wrapper it is off
    return cast(nn.Module, peer)


def row_noise(rows: Acts, seed: int = 0) -> Acts:
    """Standard normal noise of the shape of `rows` `(n, d_in)`, on the CPU, that depends on each row's values alone.

    A row is drawn by a Philox generator (Salmon et al. 2011) under the key (xxh3-64 of the row's float32 bytes, seed):
    the same activation has the same noise in any batch and order, and activations that differ in one bit have
    independent noise.
    """
    values = rows.detach().cpu().float().contiguous().numpy()
    noise = np.empty_like(values)
    for row, into in zip(values, noise, strict=True):
        key = np.array([xxhash.xxh3_64_intdigest(row.data), seed], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=into)
    return torch.from_numpy(noise)
