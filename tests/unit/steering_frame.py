"""Made-up generations with known effects, in the shape the suite writes them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from glp_lens.evals.steering.settings import PLAIN, UNSTEERED

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SETTINGS = {"glp": "u=0.5", "glp difference": "sigma=0.6;repair=difference", "gaussian": "", "sae": ""}


def steering_frame(
    methods: Mapping[str, float],
    *,
    concepts: Sequence[str] = ("sports", "business", "world"),
    prompts: int = 24,
    strengths: Sequence[float] = STRENGTHS,
    runs: Sequence[tuple[int, str]] = ((0, "float32"),),
    spread: float = 0.3,
    between: float = 0.0,
    seed: int = 0,
    texts: Sequence[str] = ("some words about it",),
) -> pd.DataFrame:
    """One row a text.

    Concept rises by .8 a unit of strength and fluency falls by the square of the strength; a method adds its gain to
    both scores, the more so the stronger the push, so that it is ahead of plain steering in every measure.

    Args:
        methods: gain over plain steering by label; `unsteered` and `plain` are always there.
        concepts: their names.
        prompts: of each concept.
        strengths: of all methods.
        runs: noise seed and number format; the first is the main run.
        spread: standard deviation of a text's scores.
        between: standard deviation of a method's gain between concepts.
        seed: of all of it.
        texts: taken in turn.
    """
    rng = np.random.default_rng(seed)
    gains = {(c, m): gain + between * rng.normal() for c in concepts for m, gain in methods.items()}
    gains |= {(c, PLAIN): 0.0 for c in concepts}
    parts = []
    for noise_seed, dtype in runs:
        for concept in concepts:
            for method in (UNSTEERED, PLAIN, *methods):
                alphas = np.array([0.0] if method == UNSTEERED else strengths)
                prompt, alpha = (x.ravel() for x in np.meshgrid(np.arange(prompts), alphas, indexing="ij"))
                gain = gains.get((concept, method), 0.0) * np.minimum(alpha / 0.4, 1)
                noise = spread * rng.normal(size=(2, len(alpha)))
                parts.append(
                    pd.DataFrame(
                        {
                            "experiment": "topics", "concept": concept, "method": method,
                            "setting": SETTINGS.get(method, ""), "strength": alpha,
                            "prompt": [f"Prompt number {i} is" for i in prompt], "prompt_index": prompt,
                            "noise_seed": noise_seed, "lm_dtype": dtype,
                            "score_concept": np.clip(0.4 + 0.8 * alpha + gain + noise[0], 0, 2),
                            "score_fluency": np.clip(1.6 - 0.8 * alpha**2 + gain + noise[1], 0, 2),
                            "score_concept_tfidf": np.clip(0.4 + 0.7 * alpha + noise[0], 0, 2),
                            "nll_own": 1 + 1.5 * alpha**2 + 0.1 * rng.normal(size=len(alpha)),
                            "distinct_2": 0.9, "distinct_characters": 0.5,
                        }
                    )
                )  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    frame["text"] = [texts[i % len(texts)] for i in range(len(frame))]
    return frame
