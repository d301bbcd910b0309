"""A study as its pictures and its page need it."""

from __future__ import annotations

from typing import Any
from pathlib import Path
from tune.records.trials import TrialRecord
import dataclasses
from train_fn.data.splitting import load_splits
import math
import numpy as np
from tune.records.ranking import ranked
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna




# Okabe and Ito's colours, which every kind of colour blindness tells apart; each state has a marker of its own as well.
STATES = {
    "COMPLETE": ("#0072B2", "o"),
    "STOPPED": ("#E69F00", "v"),
    "FAILED": ("#D55E00", "X"),
    "INTERRUPTED": ("#777777", "s"),
}


class View:
    """A study as its pictures and its page need it."""

    def __init__(self, study: dict[str, Any], directory: Path) -> None:
        self.study, self.metric = study, study["metric"]
        fields = {field.name for field in dataclasses.fields(TrialRecord)}
        self.records = [TrialRecord(**{name: t[name] for name in fields & t.keys()}) for t in study["trials"]]
        for record in self.records:  # JSON has no NaN
            record.epochs = [{m: math.nan if v is None else v for m, v in epoch.items()} for epoch in record.epochs]
        by_number = {record.number: record for record in self.records}
        self.winner, self.guide = by_number.get(study["winner"]), by_number.get(0)
        self.names = list(dict.fromkeys(name for record in self.records for name in record.searched))
        splits = directory / "splits.json"
        self.search = load_search(directory, study["settings"]["study"]["warm_start"])
        self.splits = load_splits(splits) if splits.exists() else None
        self.better = -1 if study["mode"] == "min" else 1
        best = ranked(self.records, study["goals"], study["settings"]["study"]["require"])
        self.scored = scored = [record for record in self.records if math.isfinite(self.score(record))]
        others = sorted(scored, key=lambda record: -self.better * self.score(record))
        self.order = best + [record for record in others if record.state != "COMPLETE"]
        self.order += [record for record in self.records if not math.isfinite(self.score(record))]
        # What lies far beyond the worst completed trial is drawn on the edge, so that the completed can be told apart.
        ends = [self.score(record) for record in (best if len(best) > 2 else scored)] or [0.0, 1.0]
        self.worst, self.best = (max(ends), min(ends)) if self.better < 0 else (min(ends), max(ends))
        edge = self.worst - 1.5 * (self.best - self.worst)
        seen = [self.score(record) for record in scored if (self.score(record) - edge) * self.better >= 0] or ends
        pad = 0.08 * (max(seen) - min(seen)) or 0.01
        self.low, self.high = min(seen) - pad, max(seen) + pad

    def score(self, record: TrialRecord) -> float:
        """The trial's last validation score; NaN: none."""
        return record.value(self.metric)

    def height(self, score: float) -> float:
        """Where a score is drawn; none is drawn on the worse edge."""
        edge = self.low if self.better > 0 else self.high
        return min(max(score, self.low), self.high) if math.isfinite(score) else edge

    def marked(self, record: TrialRecord) -> tuple[str, str] | None:
        """Name and colour of the two trials that every picture points out."""
        if record is self.winner:
            return f"winner (trial {record.number})", WINNER
        return ("guide's defaults (trial 0)", GUIDE) if record is self.guide else None

    @property
    def tested(self) -> dict[str, np.ndarray]:
        """Probabilities [N, C] that winner and guide gave the test images' answers, by title; empty: none are known."""
        titles = {"winner": f"winner (trial {self.study['winner']})", "guide": "guide's defaults"}
        found = self.study.get("predictions") or {}
        return {titles[who]: np.array(part["probabilities"], dtype=float) for who, part in found.items()}

    @property
    def truth(self) -> np.ndarray:
        """The test images' true answers [N], as indices."""
        return np.array(self.study["predictions"]["winner"]["answers"])


def load_search(directory: Path, warm_start: str) -> optuna.Study | None:
    """The study's own trials as Optuna has them; None where optuna.db is missing or cannot be read."""
    import optuna
    import sqlalchemy

    path = directory / "optuna.db"
    if not path.exists():
        return None
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    try:
        stored = optuna.load_study(study_name=directory.name, storage=url)
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, KeyError, RuntimeError):
        return None  # damaged, or of another study: the report's other parts do not need it
    if not warm_start:
        return stored
    from tune.records.trials import PRIOR

    own = optuna.create_study(directions=stored.directions)
    own.add_trials([trial for trial in stored.get_trials(deepcopy=False) if PRIOR not in trial.user_attrs])
    return own


WINNER, GUIDE = "#009E73", "#000000"
