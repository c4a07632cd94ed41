"""All that a folder of features holds on one of them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from glp_lens.features.folder import TABLES, FeatureFolder, ModelAbout, name_of


@dataclass(frozen=True, eq=False)
class FeatureView:
    """One feature.

    Attributes:
        model: that it is of.
        index: as `encode` numbers it.
        tables: its rows of each table that the folder has of the model, by name.
        models: all of the folder.
    """

    model: ModelAbout
    index: int
    tables: dict[str, pd.DataFrame]
    models: tuple[ModelAbout, ...]

    @property
    def name(self) -> str:
        """Its name with that of its model, for example glp/3:1024."""
        return full_name(self.model, self.index)

    @property
    def statistics(self) -> pd.Series:
        """Its row of the table `features`."""
        return self.tables["features"].iloc[0]

    @property
    def neighbours(self) -> pd.DataFrame:
        """Its rows of the table `neighbours`, with the `name` of each: `LABEL/UNIT`, `LABEL/BLOCK:UNIT`."""
        rows, by_label = self.rows("neighbours"), {each.label: each for each in self.models}
        return rows.assign(name=[full_name(by_label[row.model], int(row.other)) for row in rows.itertuples()])

    def rows(self, table: str) -> pd.DataFrame:
        """Its rows of a table; none where the folder has no such table."""
        return self.tables.get(table, pd.DataFrame(columns=list(TABLES[table])))


def full_name(model: ModelAbout, feature: int) -> str:
    """What a feature is called beside those of other models."""
    return f"{model.label}/{name_of(model, feature)}"


def view(folder: FeatureFolder, model: ModelAbout, features: list[int]) -> list[FeatureView]:
    """All that a folder holds on features of a model.

    Raises:
        InputError: a table is damaged.
    """
    tables = {name: folder.table(model.label, name, features) for name in TABLES if folder.has(model.label, name)}
    return [
        FeatureView(
            model, each, {name: rows[rows["feature"] == each] for name, rows in tables.items()}, folder.about.models
        )
        for each in features
    ]
