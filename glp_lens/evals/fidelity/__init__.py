"""What a language model loses when its activations are replaced by a model's reconstruction of them."""

from glp_lens.evals.fidelity.suite import run

__all__ = ["run"]
