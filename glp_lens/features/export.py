"""Features in the formats of other tools: dashboards of SAEDashboard and Neuronpedia.

`saedashboard` is what SAEDashboard's NeuronpediaRunner writes, `batch-N.json` (`NeuronpediaDashboardBatch.to_dict`,
sae_dashboard 0.8.0): its own exporter and Neuronpedia's converter read it. `neuronpedia` is the layout of Neuronpedia's
exports (docs.neuronpedia.org/api-and-data/exports): `features/`, `activations/` and `explanations/batch-N.jsonl.gz`, a
JSON object a line with the columns of its tables. What is not measured here is empty there: alignment with single
dimensions, the histogram over the vocabulary, and ids of authors, which Neuronpedia gives.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from glp_lens.features.folder import BANDS, FeatureFolder, ModelAbout, Way
from glp_lens.features.show import FeatureView, view
from glp_lens.features.steered import check_way, stream_hook
from glp_lens.files import write_atomic
from glp_lens.types import Json

Form = Literal["saedashboard", "neuronpedia"]
BATCH = 1024
"""Features in one file."""
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_l1", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip
"""Fields of both formats that say what is not measured here."""


def write_dashboards(
    folder: FeatureFolder,
    model: ModelAbout,
    features: Sequence[int],
    out: Path,
    form: Form,
    *,
    way: Way | None = None,
) -> list[Path]:
    """Write features of a model as dashboards.

    Args:
        folder: of the features.
        model: which of its models.
        features: which of its features.
        out: folder to write to.
        form: whose format.
        way: which of their directions says what they write, and goes along; by default the first that there is.

    Returns:
        The files.

    Raises:
        InputError: no directions of that way, a damaged table, or a file that cannot be written.
    """
    source = _Source.of(folder, model, way)
    written = []
    for number, start in enumerate(range(0, len(features), BATCH)):
        made = view(folder, model, list(features[start : start + BATCH]))
        for file, content in source.files(made, form, number):
            write_atomic(out / file, content)
            written.append(out / file)
    return written


@dataclass(frozen=True, eq=False)
class _Source:
    """What the features of a model have in common.

    Attributes:
        model: which.
        language_model: last part of its name.
        layer: of its hook point, 0 outside of the blocks.
        hook: where the directions act.
        way: of the directions; None if there are none.
        vectors: `(n_features, d)`, with their lengths.
        texts, context, corpus: what the features were built on.
    """

    model: ModelAbout
    language_model: str
    layer: int
    hook: str
    way: Way | None
    vectors: Tensor | None
    texts: int
    context: int
    corpus: str

    @classmethod
    def of(cls, folder: FeatureFolder, model: ModelAbout, way: Way | None) -> _Source:
        """The source of a model's features."""
        about, vectors, hook = folder.about, None, model.hook
        if way is not None or folder.ways(model.label):
            way = check_way(folder, model, way)
            units, norms = folder.directions(model.label, way)
            vectors, hook = units * norms[:, None], stream_hook(folder, model, units.shape[1])
        name = str((about.language_model.get("model") or {}).get("name") or "unknown")
        layer = re.match(r"blocks\.(\d+)\.", hook)
        return cls(
            model, name.rstrip("/").rpartition("/")[2], int(layer[1]) if layer else 0, hook, way, vectors,
            about.texts, int(about.settings.get("context") or 0), about.corpus,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """As Neuronpedia names a source."""
        return f"{self.layer}-{self.model.folder}"

    def files(self, views: Sequence[FeatureView], form: Form, number: int) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the files of a batch of features."""
        made = [self.dashboard(each) for each in views]
        if form == "saedashboard":
            batch = {"model_id": self.language_model, "layer": self.layer, "sae_set": self.model.folder}
            yield f"batch-{number}.json", _json({**batch, "sae_id_suffix": None, "features": made}).encode()
            return
        place = {"modelId": self.language_model, "layer": self.name}
        pairs = list(zip(views, made, strict=True))
        lines: dict[str, Iterable[Json]] = {
            "features": ({**place, **self.feature(each, dashboard)} for each, dashboard in pairs),
            "activations": ({**place, **row} for each, dashboard in pairs for row in self.activations(each, dashboard)),
            "explanations": ({**place, **row} for each in views for row in self.explanations(each)),
        }
        for table, rows in lines.items():
            content = "".join(f"{_json(row)}\n" for row in rows).encode()
            yield f"{table}/batch-{number}.jsonl.gz", gzip.compress(content, 6, mtime=0)

    def dashboard(self, each: FeatureView) -> Json:
        """A feature as SAEDashboard writes it."""
        known = each.statistics
        low, high, heights = known["histogram_low"], known["histogram_high"], list(map(int, known["histogram"]))
        edges = np.linspace(low, high, len(heights) + 1)
        ends = {side: _end(each.rows("writes"), self.way, side) for side in ("top", "bottom")}
        alike = each.rows("neighbours")
        alike = alike[(alike["by"] == "activation") & (alike["model"] == self.model.label)]
        vector = None if self.vectors is None else self.vectors[each.index]
        return {
            "feature_index": each.index, **{name: [] for name in _EMPTY},
            "correlated_features_indices": [int(other) for other in alike["other"]],
            "correlated_features_pearson": _rounded(alike["value"]),
            "pos_str": ends["top"][0], "pos_values": ends["top"][1],
            "neg_str": ends["bottom"][0], "neg_values": ends["bottom"][1],
            "frac_nonzero": float(known["density"]),
            "freq_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2), "freq_hist_data_bar_heights": heights,
            "n_prompts_total": self.texts, "n_tokens_in_prompt": self.context, "dataset": self.corpus,
            "vector": _rounded(vector) if vector is not None and bool(vector.isfinite().all()) else [],
            "activations": list(_passages(each)),
        }  # fmt: skip

    def feature(self, each: FeatureView, dashboard: Json) -> Json:
        """A feature as a row of Neuronpedia's table."""
        shared = ("feature_index", "activations", "n_prompts_total", "n_tokens_in_prompt", "dataset")
        near = each.rows("neighbours")
        near = near[(near["by"] == "direction") & (near["model"] == self.model.label)]
        has, peak = bool(dashboard["vector"]), float(each.statistics["max"])
        return {
            "index": str(each.index), "creatorId": "", "sourceSetName": self.model.folder, "maxActApprox": peak,
            "hasVector": has, "vectorLabel": each.name if has else None, "hookName": self.hook if has else None,
            "vectorDefaultSteerStrength": peak if has else None,
            "topkCosSimIndices": [int(other) for other in near["other"]], "topkCosSimValues": _rounded(near["value"]),
            **{name: value for name, value in dashboard.items() if name not in shared},
        }  # fmt: skip

    def activations(self, each: FeatureView, dashboard: Json) -> Iterator[Json]:
        """The passages of a feature as rows of Neuronpedia's table."""
        for number, passage in enumerate(dashboard["activations"]):
            values = passage["values"]
            yield {
                "id": f"{self.name}-{each.index}-{number}", "index": str(each.index), "creatorId": "",
                "tokens": passage["tokens"], "values": values, "maxValue": max(values), "minValue": min(values),
                "maxValueTokenIndex": values.index(max(values)), "dataSource": self.corpus,
                "binMin": passage["bin_min"], "binMax": passage["bin_max"], "binContains": passage["bin_contains"],
                "qualifyingTokenIndex": passage["qualifying_token_index"],
            }  # fmt: skip

    def explanations(self, each: FeatureView) -> Iterator[Json]:
        """What a feature is said to be, as rows of Neuronpedia's table: its automatic label is marked as one."""
        for table, column, notes in (
            ("explanations", "explanation", "by a language model"),
            ("labels", "label", "automatic label: distinctive tokens of its top examples"),
        ):
            for text in each.rows(table)[column]:
                yield {
                    "id": f"{self.name}-{each.index}-{table}", "index": str(each.index), "authorId": "",
                    "description": str(text), "typeName": None, "explanationModelName": None, "notes": notes,
                }  # fmt: skip


def _passages(each: FeatureView) -> Iterator[Json]:
    """Top passages, then those of each band from above, of features of both signs those above 0 only."""
    known, rows = each.statistics, each.rows("examples")
    counts = np.asarray(known["histogram"], dtype=float)
    edges = np.linspace(known["histogram_low"], known["histogram_high"], len(counts) + 1)
    centres, peak = (edges[1:] + edges[:-1]) / 2, float(known["max"])
    bins = {"top": (-1.0, peak, -1.0)}  # as SAEDashboard tells its top passages from those of an interval
    for i, (low, high) in reversed(list(enumerate(BANDS))):
        inside = counts[(centres >= low * peak) & (centres <= high * peak)].sum()
        bins[f"band {i}"] = (low * peak, high * peak, float(inside / max(counts.sum(), 1)))
    for group, (low, high, share) in bins.items():
        for row in rows[(rows["group"] == group) & (rows["value"] > 0)].sort_values("rank").itertuples():
            yield {
                "bin_min": low, "bin_max": high, "bin_contains": share, "tokens": [str(token) for token in row.tokens],
                "values": _rounded(row.values), "qualifying_token_index": int(row.peak),
            }  # fmt: skip


def _end(writes: pd.DataFrame, way: Way | None, side: str) -> tuple[list[str], list[float]]:
    """Tokens and logits of one end of a direction; none where they are not known."""
    own = writes[(writes["way"] == way) & (writes["side"] == side)]
    return ([str(token) for token in own["tokens"].iloc[0]], _rounded(own["logits"].iloc[0])) if len(own) else ([], [])


def _rounded(values: Any) -> list[float]:
    """Numbers to five digits."""
    return [float(f"{value:.5g}") for value in np.asarray(values, dtype=float).tolist()]


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
