"""`features`: measure what features of models are active on and what they write, look at them, take them elsewhere."""

from __future__ import annotations

import typer

from glp_lens import pipeline

from ._app import Commands
from ._derive import about, add

_HELP = "Look at features: what each is active on, what it writes, which others are like it."
app = typer.Typer(cls=Commands, no_args_is_help=True, help=_HELP)


@app.callback(help=_HELP)
def _group() -> None:
    pass


add(app, "build", pipeline.BuildFeaturesJob, "build_features", about(pipeline.build_features))


def _show(settings: pipeline.ShowFeaturesJob) -> None:
    from ._features import show

    show(pipeline.show_features(settings), settings.examples)


def _top(settings: pipeline.TopFeaturesJob) -> None:
    from ._features import show_top

    show_top(pipeline.top_features(settings), settings.top)


add(app, "show", pipeline.ShowFeaturesJob, _show, about(pipeline.show_features), "names")
add(app, "top", pipeline.TopFeaturesJob, _top, about(pipeline.top_features))
add(app, "steer", pipeline.SteerFeaturesJob, "steer_features", about(pipeline.steer_features), "names")
add(app, "export", pipeline.ExportFeaturesJob, "export_features", about(pipeline.export_features), "names")
add(app, "page", pipeline.PageFeaturesJob, "page_features", about(pipeline.page_features))
add(app, "serve", pipeline.ServeFeaturesJob, "serve_features", about(pipeline.serve_features))
add(app, "score", pipeline.ScoreFeaturesJob, "score_features", about(pipeline.score_features))
add(app, "explain", pipeline.ExplainJob, "explain", about(pipeline.explain))
