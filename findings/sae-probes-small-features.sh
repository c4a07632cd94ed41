#!/usr/bin/env bash
# sae-probes 0.4.2 with scikit-learn 1.9.1, seen in November 2026.
#
# sae-probes scores k features by LogisticRegression without a scaler, ten penalties from C = 1e5 to 1e-5, so that a
# strong enough C should make the units of the features unimportant. But lbfgs, scikit-learn's default, ends where no
# component of the gradient exceeds 1e-4, and the gradient shrinks with the features: where activations are about a
# thousandth, as those of many hidden units are, it takes one or two steps from zero and reports convergence.
#
# Expected: the best C gives about the same test AUC whatever the units, or a ConvergenceWarning says that it does not.
# Seen: two noisy features whose difference is the class: AUC .96 in units of 1, .67 in units of .001, where the optimum
# of the same regressions still has .96. No warning. Output seen:
#   sae-probes 0.4.2, scikit-learn 1.9.1
#   units 1: sae-probes 0.964, optimum 0.964
#   units 0.001: sae-probes 0.670, optimum 0.962
#   steps of lbfgs at C = 1e5: 12, then 2; warnings: 0
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 joblib==1.6.0
"$work/venv/bin/pip" install --quiet --no-deps sae-probes==0.4.2 xgboost==3.2.0
"$work/venv/bin/python" - <<'PY'
import importlib.util
import sys
import warnings
from importlib.metadata import version

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

package = importlib.util.find_spec("sae_probes").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("training", f"{package}/utils_training.py")  # without torch
training = sys.modules["training"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)
print(f"sae-probes {version('sae-probes')}, scikit-learn {version('scikit-learn')}")

rng, n = np.random.default_rng(0), 1024
y = rng.integers(0, 2, 2 * n)
shared, noise = rng.normal(size=2 * n), rng.normal(size=(2, 2 * n))
features = np.stack([shared + 0.1 * noise[0] + 0.2 * (y - 0.5), shared + 0.1 * noise[1] - 0.2 * (y - 0.5)], axis=1)
found, best, steps = {}, {}, []
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for units in (1, 0.001):
        x = units * features
        parts = x[:n], y[:n], x[n:], y[n:]
        found[units] = training.find_best_reg(*parts, penalty="l2", seed=42).metrics.test_auc
        steps.append(int(LogisticRegression(C=1e5, max_iter=1000).fit(*parts[:2]).n_iter_[0]))
        newton = [
            LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(*parts[:2])
            for c in np.logspace(5, -5, 10)
        ]
        best[units] = max(roc_auc_score(y[n:], model.decision_function(x[n:])) for model in newton)
for units in found:
    print(f"units {units}: sae-probes {found[units]:.3f}, optimum {best[units]:.3f}")
print(f"steps of lbfgs at C = 1e5: {steps[0]}, then {steps[1]}; warnings: {len(told)}")
if not (found[1] > 0.95 and found[0.001] < 0.75 and min(best.values()) > 0.95 and not told):
    sys.exit("changed: the units of features no longer decide what sae-probes finds")
PY
