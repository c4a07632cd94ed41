"""The page: self-contained, escaped, complete, and readable without the suites that made it."""

import math
import re
from html.parser import HTMLParser

import pytest

from glp_lens.display.labels import Palette
from glp_lens.errors import InputError
from glp_lens.evals.registry import SUITES
from glp_lens.evals.results import Results
from glp_lens.report import write_report

EVIL = "<script>alert('x')</script> & co"


def probing():
    results = Results("probing", config={"max_features": 512}, failures=[f"odd task {EVIL}"])
    for setting in ("split=dedup;mode=paper", "split=official;mode=all"):
        for model, value in (("glp", 0.8), ("sae", 0.7), ("raw", 0.75)):
            for task in ("a_task", "b_task"):
                results.add(model, task, setting, "auc", value, ci_low=value - 0.1, ci_high=value + 0.1, n=99)
                results.add(model, task, setting, "n_candidates", 77, n=1)
            results.add(model, "all", setting, "auc", value, ci_low=value - 0.1, ci_high=value + 0.1, n=2)
        results.add("glp", "all", setting, "auc_diff:sae", 0.1, ci_low=0.05, ci_high=0.15, n=2)
        results.add("glp", "all", setting, "p_holm:sae", 0.5, n=2)
    results.add("dense", "a_task", "split=dedup", "auc", 0.9, n=99)
    return results


def steering():
    results = Results("steering", config={"concept": "sports"}, extras={"chosen": {"plain": [0.4, 0.8]}})
    for metric, value in (("concept", 0.4), ("fluency", 1.1)):
        results.add("unsteered", "sports", "alpha=0", metric, value, n=32)
        for model in ("plain", "glp", "random", "random+glp"):
            for alpha in (0.4, 0.8):
                results.add(model, "sports", f"alpha={alpha}", metric, value + alpha, n=32)
            results.add(model, "sports", "alpha=chosen", metric, value, n=32)
    results.add("glp", "sports", "alpha=chosen", "harmonic_diff:plain", -0.1, ci_low=-0.2, ci_high=-0.05, n=32)
    results.add("judge:minilm", "sports", "words=15", "judge_auroc:held_out", 0.99, n=100)
    results.extras["generations"] = [
        {"model": "unsteered", "alpha": 0.0, "prompt": "The first", "text": "plain words"},
        {
            "model": "glp",
            "alpha": 0.4,
            "prompt": "The first",
            "text": f"goal {EVIL}",
            "concept": 1.25,
            "fluency": 0.5,
        },
    ]
    return results


def fidelity():
    results = Results("fidelity", extras={"curves": {"glp": ["glp sigma=0.1", "glp sigma=0.5"]}})
    for model, fvu, loss in (("glp sigma=0.1", 0.02, 0.004), ("glp sigma=0.5", 0.3, 0.4), ("sae", 0.28, 0.5),
                             ("raw", 0.0, 0.0), ("mean ablation", 1.0, 7.5)):  # fmt: skip
        results.add(model, "heldout", "", "fvu", fvu, n=24)
        results.add(model, "heldout", "", "delta_nll", loss, ci_low=loss * 0.9, ci_high=loss * 1.1, n=24)
    name = "delta_nll_matched_diff:sae"
    results.add("glp", "heldout", "fvu=0.2800;between=a,b", name, -0.1, ci_low=-0.2, ci_high=-0.05, n=24)
    return results


def density():
    results = Results("density", data={"rows": 4000, "documents": 60})
    for setting in ("sigma=all", "sigma=0.0-0.1", "sigma=0.1-0.2"):
        for model, loss in (
            ("glp", 1.2),
            ("gaussian", 1.4),
            ("predict 0", 2.0),
            ("isotropic gaussian", 1.57),
        ):
            results.add(model, "heldout", setting, "flow_loss", loss, ci_low=loss, ci_high=loss, n=60)
        results.add("gaussian", "heldout", setting, "flow_loss_bound", 1.38)
    results.add("sae", "heldout", "real vs shuffled", "score_auroc", 0.9, n=60)
    return results


class Page(HTMLParser):
    """Collects tags, ids and text, and checks that tags are closed in order."""

    VOID = frozenset(["meta", "br", "use", "path", "link", "img", "wbr"])

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.addresses, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    context = {
        "title": f"Report {EVIL}",
        "command": "glp-lens quickstart --out a",
        "seed": 0,
        "training": [{"model": "glp", "rows_seen": 768000, "rows_distinct": 256000, "parameters": 16_300_000,
                      "flops": 7.5e13, "seconds": 271.0, "recipe": "AdamW"},
                     {"model": "sae", "rows_seen": 640000, "k": 32}],
        "store": {"rows": 320000, "hook": "blocks.14.hook_resid_post",
                  "corpus": {"name": "packaged"}, "max_norm": None},
    }  # fmt: skip
    path = write_report([density(), fidelity(), steering(), probing()], out, context)
    return out, path, path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_needs_nothing_from_outside(written):
    _, path, text = written
    page = Page(text)
    assert path.name == "report.html"
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert {a[1:] for a in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_everything_from_outside_is_escaped(written):
    _, _, text = written
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 3  # title, a failure, a generation


def test_all_suites_have_their_numbers_verdicts_and_plots(written):
    out, _, text = written
    names = ("probing_means", "probing_heat", "probing_tasks", "steering_frontier", "fidelity", "density")
    for name in names:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<svg") == len(names)
    words = " ".join(" ".join(Page(text).words).split())
    assert "GLP loses to no repair in steering towards sports" in words
    assert "GLP beats SAE in keeping the language model intact at equal distortion (FVU 0.280)" in words
    assert "No clear winner between GLP and SAE in reading concepts" in words  # Holm's p is .5
    assert "3.0 passes" in words
    assert "2.0 passes" in words  # the SAE does not tell: at most the rows of the store
    assert "7.5 × 10¹³" in words
    assert "4 min 31 s" in words
    assert "concept 1.2, fluency 0.5" in words
    assert "glp-lens quickstart --out a" in words
    assert "nan" not in words.lower().split()


def test_results_read_back_from_disk_give_the_same_page(tmp_path):
    runs = [probing(), steering(), fidelity(), density()]
    for run in runs:
        run.save(tmp_path / run.suite)
    again = [Results.load(tmp_path / run.suite) for run in runs]
    first = write_report(runs, tmp_path / "a").read_text()
    assert write_report(again, tmp_path / "b").read_text() == first


@pytest.mark.parametrize("make", [probing, steering, fidelity, density])
def test_one_suite_alone_makes_a_page(tmp_path, make):
    text = write_report([make()], tmp_path).read_text()
    assert Page(text).open == []
    assert text.count("<svg") == (3 if make is probing else 1)


@pytest.mark.parametrize("make", [probing, steering, fidelity, density])
def test_runs_of_one_suite_that_share_a_part_make_a_page(tmp_path, make):
    text = write_report([make(), make()], tmp_path).read_text()
    assert Page(text).open == []


def test_notes_tell_rounding_losses_and_sizes_only_if_the_results_do(tmp_path):
    bare = write_report([fidelity(), probing()], tmp_path / "bare").read_text()
    for words in ("within its rounding", "FVU, standardised", "cut to"):
        assert words not in bare
    loss, probes = fidelity(), probing()
    loss.data["model"] = {"dtype": "bfloat16"}
    loss.add("sae", "heldout", "", "fvu_standardised", 0.347, ci_low=0.3, ci_high=0.4, n=24)
    probes.data = {
        "context": 96,
        "tasks": {
            "a_task": {"family": "a", "official": {"train": 250, "test": 200}, "dedup": {"train": 240, "test": 170}},
            "b_task": {"family": "b", "official": {"train": 256, "test": 90}},
        },
    }
    told = " ".join(" ".join(Page(write_report([loss, probes], tmp_path / "told").read_text()).words).split())
    assert "The language model ran in bfloat16: differences of about 0.01 nats are within its rounding." in told
    assert "FVU, standardised" in told
    assert "0.347 [0.300, 0.400]" in told
    assert "the matched comparison uses raw FVU" in told
    assert "Up to 256 training and 200 test prompts a task, cut to 96 tokens" in told
    loss.data["model"] = {"dtype": "float32"}
    assert "within its rounding" not in write_report([loss], tmp_path / "exact").read_text()


def test_plain_pca_has_its_own_style_and_no_unknown_model_shares_it():
    palette = Palette(["pca", "pca_raw k=72", "another"])
    styles = [(palette.color(m), palette.marker(m)) for m in ("pca", "pca_raw k=72", "another")]
    assert styles[1] == ("#56b4e9", "p")
    assert len(set(styles)) == 3


def test_empty_or_nearly_empty_results_do_not_break_the_page(tmp_path):
    for suite in ("probing", "steering", "fidelity", "density", "detect"):
        results = Results(suite)
        results.add("glp", "all", "", "unknown_metric", math.nan)
        assert Page(write_report([results], tmp_path / suite).read_text()).open == []
    with pytest.raises(InputError, match="nothing to report"):
        write_report([], tmp_path)


@pytest.mark.parametrize(
    ("results", "lines"),
    [
        (
            density(),
            [
                "glp sigma=all flow_loss 1.200 [1.200, 1.200]",
                "gaussian sigma=all flow_loss 1.400 [1.400, 1.400]",
                "predict 0 sigma=all flow_loss 2.000 [2.000, 2.000]",
                "isotropic gaussian sigma=all flow_loss 1.570 [1.570, 1.570]",
            ],
        ),
        (
            fidelity(),
            [
                "glp sigma=0.1 fvu 0.020",
                "glp sigma=0.1 delta_nll 0.004 [0.004, 0.004]",
                "glp sigma=0.5 fvu 0.300",
                "glp sigma=0.5 delta_nll 0.400 [0.360, 0.440]",
                "sae fvu 0.280",
                "sae delta_nll 0.500 [0.450, 0.550]",
                "raw fvu 0.000",
                "raw delta_nll 0.000 [0.000, 0.000]",
                "mean ablation fvu 1.000",
                "mean ablation delta_nll 7.500 [6.750, 8.250]",
                "glp fvu=0.2800;between=a,b delta_nll_matched_diff:sae -0.100 [−0.200, −0.050]",
            ],
        ),
    ],
    ids=["density", "fidelity"],
)
def test_what_matters_most_of_a_suite_fits_a_terminal(results, lines):
    (page,) = (suite.page for suite in SUITES if suite.name == results.suite)
    assert [" ".join(line.split()) for line in page.text_table(results).splitlines()] == lines


def test_the_text_of_steering_is_of_the_chosen_strength():
    results = steering()
    for model, value in (("plain", 0.5), ("glp", 0.75)):
        results.add(model, "sports", "alpha=chosen;sigma=0.2", "harmonic", value)
        results.add(model, "sports", "alpha=0.4", "harmonic", 9)
    page = next(suite.page for suite in SUITES if suite.name == "steering")
    assert [line.split() for line in page.text_table(results).splitlines()] == [
        ["plain", "alpha=chosen;sigma=0.2", "harmonic", "0.500"],
        ["glp", "alpha=chosen;sigma=0.2", "harmonic", "0.750"],
    ]
