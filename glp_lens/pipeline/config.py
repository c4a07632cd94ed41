"""Every setting of a comparison, with the defaults of `glp-lens quickstart`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from glp_lens.errors import InputError
from glp_lens.lm import DEFAULT_MODEL
from glp_lens.types import Json


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison. The defaults finish in minutes on two CPU cores.

    Attributes:
        model: Hub id or local folder of the language model.
        backend: `bridge` or `hooked`.
        lm_dtype: number format the language model runs in.
        hook: hook point; by default the residual stream after the middle layer.
        device: torch device for everything.
        seed: of every random choice.
        texts: files or folders with the training texts; the packaged corpus if empty.
        tokens: activations collected for training.
        heldout_tokens: activations collected from held-out documents.
        context: longest sequence, in tokens, BOS included.
        rows: activations shown to the GLP and to the SAE each; more than `tokens` means several epochs.
        glp_width: width of the denoiser.
        glp_mlp: meta-neurons in each of its blocks.
        glp_layers: number of blocks.
        glp_lr: peak learning rate of the GLP.
        glp_batch: rows in each of its steps.
        sae_latents: dictionary size.
        sae_k: latents active on each row.
        sae_lr: peak learning rate of the SAE.
        sae_batch: rows in each of its steps.
        tasks: patterns of sae-probes task names; the default set if empty.
        probe_train: most training prompts a task.
        probe_test: most test prompts a task.
        sigmas: noise levels at which meta-neurons are read, the first the one that is compared.
        ks: numbers of features of the k-sparse probes; none if empty.
        concept: topic that generation is steered towards.
        strengths: steering strengths, in median activation norms.
        prompts: neutral prompts that generations start from.
        new_tokens: tokens generated after each.
        project_u: noise level of the GLP's projection in the paper, in the released code's `u`.
        project_sigma: a second, milder noise level, as `sigma`.
        fast: project with the GLP's fast preset.
        documents: held-out documents for the change in language-model loss.
    """

    model: str = DEFAULT_MODEL
    backend: Literal["bridge", "hooked"] = "bridge"
    lm_dtype: str = "bfloat16"
    hook: str | None = None
    device: str = "cpu"
    seed: int = 0
    texts: tuple[str, ...] = ()
    tokens: int = 150_000
    heldout_tokens: int = 8_000
    context: int = 128
    rows: int = 400_000
    glp_width: int = 768
    glp_mlp: int = 1536
    glp_layers: int = 3
    glp_lr: float = 2e-3
    glp_batch: int = 256
    sae_latents: int = 2304
    sae_k: int = 32
    sae_lr: float = 2e-3
    sae_batch: int = 512
    tasks: tuple[str, ...] = ()
    probe_train: int = 256
    probe_test: int = 200
    sigmas: tuple[float, ...] = (0.1,)
    ks: tuple[int, ...] = (16,)
    concept: str = "sports"
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    prompts: int = 24
    new_tokens: int = 24
    project_u: float = 0.5
    project_sigma: float = 0.2
    fast: bool = False
    documents: int = 24

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1 and name not in ("seed", "fast"):
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}")
        if self.rows < self.glp_batch:
            raise InputError(f"rows must be at least one batch of {self.glp_batch}, got {self.rows}")
        if self.sae_k > self.sae_latents:
            raise InputError(f"sae_k must be at most sae_latents = {self.sae_latents}, got {self.sae_k}")
        if not 2 <= self.context <= 8192:
            raise InputError(f"context must be between 2 and 8192 tokens, got {self.context}")
        if not self.strengths or self.strengths[0] <= 0 or list(self.strengths) != sorted(set(self.strengths)):
            raise InputError(f"strengths must be positive and rising, got {list(self.strengths)}")
        if not self.sigmas or any(not 0 < s < 1 for s in self.sigmas):
            raise InputError(f"sigmas must be between 0 and 1, got {self.sigmas}")
        if any(k < 1 for k in self.ks):
            raise InputError(f"ks must be at least 1, got {self.ks}")
        if not 0 <= self.project_u < 1:
            raise InputError(f"project_u must be in [0, 1), got {self.project_u}")
        if not 0 < self.project_sigma < 1:
            raise InputError(f"project_sigma must be between 0 and 1, got {self.project_sigma}")

    def to_json(self) -> Json:
        """As JSON: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
